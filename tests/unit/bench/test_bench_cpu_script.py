"""`benchmarks/cpu.py`: what it keeps of a run, and where."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from lineshaft.registry import discover
from lineshaft_bench.bounds import Bounds
from lineshaft_bench.figures import Ran
from lineshaft_bench.measure import Comparison, Measured
from lineshaft_bench.peers.client import OURS
from lineshaft_bench.simulator.model import model_figures
from lineshaft_bench.workloads import Job
from lineshaft_cpu import native

FILE = Path(__file__).parents[3] / "benchmarks" / "cpu.py"
SHAPE = "hidden=64,layers=2,heads=4,intermediate=128,vocab=256"
FACTS = {"kv_most": 0.5, "kv_mean": 0.25, "host_ms_per_step": 1.0, "kernel_ms_per_step": 2.0, "preemptions": 0}


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_benchmark", FILE)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def comparison(args: Namespace) -> list[Comparison]:
    ran = Ran([Job([1, 2], 2)], [[0.1, 0.2]])
    measured = Measured({"version": "1", "precision": args.backend}, [ran.figures()], [ran], 10**9, FACTS)
    bounds = [Bounds(1e9, 1e12, "bfloat16", "by hand", 2)]
    return [Comparison("single", {OURS: measured}, bounds, [ran.figures()], model_figures(SHAPE, discover([])))]


def test_a_run_is_told_kept_and_drawn(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot, results = tmp_path / "p.svg", tmp_path / "results"
    monkeypatch.setattr(script.bench, "compare", comparison)
    given = ["--model", str(tmp_path / "small"), "--results", str(results), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["cpu.py", *given, "--set", "quantization=int8"])
    script.main()
    said = capsys.readouterr().out
    assert "2 threads of" in said and "TPOT, ms" in said and plot.stat().st_size > 5000
    (file,) = results.iterdir()
    kept = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    assert kept["config"] == {"model": "small", "backend": "cpu", "threads": 2, "quantization": "int8"}
    assert kept["found"][0]["bounds"][0]["read_bytes_per_s"] == 1e9
    assert kept["found"][0]["engines"][OURS]["rounds"][0]["tpot_ms"] == pytest.approx(100)


def test_a_record_is_named_by_day_processor_and_level(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"cpu": "Intel(R) Xeon(R) Platinum 8488C @ 2.40GHz", "native": "amx"}
    monkeypatch.setattr(native, "reason", lambda: None)
    assert script.file_name("2026-01-02", about) == "2026-01-02-intel-xeon-platinum-8488c-2-40ghz-amx.json"
    monkeypatch.setattr(native, "reason", lambda: "no compiler")
    assert script.file_name("2026-01-02", about).endswith("-none.json")
