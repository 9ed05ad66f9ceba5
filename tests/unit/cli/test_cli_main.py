"""Exit statuses and one-line errors of the command line, with an engine that is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lineshaft.cli import backends
from lineshaft.cli.generate import read_prompts
from lineshaft.cli.main import main
from lineshaft.errors import InvalidValue, LineshaftError, OutOfMemory


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def python(code: str, **more: Any) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["dance"],
        [],
        ["generate", "--prompt", "x"],
        ["generate", "--prompt", "x", "--model", "m", "--threads", "many"],
        ["generate", "--prompt", "x", "--model", "m", "--set", "cache.pages"],
        ["generate", "--prompt", "x", "--model", "m", "--max-tokens", "0"],
        ["generate", "--prompt", "x", "--model", "m", "--temperature", "nan"],
        ["generate", "--prompt", "x", "--config", "absent.toml"],
        ["generate", "--prompt", "x", "--model", "m", "--max", "3"],
        ["explain", "--model", "m", "--backend-option", "=3"],
        ["generate", "--prompt-ids=--", "--model", "m"],
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("lineshaft: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_verbose_stands_before_or_after_a_command_and_its_own(capsys: pytest.CaptureFixture[str], place: int) -> None:
    arguments = ["config", "show", "--config", "absent.toml"]
    assert "Traceback" not in run(capsys, *arguments)[2]
    status, _, err = run(capsys, *arguments[:place], "-v", *arguments[place:])
    assert status == 2 and "Traceback" in err


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "explain", "-v", "--model", "m", "--tp", "x")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("lineshaft: error: InvalidValue: layout.tp = 'x'")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OutOfMemory("too\n  big"), 2, "lineshaft: error: OutOfMemory: too big"),
        (LineshaftError("x"), 2, "lineshaft: error: LineshaftError: x"),
        (MemoryError(), 2, "lineshaft: error: OutOfMemory: the host has no memory left"),
        (KeyboardInterrupt(), 130, "lineshaft: interrupted"),
    ],
)
def test_failures_of_a_command(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(backends, "run", fail)
    got, _, err = run(capsys, "backends")
    assert got == status
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(backends, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["backends"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = """
from lineshaft.cli import backends, main
def endless(args):
    while True:
        print("x" * 100)
backends.run = endless
sys.exit(main.main(["backends"]))
"""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_help_imports_nothing_heavy() -> None:
    done = python(
        "from lineshaft.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'numpy', 'pydantic', 'torch', 'pluggy'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "generate" in done.stdout


def test_backends_lists_every_backend_and_imports_no_tensor_library(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "backends", "--json")
    listed = json.loads(out)
    assert status == 0
    names = [backend["name"] for backend in listed["backends"]]
    assert "numpy" in names
    assert all(backend["kind"] in {"reference", "host", "accelerator"} for backend in listed["backends"])
    status, out, _ = run(capsys, "backends")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]][: len(names)] == names
    done = python("from lineshaft.cli.main import main; main(['backends']); print('torch' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False"


def test_generate_streams_to_stdout_and_sums_up_on_stderr(
    capsys: pytest.CaptureFixture[str], fake: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text('model = "m"\nseed = 4\n[sampling]\ntop_k = 5\nmax_tokens = 9\n')
    arguments = [
        "--config",
        str(tmp_path / "c.toml"),
        "--max-tokens",
        "3",
        "--temperature",
        "0",
        "--stop",
        "s",
        "--raw",
    ]
    status, out, err = run(capsys, "generate", "--prompt", "hello", *arguments, "--tp", "2", "--set", "cache.pages=8")
    assert (status, out) == (0, "one two\n")
    assert "the plan" in err
    assert "finish reason: length\n" in err
    assert "TTFT 500.0 ms" in err
    params, config = fake["params"], fake["config"]
    assert (params.max_tokens, params.temperature, params.top_k, tuple(params.stop)) == (3, 0.0, 5, ("s",))
    assert (config.layout.tp, config.cache.pages, config.seed) == (2, 8, 4)
    assert (fake["prompt"], fake["chat"], fake["closed"]) == ("hello", False, True)


def test_several_prompts_are_one_batch_in_order(capsys: pytest.CaptureFixture[str], fake: dict[str, Any]) -> None:
    status, out, err = run(capsys, "generate", "--prompt", "a", "--prompt", "b", "--model", "m", "--quiet")
    texts = [line for line in out.splitlines() if not line.startswith("  ")]
    assert (status, texts, err) == (0, ["[1] 'a'", "whole", "[2] 'b'", "whole"], "")
    assert (fake["prompts"], fake["raw"], fake["progress"]) == (["a", "b"], False, False)
    _, out, _ = run(capsys, "generate", "--prompt", "a", "--no-stream", "--raw", "--model", "m")
    assert out.splitlines()[0] == "whole"
    assert (fake["prompts"], fake["raw"], fake["progress"]) == (["a"], True, True)
    _, _, err = run(capsys, "generate", "--prompt", "a", "--prompt", "b", "--model", "m")
    assert "finish reason: [1] stop, [2] length\n" in err


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str], fake: dict[str, Any]) -> None:
    status, out, err = run(capsys, "generate", "--prompt", "a", "--prompt", "b", "--model", "m", "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert (status, err, set(found)) == (0, "", {"outputs", "run", "plan"})
    first, second = found["outputs"]
    assert (first["prompt"], first["text"], first["token_ids"], first["finish_reason"]) == ("a", "whole", [1], "stop")
    assert (second["prompt"], second["finish_reason"]) == ("b", "length")
    assert first["logprobs"][0]["1"] == {"logprob": -0.5, "rank": 1, "decoded_token": "a"}
    assert first["logprobs"][0]["2"]["logprob"] is None
    assert (first["metrics"]["ttft_s"], first["metrics"]["tpot_s"]) == (0.5, 0.01)
    assert (found["run"]["tokens_per_s"], found["run"]["kernel_ms_per_decode_step"]) == (9.0, None)
    assert found["plan"] == "abc"


def test_an_interrupted_run_closes_the_engine(capsys: pytest.CaptureFixture[str], fake: dict[str, Any]) -> None:
    status, _, err = run(capsys, "generate", "--prompt", "stop me", "--model", "m")
    assert (status, err) == (130, "lineshaft: interrupted\n")
    assert fake["closed"]


def test_a_dash_reads_the_prompt_from_stdin(
    capsys: pytest.CaptureFixture[str], fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: "from stdin"))
    assert run(capsys, "generate", "--prompt", "-", "--model", "m", "--quiet")[0] == 0
    assert fake["prompt"] == "from stdin"


def test_two_dashes_are_a_text_like_any_other(capsys: pytest.CaptureFixture[str], fake: dict[str, Any]) -> None:
    assert run(capsys, "generate", "--prompt=--", "--model", "m", "--quiet")[0] == 0
    assert fake["prompt"] == "--"


@pytest.mark.parametrize(
    ("prompts", "said"), [(("-", "-"), "stdin can be read once"), (("caf\udce9",), "the text is not UTF-8")]
)
def test_prompts_that_cannot_be_had_are_refused(prompts: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        read_prompts(prompts)
