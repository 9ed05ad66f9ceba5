"""Programs on a device: graphs give what their tape gives, whatever the streams do and wherever the arena lies."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.torch_kit.layer import SHAPE, WIDTH, layer, layer_ops, layer_session, run_layer

from lineshaft.errors import ContractViolation, InvalidValue, OutOfMemory
from lineshaft_contract.problems import SampleProblem
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepShape, forward_inputs
from lineshaft_torch.bound import BoundKernel, recipe
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.recording import Survey
from lineshaft_torch.schedule import Fork, Join, Run

LAZY = [(), ("main",), ("side",), ("main", "side")]
ROWS = InputLayout([InputField("x", "float32", (4, WIDTH))])
PREFILL, DECODE = StepShape(4, 1, (), 1, 4), StepShape(4, 4, (), 4, 1)


def rows_step(seed: int) -> HostStep:
    host = HostStep(ROWS)
    host["x"][:] = np.random.default_rng(seed).standard_normal((4, WIDTH))
    return host


def chain(length: int) -> Any:
    """x -> x * 2^length by sums, with an arena of as many results as live together."""

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        values = [ops.add(step.arrays["x"], step.arrays["x"]) for _ in range(length)]
        total = values[0]
        for value in values[1:]:
            total = ops.add(total, value)
        return {"y": total}, []

    return fn


# ---- the same as a tape ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("program", ["graph", "piecewise", "tape", "eager"])
def test_every_program_gives_what_a_tape_gives(kit, program: str, lazy: tuple[str, ...]) -> None:
    expected = run_layer(layer_session(kit), kit)
    for functional in (False, True):
        session = layer_session(kit.on(FakeDevice(lazy)), program=program, functional=functional)
        assert run_layer(session, kit) == expected, functional


@pytest.mark.parametrize(
    ("program", "max_query", "counts"),
    [
        ("graph", 2, (2, 5, 1)),
        ("graph", 1, (1, 6, 0)),
        ("piecewise", 1, (2, 5, 1)),
        ("tape", 1, (0, 0, 6)),
    ],
)
def test_a_decode_step_is_one_graph_and_attention_cuts_others(kit, program: str, max_query: int, counts: Any) -> None:
    session, shape = layer_session(kit.on(FakeDevice()), program=program), replace(SHAPE, max_query=max_query)
    captured = session.capture(layer, shape, forward_inputs(shape), layer_ops(kit))
    details = captured.report.details
    assert (details["graphs"], details["graph_calls"], details["eager_calls"]) == counts
    session.freeze()
    assert captured.report.details["pool"] >= 0 and captured.report.ops == 6


def test_a_kernel_that_is_not_capturable_is_outside_of_every_graph(kit) -> None:
    session = kit.on(FakeDevice()).session()

    def doubled(x: Any) -> Any:
        return x * (1.0 + float(x.sum() == x.sum().item()))

    outside = BoundKernel(doubled, session, False, name="reads_values", op="double", capturable=False)

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"y": ops.add(ops.double(ops.add(step.arrays["x"], step.arrays["x"])), step.arrays["x"])}, []

    program = session.capture(fn, DECODE, ROWS, kit.HandPlanned(kit.pointwise("add"), {"double": outside}))
    session.freeze()
    assert program.report.details["graphs"] == 2 and program.report.details["eager_calls"] == 1
    assert np.allclose(program(rows_step(1)).result("y"), 5 * rows_step(1)["x"])


def test_a_replay_runs_no_python_of_a_kernel(kit) -> None:
    runs: list[int] = []

    def noted(x: Any) -> Any:
        runs.append(1)
        return x + 1

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"y": ops.noted(step.arrays["x"])}, []

    session = kit.on(FakeDevice()).session()
    program = session.capture(fn, DECODE, ROWS, kit.HandPlanned({}, {"noted": noted}))
    session.freeze()
    before = len(runs)
    for seed in (1, 2):
        assert np.allclose(program(rows_step(seed)).result("y"), rows_step(seed)["x"] + 1)
    assert len(runs) == before


# ---- the arena moves -------------------------------------------------------------------------------------------


def grown(kit: Any) -> tuple[Any, Any]:
    """A small program that has run, then a larger one, for which the arena has moved."""
    session, ops = kit.on(FakeDevice()).session(), kit.HandPlanned(kit.pointwise("add"))
    small = session.capture(chain(3), DECODE, ROWS, ops)
    assert np.allclose(small(rows_step(1)).result("y"), 6 * rows_step(1)["x"])
    where = session.arena.data_ptr()
    large = session.capture(chain(300), DECODE, ROWS, ops)
    assert session.arena.data_ptr() != where
    return small, large


@pytest.mark.parametrize("freezes", [True, False])
def test_a_program_from_before_the_arena_moved_is_right_after_it(kit, freezes: bool) -> None:
    small, large = grown(kit)
    if freezes:
        small.session.freeze()
    for seed in (2, 3):
        assert np.allclose(small(rows_step(seed)).result("y"), 6 * rows_step(seed)["x"])
    assert np.allclose(large(rows_step(4)).result("y"), 600 * rows_step(4)["x"], rtol=1e-4)


def test_a_graph_that_is_not_captured_again_after_a_move_fails(kit, monkeypatch) -> None:
    small, _ = grown(kit)
    monkeypatch.setattr(type(small), "make_ready", lambda self: None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        small(rows_step(2)).result("y")


def test_capturing_again_makes_earlier_handles_stale(kit) -> None:
    session, ops = kit.on(FakeDevice()).session(), kit.HandPlanned(kit.pointwise("add"))
    small = session.capture(chain(3), DECODE, ROWS, ops)
    pending = small(rows_step(1))
    session.capture(chain(300), DECODE, ROWS, ops)
    session.freeze()
    with pytest.raises(ContractViolation, match="'y' is stale"):
        pending.result("y")


def test_graphs_are_captured_again_in_a_new_pool_when_all_that_were_are_gone(kit) -> None:
    session, ops = kit.on(FakeDevice()).session(), kit.HandPlanned(kit.pointwise("add"))
    for length in (3, 4):
        program = session.capture(chain(length), DECODE, ROWS, ops)
        session.freeze()
        assert np.allclose(program(rows_step(1)).result("y"), 2 * length * rows_step(1)["x"])
        session.thaw()
        program.release()
        del program
        gc.collect()


# ---- handles ---------------------------------------------------------------------------------------------------


def consumer(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
    return {"ids": ops.argmax(arrays["y"]), "half": ops.add(arrays["y"][2:, :4], arrays["y"][:2, 4:])}, []


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("program", ["graph", "tape", "eager"])
def test_handles_of_several_programs_feed_another(kit, program: str, lazy: tuple[str, ...]) -> None:
    session = kit.on(FakeDevice(lazy)).session(program=program)
    ops = kit.HandPlanned({**kit.pointwise("add"), "argmax": SampleProblem(dtype="float32", vocab=WIDTH)})
    one, two = (session.capture(chain(n), DECODE, ROWS, ops) for n in (1, 2))
    spec = {"y": ArraySpec((4, WIDTH), "float32")}
    sink = session.capture(consumer, DECODE, ROWS, ops, spec, frozenset({"ids", "half"}))
    session.freeze()
    waiting = []
    for seed in (1, 2, 3):
        first, second = one(rows_step(seed)), two(rows_step(seed + 10))
        for pending, y in ((second, 4 * rows_step(seed + 10)["x"]), (first, 2 * rows_step(seed)["x"])):
            waiting.append((sink(rows_step(0), {"y": pending.handle("y")}), y))
    for got, y in reversed(waiting):
        assert got.result("ids").tolist() == y.argmax(1).tolist()
        assert np.array_equal(got.result("half"), y[2:, :4] + y[:2, 4:])
    if program != "eager":
        with pytest.raises(ContractViolation, match="'y' is stale"):
            one(rows_step(9)), sink(rows_step(0), {"y": first.handle("y")})


def test_a_program_takes_its_own_output(kit) -> None:
    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"y": ops.add(arrays["y"], step.arrays["x"])}, []

    session = kit.on(FakeDevice()).session()
    spec, ops = {"y": ArraySpec((4, WIDTH), "float32")}, kit.HandPlanned(kit.pointwise("add"))
    start = session.capture(chain(1), DECODE, ROWS, ops)
    program = session.capture(fn, DECODE, ROWS, ops, spec)
    session.freeze()
    pending = start(rows_step(0))
    for seed in (1, 2, 3):
        pending = program(rows_step(seed), {"y": pending.handle("y")})
    assert np.allclose(pending.result("y"), 2 * rows_step(0)["x"] + sum(rows_step(s)["x"] for s in (1, 2, 3)))


# ---- what cannot be captured -----------------------------------------------------------------------------------

ILLEGAL: dict[str, Callable[[Any], Any]] = {
    "aten.item": lambda x: x * x.sum().item(),
    "aten.nonzero": lambda x: x + torch.nonzero(x).shape[0],
    "aten.index": lambda x: x + x[x > 0].sum(),
    "aten.lift_fresh": lambda x: x + torch.tensor([1.0]),
    "Tensor.tolist": lambda x: x + len(x.tolist()),
}


@pytest.mark.parametrize("operator", ILLEGAL)
def test_a_capture_that_holds_an_illegal_call_names_kernel_and_operator(kit, operator: str) -> None:
    session = kit.on(FakeDevice()).session()
    bad = BoundKernel(ILLEGAL[operator], session, False, name="bad_kernel", op="scale")

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"y": ops.scale(ops.add(step.arrays["x"], step.arrays["x"]))}, []

    with pytest.raises(ContractViolation, match=rf"'bad_kernel' for scale, .* 4 tokens, .*{operator}") as caught:
        session.capture(fn, DECODE, ROWS, kit.HandPlanned(kit.pointwise("add"), {"scale": bad}))
    assert "\n" not in str(caught.value) and 'program = "tape"' in str(caught.value)
    session.close()


def test_the_same_call_runs_where_nothing_is_captured(kit) -> None:
    for program in ("tape", "eager"):
        session = kit.on(FakeDevice()).session(program=program)
        bad = BoundKernel(ILLEGAL["aten.item"], session, False, name="bad_kernel", op="scale")
        captured = session.capture(
            lambda ops, w, c, step, a: ({"y": ops.scale(step.arrays["x"])}, []), DECODE, ROWS,
            kit.HandPlanned({}, {"scale": bad}),
        )  # fmt: skip
        x = rows_step(1)["x"]
        assert np.allclose(captured(rows_step(1)).result("y"), x * x.sum())


def test_a_graph_without_memory_is_an_out_of_memory(kit, monkeypatch) -> None:
    session = kit.on(FakeDevice()).session()

    def full(pool: Any) -> Any:
        raise RuntimeError("device error: out of memory")

    monkeypatch.setattr(session.layer, "capture", full)
    with pytest.raises(OutOfMemory, match="graphs of a step of 4 tokens"):
        session.capture(chain(3), DECODE, ROWS, kit.HandPlanned(kit.pointwise("add")))
    session.close()


def test_a_recipe_says_for_which_problems_its_kernel_is_capturable(kit) -> None:
    make = recipe("k", "add", lambda problem, session: torch.add, capturable=lambda problem: problem.dtype == "float32")
    kernel, (problem,) = make("x"), kit.pointwise("add").values()
    bound = [kernel.bind(found, kit.session()) for found in (problem, replace(problem, dtype="bfloat16"))]
    assert [(one.capturable, one.name, one.op) for one in bound] == [(True, "k", "add"), (False, "k", "add")]


def test_options_that_a_device_has_not_are_refused(kit) -> None:
    with pytest.raises(InvalidValue, match="'jit'"):
        kit.on(FakeDevice()).session(program="jit")
    with pytest.raises(InvalidValue, match="overlap"):
        kit.on(FakeDevice()).session(program="eager", overlap=True)
    with pytest.raises(InvalidValue, match="without a device layer"):
        kit.session(program="graph").capture(chain(1), DECODE, ROWS, kit.HandPlanned(kit.pointwise("add")))


# ---- overlap of communication ----------------------------------------------------------------------------------


def reducing(kit: Any, lazy: tuple[str, ...], **options: Any) -> tuple[Any, Any]:
    """A program whose collective (of one rank: it triples) has an independent chain of calls beside it."""
    session = kit.on(FakeDevice(lazy)).session(**options)
    reduce = BoundKernel(lambda x: x * 3, session, False, name="reduce", op="all_reduce")

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        x = step.arrays["x"]
        total = ops.all_reduce(ops.add(x, x))  # its argument is read by nothing else
        beside = ops.add(ops.add(x, x), x)
        for _ in range(3):
            beside = ops.add(beside, x)
        return {"y": ops.add(total, beside)}, []

    ops = kit.HandPlanned(kit.pointwise("add"), {"all_reduce": reduce})
    return session, session.capture(fn, DECODE, ROWS, ops, {}, frozenset({"y"}))


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("program", ["graph", "piecewise", "tape"])
def test_overlapped_collectives_give_the_same(kit, program: str, lazy: tuple[str, ...]) -> None:
    session, captured = reducing(kit, lazy, program=program, overlap=True)
    session.freeze()
    pendings = [captured(rows_step(seed)) for seed in (1, 2, 3)]
    for pending, seed in zip(pendings, (1, 2, 3), strict=True):
        assert np.allclose(pending.result("y"), 12 * rows_step(seed)["x"])
    assert captured.report.collectives == ("all_reduce",)


def moves(captured: Any) -> list[tuple[type, int]]:
    ((_, found),) = captured._pieces
    return [(type(move), len(move.calls) if isinstance(move, Run) else 1) for move in found]


def test_the_wait_comes_before_the_first_call_that_needs_the_result(kit, monkeypatch) -> None:
    overlapped = reducing(kit, (), overlap=True)[1]
    assert moves(overlapped) == [(Run, 1), (Fork, 1), (Run, 5), (Join, 1), (Run, 1)]
    assert moves(reducing(kit, ())[1]) == [(Run, 8)]
    # Were the argument's memory free once the collective has begun, a call beside it would take it and have to wait.
    monkeypatch.setattr("lineshaft_torch.program.Survey", lambda beside: Survey())
    assert moves(reducing(kit, (), overlap=True)[1])[2] != (Run, 5)


def test_a_collective_and_the_calls_beside_it_are_not_ordered(kit) -> None:
    orders = set()
    for lazy in (("main",), ("side",)):
        session, captured = reducing(kit, lazy, program="tape", overlap=True)
        session.freeze()
        del session.layer.ran[:]
        captured(rows_step(1)).result("y")
        ran = [name for name in session.layer.ran if name in ("reduce", "torch_add")]
        orders.add(ran.index("reduce"))
    assert len(orders) == 2, orders


@pytest.mark.parametrize("program", ["graph", "tape"])
def test_without_its_wait_an_overlapped_step_is_wrong(kit, program: str, monkeypatch) -> None:
    session, captured = reducing(kit, ("main", "side"), program=program, overlap=True)
    session.freeze()
    assert np.allclose(captured(rows_step(1)).result("y"), 12 * rows_step(1)["x"])
    wait = session.layer.wait

    def only_forks(event: Any) -> None:
        if session.layer._current[-1] is session.layer.side:
            wait(event)

    monkeypatch.setattr(session.layer, "wait", only_forks)
    assert not np.allclose(captured(rows_step(2)).result("y"), 12 * rows_step(2)["x"])
