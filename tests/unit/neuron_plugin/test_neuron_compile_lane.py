"""The lane of torch.compile: one program for each shape, typed refusals, and what the vendor's cache has had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.neuron_plugin.static_sessions import capture, giving, started
from torch import fx

from lineshaft.errors import BackendUnavailable, ContractViolation
from lineshaft_neuron import stand_in
from lineshaft_neuron.caching import CompileCache
from lineshaft_neuron.compile_lane import CompileLane
from lineshaft_neuron.stand_in import StandInCompiler


def graph(function: Callable[..., Any] = lambda x: (x * 2,)) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype).to("neuron")


# ---- one program for each shape --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(2, 6), (4, 5), (4,), (4, 6, 1), (6, 4)])
def test_a_call_with_another_shape_is_refused_and_compiles_nothing(device: torch.device, other: Any) -> None:
    lane, before = CompileLane(device), stand_in.compiler().counts.compiled
    run = lane.compile(graph(), [x(4, 6)], ())
    with pytest.raises(ContractViolation, match=r"was called with float32\[.*one of the buckets"):
        run(x(*other))
    assert torch.equal(run(x(4, 6))[0].cpu(), torch.full((4, 6), 2.0))
    assert lane.counts.compiled == 1 and stand_in.compiler().counts.compiled == before + 1


def test_a_call_with_another_dtype_or_order_of_values_is_refused(device: torch.device) -> None:
    run = CompileLane(device).compile(graph(), [x(4, 4)], ())
    with pytest.raises(ContractViolation, match=r"was called with bfloat16\[4, 4\]"):
        run(x(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ContractViolation, match="or strides, for which it was not compiled"):
        run(x(4, 4).t())


def test_what_is_set_in_torch_around_a_program_changes_nothing(device: torch.device) -> None:
    lane, before = CompileLane(device), torch.get_num_threads()
    run = lane.compile(graph(lambda a, b: (a @ b + 0.1,)), [x(3, 3), x(3, 3)], ())
    given = torch.rand(3, 3).to("neuron")
    expected, count = run(given, given)[0].cpu(), stand_in.compiler().counts.compiled
    lane.seal()
    try:
        torch.set_num_threads(before + 1)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu"):
            assert torch.equal(run(given, given)[0].cpu(), expected)
        with torch.inference_mode():
            assert torch.equal(run(given, given)[0].cpu(), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(before)
    assert stand_in.compiler().counts.compiled == count


def test_programs_that_run_in_two_threads_leave_the_process_as_it_was(device: torch.device) -> None:
    run = CompileLane(device).compile(graph(), [x(4)], ())
    with ThreadPoolExecutor(2) as pool:
        assert all(outputs[0].shape == (4,) for outputs in pool.map(lambda _: run(x(4)), range(200)))
    assert torch.compile(lambda y: y + 1, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_what_dynamo_forgot_is_refused_once_the_lane_is_sealed(device: torch.device) -> None:
    lane = CompileLane(device)
    run = lane.compile(graph(), [x(4)], ())
    lane.seal()
    torch._dynamo.reset()
    with pytest.raises(ContractViolation, match="after warm-up"):
        run(x(4))


def test_what_a_program_writes_is_written_in_place_of_any_array_of_that_shape(device: torch.device) -> None:
    run = CompileLane(device).compile(graph(lambda cache, x: (cache.add_(x) * 1,)), [x(4), x(4)], (0,))
    other = torch.zeros(4, device=device)
    assert run(other, x(4))[0].cpu().tolist() == run(torch.zeros(4, device=device), x(4))[0].cpu().tolist() == [1] * 4
    assert other.cpu().tolist() == [1] * 4


def test_equal_graphs_of_two_lanes_are_two_programs(device: torch.device) -> None:
    one, other = CompileLane(device), CompileLane(device)
    programs = [lane.compile(graph(), [x(size)], ()) for lane in (one, other) for size in (3, 4)]
    assert [run(x(size))[0].shape[0] for run, size in zip(programs, (3, 4, 3, 4), strict=True)] == [3, 4, 3, 4]
    assert (one.counts.compiled, other.counts.compiled, one.counts.cached) == (2, 2, 0)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_once_sealed_nothing_compiles_until_it_is_unsealed(device: torch.device) -> None:
    lane = CompileLane(device)
    run = lane.compile(graph(), [x(4)], ())
    lane.seal()
    lane.seal()
    with pytest.raises(ContractViolation, match="after warm-up; thaw the session first"):
        lane.compile(graph(), [x(4)], ())
    assert run(x(4))[0].cpu().tolist() == [2] * 4 and lane.counts.compiled == 1
    lane.unseal()
    lane.compile(graph(), [x(4)], ())
    assert lane.counts.compiled == 2
    lane.close()
    lane.close()


def test_what_is_no_single_graph_is_refused_in_a_line(device: torch.device) -> None:
    broken = fx.Graph()
    place = broken.placeholder("x")
    broken.call_function(torch._dynamo.graph_break)
    broken.output((place,))
    lane = CompileLane(device)
    for made in (fx.GraphModule({}, broken), graph(lambda x: (x @ x,))):
        with pytest.raises(ContractViolation, match="a program is no single graph: ") as refused:
            lane.compile(made, [x(2, 3)], ())
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert lane.counts.compiled == 0


def test_a_failing_compiler_is_no_fault_of_the_program(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: StandInCompiler, *given: Any) -> Any:
        raise RuntimeError("neuronx-cc\n exited with status 70")

    lane = CompileLane(device)
    with monkeypatch.context() as patch:
        patch.setattr(StandInCompiler, "__call__", failing)
        with pytest.raises(
            BackendUnavailable,
            match=r"failed for float32\[2, 3\].*neuronx-cc exited with status 70.*set other compiler_flags",
        ):
            lane.compile(graph(), [x(2, 3)], ())
    assert lane.counts.compiled == 0
    assert lane.compile(graph(), [x(2, 3)], ())(x(2, 3))[0].shape == (2, 3)


# ---- the vendor's cache ----------------------------------------------------------------------------------------------


class Keeping:
    """A compiler that keeps what it compiles as files *.neff, as the vendor's does: at once, or in the background, so
    that a file is there only once the device was waited for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
        self.folder, self.background = folder, background
        self.pending: list[Path] = []
        inner, wait = StandInCompiler.__call__, type(torch.neuron).synchronize  # type: ignore[attr-defined]

        def compiling(compiler: StandInCompiler, given: fx.GraphModule, examples: Any) -> Any:
            made = inner(compiler, given, examples)
            self.keep(f"{given.code} {[(item.shape, item.dtype) for item in examples]}")
            return made

        def waiting(module: Any, device: Any = None) -> None:
            self.write()
            wait(module, device)

        monkeypatch.setattr(StandInCompiler, "__call__", compiling)
        monkeypatch.setattr(type(torch.neuron), "synchronize", waiting)  # type: ignore[attr-defined]

    def keep(self, text: str) -> None:
        self.pending.append(self.folder / hashlib.sha256(text.encode()).hexdigest() / "model.neff")
        if not self.background:
            self.write()

    def write(self) -> None:
        for path in self.pending:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"a program")
        self.pending.clear()


@pytest.mark.parametrize("background", [False, True])
def test_a_program_that_the_cache_had_is_counted(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    Keeping(tmp_path, monkeypatch, background)
    cache = CompileCache(tmp_path, "here")
    first, second = CompileLane(device, cache), CompileLane(device, cache)
    for size in (3, 4):
        first.compile(graph(), [x(size)], ())
    assert (first.counts.compiled, first.counts.cached) == (2, 0)
    for size in (3, 4, 5):
        second.compile(graph(), [x(size)], ())
    assert (second.counts.compiled, second.counts.cached) == (3, 2)
    assert (cache.hits, cache.misses) == (2, 3) and len(cache.programs()) == 3


def test_a_refused_program_is_counted_nowhere(device: torch.device, tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, "here")
    lane = CompileLane(device, cache)
    with pytest.raises(ContractViolation, match="use topk"):
        lane.compile(graph(lambda x: (x.sort()[0],)), [x(3)], ())
    assert (cache.hits, cache.misses, lane.counts.compiled) == (0, 0, 0)


def test_a_report_tells_that_nothing_had_to_be_compiled(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Keeping(tmp_path, monkeypatch, background=True)
    cached = []
    for _ in range(2):
        session = started()
        session.lane = CompileLane(device, CompileCache(tmp_path, "here"))
        doubling = giving(lambda x, arrays, weights: {"y": x * 2})
        cached += [capture(session, doubling, tokens=tokens).report.cached for tokens in (4, 2)]
        session.close()
    assert cached == [False, False, True, True]
