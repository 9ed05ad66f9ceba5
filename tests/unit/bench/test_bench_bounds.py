"""The machine's bounds: by native loops where these are, else by what is there, and what they make of figures."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lineshaft.registry import discover
from lineshaft_bench.bounds import Bounds, Loops
from lineshaft_bench.figures import Ran
from lineshaft_bench.measure import BOUND, Comparison, Measured
from lineshaft_bench.peers import machine
from lineshaft_bench.peers.client import OURS
from lineshaft_bench.peers.machine import gemm, loops, native_loops
from lineshaft_bench.report import headlines, shown
from lineshaft_bench.simulator.model import model_figures
from lineshaft_bench.stats import Spread
from lineshaft_bench.workloads import Job
from lineshaft_cpu import native

SHAPE = "hidden=64,layers=2,heads=4,intermediate=128,vocab=256"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "MOST_BYTES", 1 << 22)
    monkeypatch.setattr(machine, "GEMM", (16, 32, 32))
    monkeypatch.setattr(machine, "ARITHMETIC_S", 1e-4)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lineshaft_cpu", None)


@pytest.mark.usefixtures("small")
def test_native_loops_measure_where_the_library_is() -> None:
    found = loops(2, "bfloat16", size=3 << 20).measure()
    assert found.library.startswith(f"native {native.load().level}, ")
    assert (found.dtype, found.threads) == ("bfloat16", 2)
    assert found.read_bytes_per_s > 0 and found.flops_per_s > 0


@pytest.mark.usefixtures("small")
def test_quantized_inputs_are_bounded_by_arithmetic_on_codes() -> None:
    assert loops(1, "bfloat16", "w8a8_int8").dtype == "int8"
    assert loops(1, "bfloat16", "int8").dtype == "bfloat16"


@pytest.mark.usefixtures("small", "no_native")
@pytest.mark.parametrize(("library", "said"), [("", "numpy in float32"), ("torch", "torch")])
def test_without_native_loops_the_engines_library_computes(library: str, said: str) -> None:
    found = loops(2, "bfloat16", "w8a8_int8", library=library).measure()
    assert (found.dtype, found.library, found.threads) == ("bfloat16", said, 2)
    assert found.read_bytes_per_s > 0 and found.flops_per_s > 0


@pytest.mark.usefixtures("small")
def test_a_dtype_that_no_loop_has_is_left_to_the_library() -> None:
    assert native_loops(1, "float16", np.ones(1 << 20, np.uint8)) is None
    assert loops(1, "float16").library == "numpy in float32"


def test_a_product_is_computed_in_the_dtype_that_is_asked_for(small: None) -> None:
    torch = pytest.importorskip("torch")
    product, _ = gemm(1, "bfloat16", "torch")
    assert product().dtype == torch.bfloat16  # type: ignore[attr-defined]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("asked", "size"), [(0, 1 << 20), (3 << 20, 3 << 20), (1 << 50, 1 << 22)])
def test_what_is_read_is_neither_too_little_nor_too_much(asked: int, size: int) -> None:
    assert loops(1, "float32", size=asked).size == size


def test_a_bound_is_the_median_of_runs_that_take_turns() -> None:
    order: list[str] = []
    seconds, rates = iter([1, 9, 2, 8, 4, 7, 3]), iter([5, 50, 10, 40, 20, 30, 25])

    def read() -> float:
        order.append("read")
        return next(seconds)

    def compute() -> float:
        order.append("compute")
        return next(rates)

    found = Loops(80, read, compute, "float32", "by hand", 1).measure()
    assert found == Bounds(80 / 4, 25, "float32", "by hand", 1)
    assert order == ["read", "compute"] * 7


# ---- comparisons -----------------------------------------------------------------------------------------------------

FACTS = {"kv_most": 0.5, "kv_mean": 0.25, "host_ms_per_step": 1.0, "kernel_ms_per_step": 2.0, "preemptions": 0}


def ran(step: float) -> Ran:
    """A request of 3 tokens, one every `step` seconds."""
    return Ran([Job([1, 2], 3)], [[step, 2 * step, 3 * step]])


def measured(*steps: float) -> Measured:
    rounds = [ran(step) for step in steps]
    return Measured({"version": "1", "precision": "x"}, [each.figures() for each in rounds], rounds, 10**9, FACTS)


def compared(workload: str = "single") -> Comparison:
    """Three rounds, in the last of which the machine is half as fast, and so is everyone."""
    model = model_figures(SHAPE, discover([]))
    rates = [Bounds(1e6 * rate, 1e9 * rate, "bfloat16", "by hand", 2) for rate in (1.0, 1.1, 0.5)]
    engines = {OURS: measured(0.2, 0.2, 0.4), "slow": measured(0.4, 0.3, 0.8), "quick": measured(0.1, 0.2, 0.2)}
    return Comparison(workload, engines, rates, [ran(step).figures() for step in (0.1, 0.1, 0.2)], model)


def test_ratios_are_of_the_same_round() -> None:
    found = compared()
    assert found.ratio("tpot_ms", BOUND) == Spread(*map(pytest.approx, (2.0, 2.0, 2.0)))  # type: ignore[arg-type]
    assert found.ratio("tpot_ms", "quick") == Spread(*map(pytest.approx, (2.0, 1.0, 2.0)))  # type: ignore[arg-type]
    assert found.ratio("nothing", "quick") is None


def test_the_best_peer_is_the_quickest_or_the_one_with_most() -> None:
    found = compared()
    assert found.best_peer("tpot_ms") == found.best_peer("output_tokens_per_s") == "quick"
    assert Comparison("single", {OURS: measured(0.1)}, [], [], found.model).best_peer("tpot_ms") is None


def test_a_request_alone_is_held_against_its_rounds_read() -> None:
    found = compared()
    read = found.model.dense_bytes / 1e6
    share = found.over_bounds(OURS)
    assert share.keys() == {"tpot_over_read"}
    assert share["tpot_over_read"].median == pytest.approx(0.2 / read)
    assert share["tpot_over_read"].high == pytest.approx(0.22 / read)


def test_a_prompt_alone_is_held_against_its_rounds_peak() -> None:
    found = compared()
    prompt = Ran([Job([1] * 50, 1)], [[0.25]])
    engines = {OURS: Measured({}, [prompt.figures()], [prompt])}
    share = Comparison("prefill", engines, found.bounds[:1], found.bound[:1], found.model).over_bounds(OURS)
    assert share.keys() == {"share_of_peak"}
    assert share["share_of_peak"].median == pytest.approx(found.model.prompt_flops(50) / 0.25 / 1e9)


def test_requests_together_have_no_such_share() -> None:
    found, both = compared(), Ran([Job([1], 2), Job([2], 2)], [[0.1, 0.2], [0.1, 0.2]])
    engines = {OURS: Measured({}, [both.figures()], [both])}
    assert Comparison("shared", engines, found.bounds[:1], found.bound[:1], found.model).over_bounds(OURS) == {}


def test_a_table_tells_the_best_peer_the_bounds_and_spreads() -> None:
    text = shown(compared())
    assert "TPOT, ms, the best peer: quick over lineshaft 0.5 [0.5, 1]; above 1 ours is better" in text
    assert "reads 0.001 [0.0005, 0.0011] GB/s" in text and "(by hand)" in text
    assert "TPOT over the read of a token's weights" in text and "200 [200, 400]" in text
    assert "output tokens/s, the best peer: lineshaft over quick 0.5 [0.5, 1]" in shown(compared("offline"))


def test_the_headline_of_a_workload_is_drawn_with_its_spread() -> None:
    (panel,) = headlines([compared()])
    assert panel.values[OURS][""] == pytest.approx(200) and panel.values[BOUND][""] == pytest.approx(100)
    assert panel.spans[OURS][""] == (pytest.approx(200), pytest.approx(400))  # type: ignore[union-attr]
