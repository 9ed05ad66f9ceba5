"""The lane of torch_neuronx.trace, against the vendor's recorded signatures: caches that programs share stay right
whether the vendor keeps the tensors it is given or not, and what a compiler without side effects loses is not lost."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.neuron_plugin.fake_neuronx import SIGNATURES, FakeNeuronx, Traced
from torch import fx

from lineshaft.errors import BackendUnavailable, ContractViolation, Unsupported
from lineshaft_neuron.trace_lane import TraceLane, functional, outputs_of, refuse_collectives

PAGES, PAGE, WIDTH = 4, 2, 3
CPU = torch.device("cpu")
Program = Callable[..., tuple[torch.Tensor, ...]]


def step(
    x: torch.Tensor, slots: torch.Tensor, ignored: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Writes both caches, one through a view, and reads what it wrote. x [T, W], slots [T], w [W, W], k and v
    [pages, page, W]."""
    k.view(-1, WIDTH).index_copy_(0, slots, x @ w)
    v.flatten(0, 1).index_copy_(0, slots, x + 1)
    ramp = torch.arange(k.shape[0] * k.shape[1], device=x.device, dtype=x.dtype)
    return (x @ (k.view(-1, WIDTH) * ramp[:, None]).sum(0), v.sum((0, 1)))


STEP = ("x", "slots", "ignored", "w", "k", "v")
WRITTEN = (4, 5)


def session() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w, k and v."""
    generator = torch.Generator().manual_seed(5)
    w, k, v = (torch.rand(shape, generator=generator) for shape in ((WIDTH, WIDTH), *((PAGES, PAGE, WIDTH),) * 2))
    return w, k, v


def inputs(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, slots and an input that no program reads."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(PAGES * PAGE, generator=generator)[:tokens]
    return torch.rand(tokens, WIDTH, generator=generator), slots, torch.zeros(7)


def graph(function: Program = step) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def lane(neuronx: FakeNeuronx, **more: Any) -> TraceLane:
    return TraceLane(neuronx.module(), CPU, **more)


@pytest.fixture(params=[False, True], ids=["keeps the tensors", "has its own"])
def neuronx(request: pytest.FixtureRequest) -> FakeNeuronx:
    return FakeNeuronx(own_state=request.param)


# ---- the recorded package --------------------------------------------------------------------------------------------


def test_the_fakes_have_the_recorded_signatures() -> None:
    found = {
        name: str(inspect.signature(entry)) for name, entry in vars(FakeNeuronx().module()).items() if callable(entry)
    }
    assert found == SIGNATURES


def test_the_fake_loses_what_is_changed_in_place_and_not_aliased() -> None:
    """So that a lane which forgot an alias would be seen to."""
    x, slots, ignored = inputs(2, 0)
    w, k, v = session()
    before = k.clone()
    traced = Traced(graph(), (x, slots, ignored, w, k, v), {}, own=False)
    traced(x, slots, ignored, w, k, v)
    assert torch.equal(k, before)


def test_every_call_of_the_package_is_by_the_signature_and_places_the_program_on_its_core(neuronx: FakeNeuronx) -> None:
    made = lane(neuronx, flags=["--optlevel", "1"], core=3)
    w, k, v = session()
    made.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
    (call,) = neuronx.calls
    assert call["args"] == 0 and call["compiler_args"] == ["--optlevel", "1"]
    assert list(call["aliases"].values()) == [2, 3] and neuronx.traced[0].core == 3
    lane(neuronx).compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
    assert neuronx.calls[1]["compiler_args"] is None


# ---- programs --------------------------------------------------------------------------------------------------------


def test_programs_of_one_session_share_its_caches(neuronx: FakeNeuronx) -> None:
    """Two buckets in turn, against the same function run eagerly; between them the session writes a cache itself."""
    made = lane(neuronx)
    w, k, v = session()
    wanted_k, wanted_v = k.clone(), v.clone()
    programs = {size: made.compile(graph(), (*inputs(size, 0), w, k, v), WRITTEN) for size in (4, 1)}
    assert torch.equal(k, wanted_k) and torch.equal(v, wanted_v)  # compiling has changed nothing
    for turn, size in enumerate((4, 1, 1, 4, 1)):
        given = inputs(size, 10 + turn)
        wanted = step(*given, w, wanted_k, wanted_v)
        found = programs[size](*given, w, k, v)
        assert len(found) == 2
        for one, other in zip((*found, k, v), (*wanted, wanted_k, wanted_v), strict=True):
            torch.testing.assert_close(one, other)
        for cache in (k, wanted_k):
            cache[turn % PAGES] = turn
    assert made.counts.compiled == 2 == len(neuronx.traced) and made.counts.cached == 0


def test_new_weights_need_no_new_program(neuronx: FakeNeuronx) -> None:
    made = lane(neuronx)
    w, k, v = session()
    program = made.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
    w.copy_(torch.eye(WIDTH))
    given = inputs(2, 1)
    wanted = step(*given, w, k.clone(), v.clone())
    torch.testing.assert_close(list(program(*given, w, k, v)), list(wanted))
    assert made.counts.compiled == 1


def test_the_caches_are_copied_where_the_vendor_keeps_others_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    w, k, v = session()
    with caplog.at_level(logging.WARNING):
        shared = lane(FakeNeuronx(own_state=False))
        program = shared.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
        assert not program.copies and shared.copying == 0 and not caplog.records  # type: ignore[attr-defined]
        own = lane(FakeNeuronx(own_state=True))
        assert own.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN).copies  # type: ignore[attr-defined]
    (told,) = caplog.records
    assert (
        own.copying == 1 and "copies them in and out at every call" in told.message and "float32[2, 3]" in told.message
    )


def test_an_input_that_no_program_reads_is_not_traced(neuronx: FakeNeuronx) -> None:
    w, k, v = session()
    lane(neuronx).compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
    assert [shape for shape, _ in neuronx.traced[0].shapes] == [(2, WIDTH), (2,), (WIDTH, WIDTH)]


def test_a_program_that_writes_nothing_has_no_state(neuronx: FakeNeuronx) -> None:
    def double(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2,)

    made = lane(neuronx)
    program = made.compile(graph(double), (torch.ones(3),), ())
    assert torch.equal(program(torch.full((3,), 4.0))[0], torch.full((3,), 8.0)) and made.copying == 0
    assert neuronx.calls[0]["aliases"] == {}


def test_a_cache_in_bfloat16_and_one_of_integers_stay_what_they_are(neuronx: FakeNeuronx) -> None:
    def write(x: torch.Tensor, at: torch.Tensor, k: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k.index_copy_(0, at.long(), x)
        n.index_add_(0, at.long(), torch.ones_like(at))
        return (k.float().sum(),)

    k, n = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
    x, at = torch.full((2,), 0.5, dtype=torch.bfloat16), torch.tensor([1, 3], dtype=torch.int32)
    program = lane(neuronx).compile(graph(write), (x, at, k, n), (2, 3))
    for _ in range(2):
        (total,) = program(x, at, k, n)
    assert total == 1 and k.tolist() == [0, 0.5, 0, 0.5] and n.tolist() == [0, 2, 0, 2]


def test_constants_of_a_graph_follow_its_inputs(neuronx: FakeNeuronx) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x * self.scale,)

    program = lane(neuronx).compile(fx.symbolic_trace(Scaled()), (torch.ones(2),), ())
    assert program(torch.ones(2))[0].tolist() == [2, 3]


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_a_functional_graph_changes_nothing_and_returns_what_was_written() -> None:
    w, k, v = session()
    given = inputs(3, 2)
    before = k.clone(), v.clone()
    made = functional(graph(), (*given, w, k, v), WRITTEN)
    assert len(outputs_of(made)) == 4
    assert not [node for node in made.graph.nodes if node.op == "call_function" and node.target._schema.is_mutable]
    assert torch.ops.aten.clone.default not in {node.target for node in made.graph.nodes}  # caches are not copied
    found = made(*given, w, k, v)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    wanted = [*step(*given, w, *before), *before]
    torch.testing.assert_close(list(found), wanted)


def test_a_write_to_what_is_no_cache_is_refused() -> None:
    w, k, v = session()
    with pytest.raises(ContractViolation, match="writes to its placeholder 5, which is not a cache"):
        functional(graph(), (*inputs(2, 0), w, k, v), (4,))


def test_a_graph_in_which_ranks_meet_is_refused() -> None:
    def meet(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ops._c10d_functional.all_reduce(x, "sum", "0"),)

    with pytest.raises(
        Unsupported, match=r"_c10d_functional\.all_reduce.*compiles for one core; set cp, ep and tp to 1"
    ):
        refuse_collectives(graph(meet))
    refuse_collectives(graph())


# ---- the session's life ----------------------------------------------------------------------------------------------


def test_nothing_compiles_after_warm_up(neuronx: FakeNeuronx) -> None:
    made = lane(neuronx)
    w, k, v = session()
    program = made.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
    made.seal()
    with pytest.raises(ContractViolation, match=r"compiled after warm-up, for float32\[3, 3\].*1 more"):
        made.compile(graph(), (*inputs(3, 0), w, *session()[1:], torch.zeros(1)), WRITTEN)
    program(*inputs(2, 1), w, k, v)
    made.unseal()
    made.compile(graph(), (*inputs(3, 0), w, k, v), WRITTEN)
    assert made.counts.compiled == 2 and len(neuronx.calls) == 2


def test_a_closed_lane_runs_and_compiles_nothing(neuronx: FakeNeuronx) -> None:
    made = lane(neuronx)
    w, k, v = session()
    program = made.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
    made.close()
    made.close()
    with pytest.raises(ContractViolation, match="after its lane was closed"):
        program(*inputs(2, 1), w, k, v)
    with pytest.raises(ContractViolation, match="compiled after warm-up"):
        made.compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)


def test_a_compiler_that_fails_is_told_with_the_program(neuronx: FakeNeuronx) -> None:
    neuronx.fault = "neuronx-cc: [ERROR]\n NCC_EARG001 unsupported operator"
    w, k, v = session()
    what = r"failed for float32\[2, 3\], int64\[2\].*RuntimeError: neuronx-cc: \[ERROR\] NCC_EARG001.*compiler_flags"
    with pytest.raises(BackendUnavailable, match=what):
        lane(neuronx).compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)


def test_a_package_that_keeps_other_state_is_not_known() -> None:
    class Other(FakeNeuronx):
        def module(self) -> Any:
            module = super().module()
            module.move_trace_to_device = lambda trace, device_id: setattr(trace, "states", torch.nn.ParameterList())
            return module

    w, k, v = session()
    with pytest.raises(
        BackendUnavailable, match=r"keeps as state nothing, and input_output_aliases names float32\[4, 2"
    ):
        lane(Other()).compile(graph(), (*inputs(2, 0), w, k, v), WRITTEN)
