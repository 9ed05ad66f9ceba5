"""`lineshaft config show` and `lineshaft completion`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft.cli.main import COMMANDS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "engine.toml"
    path.write_text('model = "m"\nthreads = 1\n[cache]\npages = 7\n[backend_options]\nprogram = "tape"\n')
    monkeypatch.setenv("LINESHAFT_CACHE__PAGES", "8")
    monkeypatch.setenv("LINESHAFT_SEED", "3")
    monkeypatch.delenv("LINESHAFT_THREADS", raising=False)
    return str(path)


def test_each_value_comes_with_its_source(lineshaft_run: Run, file: str) -> None:
    status, out, _ = lineshaft_run("config", "show", "--config", file, "--json", "--tp", "2", "--set", "seed=4")
    found = {key: (item["value"], item["source"]) for key, item in json.loads(out).items()}
    assert status == 0
    assert found["model"] == ("m", f"file {file}")
    assert found["cache.pages"] == (8, "variable LINESHAFT_CACHE__PAGES")
    assert found["seed"] == (4, "option seed")
    assert found["layout.tp"] == (2, "option layout.tp")
    assert found["threads"] == (1, f"file {file}")
    assert found["backend_options.program"] == ("tape", f"file {file}")
    assert found["kernels"] == ({}, "default")
    assert found["max_model_len"] == (None, "default")
    assert found["scheduler.max_rows"][1] == "default"


def test_a_profile_is_a_source(lineshaft_run: Run, file: str) -> None:
    _, out, _ = lineshaft_run("config", "show", "--config", file, "--json", "--set", "profile=batch", "--set", "seed=4")
    found = {key: item["source"] for key, item in json.loads(out).items()}
    assert found["profile"] == "option profile"
    assert found["scheduler.max_rows"] == "profile batch"
    assert found["cache.pages"] == "variable LINESHAFT_CACHE__PAGES"


def test_a_table_and_what_was_given_alone(lineshaft_run: Run, file: str) -> None:
    _, out, _ = lineshaft_run("config", "show", "--config", file, "--given")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["KEY", "VALUE", "SOURCE"]
    assert {row[0] for row in rows[1:]} == {"model", "threads", "cache.pages", "seed", "backend_options.program"}
    assert ["cache.pages", "8", "variable", "LINESHAFT_CACHE__PAGES"] in rows
    assert len(lineshaft_run("config", "show")[1].splitlines()) > 20  # a model is not needed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "cache.pagse=1"], "UnknownKey: unknown key cache.pagse"),
        (["--set", "cache.pages=1"], "InvalidValue: cache.pages = '1' (from option cache.pages)"),
        (["--config", "/"], "ConfigError: cannot read the file /: Is a directory"),
        (["--config", "/nowhere.toml"], "ConfigError: cannot read the file /nowhere.toml"),
    ],
)
def test_what_is_wrong_is_one_line(lineshaft_run: Run, options: list[str], words: str) -> None:
    status, out, err = lineshaft_run("config", "show", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_one_that_the_shell_reads(lineshaft_run: Run, tmp_path: Path, shell: str) -> None:
    status, out, _ = lineshaft_run("completion", shell)
    assert status == 0
    assert all(name in out for name in COMMANDS)
    assert "max-tokens" in out
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_bash_completes_commands_and_options(lineshaft_run: Run, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(lineshaft_run("completion", "bash")[1])

    def completed(*words: str) -> set[str]:
        given = " ".join(f'"{word}"' for word in words)
        code = f'source {tmp_path}/script; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; COMP_TYPE=9; COMP_KEY=9; COMP_LINE="{" ".join(words)}"; COMP_POINT=${{#COMP_LINE}}; f=$(complete -p lineshaft | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $f; printf "%s\\n" "${{COMPREPLY[@]}}"'  # noqa: E501
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("lineshaft", "ge") == {"generate"}
    assert completed("lineshaft", "generate", "--max") == {"--max-tokens"}
    assert completed("lineshaft", "config", "") >= {"show"}


def test_another_shell_is_refused(lineshaft_run: Run) -> None:
    assert lineshaft_run("completion", "elvish")[0] == 2
