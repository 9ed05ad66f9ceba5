"""`benchmarks/gpu.py` where there is no GPU: its dry run goes through every part and claims nothing, and nothing else
runs; what cannot be done is said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lineshaft.plan import Resolver
from lineshaft_contract.backends import World
from lineshaft_contract.problems import LinearProblem
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
NOTHING = "nothing was executed on a GPU"
STARTED = {"device": "none", "peak": None, "backend": SimpleNamespace(target=SimpleNamespace(name="sm90"))}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_a_dry_run_goes_through_all_of_it_and_says_in_every_line_that_it_is_one(tmp_path: Path) -> None:
    before = os.times()
    done = run("--backend", "cuda", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 60
    assert all(NOTHING in line for line in done.stdout.splitlines())
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry_run"] and {row["section"] for row in found["rows"]} == {
        "conformance", "attention", "gemm", "graphs", "models",
    }  # fmt: skip
    assert not [row for row in found["rows"] if "failed" in row]
    assert all(NOTHING in row["evidence"] for row in [*found["rows"], *found["bars"]])
    assert {bar["verdict"] for bar in found["bars"]} == {"not executed"}
    kernels = {row["kernel"] for row in found["rows"] if "kernel" in row}
    assert {"triton_attend_decode", "triton_attend_chunk", "torch SDPA, dense", "triton_linear_few"} <= kernels
    assert {row["program"] for row in found["rows"] if row["section"] == "graphs"} == {"eager", "tape", "graph"}
    text = (tmp_path / "gpu.md").read_text()
    told = [line for line in text.splitlines() if line and not line.startswith(("|---", "| what", "| bar"))]
    assert all(NOTHING in line for line in told)
    assert "torch" in found["versions"] and found["date"].endswith("UTC")
    figures = {"us", "GB/s", "TFLOP/s", "of peak", "TPOT ms", "host ms a step", "tokens/s"}
    measured = [row[name] for row in found["rows"] for name in figures & row.keys()]
    assert measured and set(measured) == {None} and found["peak"] is None
    assert "us - | GB/s - | of peak - |" in done.stdout and "None" not in done.stdout + text


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="has a GPU")
def test_without_a_gpu_and_without_the_word_it_fails() -> None:
    done = run("--backend", "cuda", "--only", "gemm")
    assert done.returncode == 2
    assert "BackendUnavailable" in done.stderr and "no NVIDIA GPU" in done.stderr


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--dry-run", "--out", str(tmp_path / "file" / "gpu"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: InvalidValue: --out") and "Not a directory" in line


@pytest.mark.parametrize("package", ["lineshaft_bench", "lineshaft_conformance", "torch"])
def test_a_package_that_is_missing_is_named_with_what_to_install(package: str) -> None:
    hidden = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[1:] = ['--help']; "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"{hidden}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert package in line and "./conformance ./bench" in line


@pytest.fixture(scope="module")
def script() -> Any:
    spec = spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec and spec.loader
    sys.modules["gpu_benchmark"] = made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_bar_of_products_is_what_the_plan_takes_and_not_the_best_there_is(script: Any) -> None:
    def row(kernel: str, us: float, planned: bool) -> dict[str, Any]:
        return {"section": "gemm", "what": "m=1", "kernel": kernel, "us": us, "planned": planned}

    slow = [row("cublas_linear", 1.0, False), row("triton_linear_few", 100.0, True)]
    assert script.product_shares(slow) == (0.01, 0.01)
    assert script.product_shares([row("cublas_linear", 1.0, True), slow[1] | {"planned": False}]) == (1.0, 0.01)
    failed = {"section": "gemm", "what": "m=1 triton_linear_few", "failed": "no"}
    assert script.product_shares([slow[0], failed]) == (0.0, None)


def test_what_a_plan_takes_is_measured(script: Any) -> None:
    backend = create(CpuOptions(), World(threads=1))
    problem = LinearProblem(dtype="bfloat16", m=8, n=64, k=64)
    fast = next(k for k in backend.kernels() if k.op == "linear" and k.supports(problem) is None)

    def slow(problem: Any, session: Any) -> Any:
        bound = fast.bind(problem, session)

        def repeated(*args: Any, **named: Any) -> Any:
            return [bound(*args, **named) for _ in range(50)][-1]

        return repeated

    kernels = [replace(fast, name="a_slow", bind=slow, tunable=True), replace(fast, name="b_fast", tunable=True)]
    run = SimpleNamespace(resolver=Resolver("cpu", kernels, {}), backend=backend)
    assert script.planned(run, problem) == "b_fast"


def test_what_was_measured_before_a_failure_is_kept(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def failing(run: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(script, "graphs", failing)
    arguments = ["--dry-run", "--only", "gemm", "--only", "graphs", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(script, "gemm", lambda run: run.add("gemm", "m=1", kernel="k", planned=True, us=1.0))
    monkeypatch.setattr(script.Run, "start", lambda run: vars(run).update(STARTED))
    assert script.main() == 2
    assert [row["section"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == ["gemm"]
