"""What the documentation shows can be done: commands parse, configurations load, programs run."""

from __future__ import annotations

import json
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
from tests.unit.docs.pages import PAGES, ROOT, Block, blocks, named, spans

from lineshaft.cli.main import COMMANDS, parser
from lineshaft.cli.options import overrides
from lineshaft.cli.plugins import further_commands
from lineshaft.config import load, load_config, validate_options
from lineshaft.config.load import build
from lineshaft.config.models import EngineConfig
from lineshaft.registry import discover
from lineshaft_conformance.scaffold import render

LANGUAGES = {"python", "sh", "console", "toml", "json", "text"}
MODEL = re.compile(r'"(?:pypi:|hf://)[^"]+"')
SMALL_STEPS = {"max_rows": 4, "token_budget": 32}  # every size of step costs time at start
NOT_RUN = 5  # programs, at most
PYTEST_OPTIONS = {"--pyargs", "-n", *(f"--conformance-{name}" for name in ("level", "seed", "size"))}
FOREIGN_OPTIONS = {"--no-deps"} | PYTEST_OPTIONS  # of pip; of pytest, its plugins and the suite's


# ---- commands and configurations -------------------------------------------------------------------------------------


def test_the_blocks_are_of_known_languages_and_json_is_json() -> None:
    assert {block.language for block in [*blocks(), *blocks(excerpt=True)]} <= LANGUAGES
    for block in blocks("json"):
        json.loads(block.text)


def lines() -> Iterator[tuple[Block, str]]:
    """Every command line that a page shows, whole; in a `console` block those after a prompt, not what they print."""
    for block in [*blocks("sh"), *blocks("console")]:
        whole = block.text.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in whole if line.startswith("$ ")]
        assert block.language == "sh" or prompted, f"{block}: no line begins with a prompt"
        for line in prompted if block.language == "console" else whole:
            yield block, line


def simple(line: str) -> Iterator[list[str]]:
    """The words of each command of a line: those before an operator of the shell, without variables and redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set("&|;"):
            words.append(token)
            continue
        kept = words[: next((i for i, word in enumerate(words) if word and set(word) <= set("<>")), None)]
        first = next((i for i, word in enumerate(kept) if not re.fullmatch(r"[A-Z_]+=.*", word)), len(kept))
        yield kept[first:]
        words = []


def commands() -> Iterator[tuple[Block, list[str]]]:
    """The arguments of every call of the program that a page shows."""
    for block, line in lines():
        yield from ((block, words[1:]) for words in simple(line) if words[:1] == ["lineshaft"])


def test_commands_are_found_in_a_line() -> None:
    line = 'A=1 lineshaft explain --json > "a b" && cat x | lineshaft new-plugin c # not d'
    assert list(simple(line)) == [["lineshaft", "explain", "--json"], ["cat", "x"], ["lineshaft", "new-plugin", "c"]]
    assert list(simple("lineshaft conformance list --case 'L1/*' &")) == [
        ["lineshaft", "conformance", "list", "--case", "L1/*"],
        [],
    ]


def all_commands() -> dict[str, Any]:
    """Core's, and those of the suite."""
    return {**further_commands(), **COMMANDS}


@pytest.mark.parametrize("words", [words for _, words in commands()], ids=" ".join)
def test_every_command_line_is_valid(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        args = parser(all_commands()).parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if "config" in args:
        config = load_config(args.config and ROOT / args.config, {}, {"model": "m", **overrides(args)})
        check_backend_options(config)


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
            if get_origin(model) is dict:
                break  # a table whose keys are free
            assert key in model.model_fields, variable
            model = model.model_fields[key].annotation


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_every_configuration_is_valid(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(block.text)
    check_backend_options(load_config(file, {}, {}))


def check_backend_options(config: EngineConfig) -> None:
    """Raises where an installed backend does not have such options; what the pages make up is not installed."""
    if config.backend in {status.name for status in discover().status()}:
        validate_options(discover().named(config.backend), config.backend_options)


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.reason is None], ids=str)
def test_every_program_runs(block: Block, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs as it is shown, but on a model that is there and small, and in small steps where it does not say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "build", lambda tree: build({"scheduler": SMALL_STEPS, **tree}))
    text = MODEL.sub(repr(str(tiny_llama)), block.text)
    exec(compile(text, named(block.page), "exec"), {"__name__": "shown"})


def test_few_programs_are_not_run_and_all_say_why() -> None:
    reasons = [block.reason for block in blocks() if block.reason is not None]
    assert len(reasons) <= NOT_RUN
    assert all(reason and " " in reason for reason in reasons)


def test_no_block_has_other_words_after_its_language() -> None:
    assert [str(block) for block in blocks() if block.words and block.reason is None] == []


@pytest.mark.parametrize("block", blocks(excerpt=True), ids=lambda block: Path(block.title).name)
def test_every_excerpt_is_what_the_file_says(block: Block) -> None:
    folder, _, path = block.title.partition("/")
    new = {f"lineshaft-{name}": (name, kit) for name, kit in (("mychip", "torch"), ("myxla", "jax"))}
    written = render(*new[folder])[path] if folder in new else (ROOT / block.title).read_text(encoding="utf-8")
    assert block.text in written


def test_there_are_programs_and_excerpts_to_check() -> None:
    assert len(blocks("python")) >= 4
    assert len(blocks(excerpt=True)) >= 6
