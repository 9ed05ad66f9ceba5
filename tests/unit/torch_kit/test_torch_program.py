"""Programs: a tape replays what the forward says, whatever the bucket, the inputs and the sharing of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.torch_kit.layer import SHAPE, WIDTH, layer, layer_ops, layer_session, layer_steps, run_layer

from lineshaft.errors import ContractViolation, SessionPoisoned
from lineshaft_contract.problems import SampleProblem
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepShape, forward_inputs
from lineshaft_torch.tensors import storage_key

ROWS = InputLayout([InputField("x", "float32", (4, WIDTH)), InputField("pick", "int32", (4,))])
EMPTY = StepShape(4, 1, (), 1, 4)


def rows_step(seed: int) -> HostStep:
    rng = np.random.default_rng(seed)
    host = HostStep(ROWS)
    host["x"][:] = rng.standard_normal((4, WIDTH))
    host["pick"][:] = rng.integers(0, 4, 4)
    return host


# ---- the same three ways ---------------------------------------------------------------------------------------


def test_tape_eager_and_functional_agree_bit_for_bit(kit) -> None:
    tape = run_layer(layer_session(kit), kit)
    assert np.any(np.frombuffer(tape[0], np.float32))
    for options in ({"program": "eager"}, {"program": "eager", "functional": True}, {"functional": True}):
        assert run_layer(layer_session(kit, **options), kit) == tape, options


@pytest.mark.parametrize("program", ["tape", "eager"])
def test_a_forward_that_drops_the_written_cache_shows_in_the_functional_lane(kit, program: str) -> None:
    def dropping(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        outputs, _ = layer(ops, weights, caches, step, arrays)
        return outputs, caches

    session = layer_session(kit, functional=True, program=program)
    captured = session.capture(dropping, SHAPE, forward_inputs(SHAPE), layer_ops(kit))
    captured(layer_steps()[0])
    assert not session.read_pages(0, np.arange(1, 8))["k"].any()


def test_the_report_counts_ops_arena_and_copied_cache_bytes(kit) -> None:
    session = layer_session(kit)
    report = session.capture(layer, SHAPE, forward_inputs(SHAPE), layer_ops(kit)).report
    assert report.ops == 6 and report.cache_copied == 0
    assert 0 < report.arena < report.temporaries
    functional = layer_session(kit, functional=True)
    report = functional.capture(layer, SHAPE, forward_inputs(SHAPE), layer_ops(kit)).report
    assert report.cache_copied == 2 * 8 * 4 * 2 * 4 * 4


def test_host_planning_runs_before_every_submission(kit) -> None:
    session, ops = layer_session(kit), layer_ops(kit)
    program = session.capture(layer, SHAPE, forward_inputs(SHAPE), ops)
    before = ops.prepared
    for host in layer_steps():
        program(host)
    assert ops.prepared == before + 2


# ---- random graphs ---------------------------------------------------------------------------------------------


def random_graph(seed: int, length: int) -> Any:
    """A forward of random adds, gathers, concats, slices and copying reshapes, with values of random lifetimes."""

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        rng = np.random.default_rng(seed)
        values = [step.arrays["x"]]
        for _ in range(length):
            x, y = (values[int(i)] for i in rng.integers(max(0, len(values) - 6), len(values), 2))
            kind = int(rng.integers(5))
            if kind == 0:
                values.append(ops.add(x, y))
            elif kind == 1:
                values.append(ops.gather_rows(x, step.arrays["pick"]))
            elif kind == 2:
                wide = ops.concat([x, y], 1)
                values += [wide[:, :WIDTH], wide[:, 3 : 3 + WIDTH]]
            elif kind == 3:
                turned = ops.concat([x, y], 1)[:, 2 : 2 + WIDTH].reshape(2, 2 * WIDTH).reshape(4, WIDTH)
                values.append(ops.add(turned, x))
            else:
                values.append(ops.silu_mul(ops.concat([x, y], 1)))
        return {"last": values[-1], "early": values[len(values) // 3]}, []

    return fn


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_replay_as_they_run(kit, seed: int) -> None:
    results = {}
    for kind in ("eager", "tape"):
        session = kit.session(program=kind)
        ops = kit.HandPlanned(kit.pointwise("add", "gather_rows", "concat", "silu_mul"))
        program = session.capture(random_graph(seed, 60), EMPTY, ROWS, ops, {}, frozenset({"last", "early"}))
        for step in (1, 2, 1):
            pending = program(rows_step(step))
            results.setdefault(kind, []).append((pending.result("last").tobytes(), pending.result("early").tobytes()))
    assert results["tape"] == results["eager"]
    assert results["tape"][0] == results["tape"][2] != results["tape"][1]


def test_the_arena_is_much_smaller_than_all_results(kit) -> None:
    ops = kit.HandPlanned(kit.pointwise("add"))

    def chain(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        x = step.arrays["x"]
        for _ in range(100):
            x = ops.add(x, x)
        return {"x": x}, []

    report = kit.session().capture(chain, EMPTY, ROWS, ops).report
    assert report.arena == 2 * 128 and report.temporaries == 100 * 128


def test_a_larger_program_grows_the_one_arena_of_all(kit) -> None:
    session = kit.session()
    ops = kit.HandPlanned(kit.pointwise("add", "gather_rows", "concat", "silu_mul"))
    programs = [session.capture(random_graph(3, length), EMPTY, ROWS, ops) for length in (5, 40, 80)]
    for program in programs:
        stored = {storage_key(step.keywords["out"]) for step in program._tape}
        assert storage_key(session.arena) in stored
    assert session.arena.numel() == max(program.report.arena for program in programs)
    expected = [session.capture(random_graph(3, length), EMPTY, ROWS, ops) for length in (5, 40, 80)]
    assert len({program.report.arena for program in programs}) > 1
    for program, same in zip(programs, expected, strict=True):
        assert program(rows_step(4)).result("last").tobytes() == same(rows_step(4)).result("last").tobytes()


# ---- handles and pending results -------------------------------------------------------------------------------


def producer(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
    return {"logits": ops.add(step.arrays["x"], step.arrays["x"])}, []


def consumer(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
    return {
        "ids": ops.argmax(arrays["logits"]),
        "half": ops.add(arrays["logits"][2:, :4], arrays["logits"][:2, 4:]),
    }, []


def handle_programs(kit: Any, kind: str) -> tuple[Any, Any, Any]:
    session = kit.session(program=kind)
    ops = kit.HandPlanned({**kit.pointwise("add"), "argmax": SampleProblem(dtype="float32", vocab=WIDTH)})
    spec = {"logits": ArraySpec((4, WIDTH), "float32")}
    makers = [session.capture(producer, EMPTY, ROWS, ops) for _ in range(2)]
    return *makers, session.capture(consumer, EMPTY, ROWS, ops, spec, frozenset({"ids", "half"}))


@pytest.mark.parametrize("kind", ["tape", "eager"])
def test_handles_of_several_programs_feed_another(kit, kind: str) -> None:
    one, two, sink = handle_programs(kit, kind)
    for seed in (1, 2, 3):
        first, second = one(rows_step(seed)), two(rows_step(seed + 10))
        for pending, host in ((second, rows_step(seed + 10)), (first, rows_step(seed))):
            got = sink(rows_step(0), {"logits": pending.handle("logits")})
            doubled = 2 * host["x"]
            assert got.result("ids").tolist() == doubled.argmax(1).tolist()
            assert np.array_equal(got.result("half"), doubled[2:, :4] + doubled[:2, 4:])


def test_a_handle_is_read_where_it_lies(kit) -> None:
    one, _, sink = handle_programs(kit, "tape")
    handle = one(rows_step(1)).handle("logits")
    sink(rows_step(0), {"logits": handle})
    reads = {tensor.data_ptr() for step in sink._tape for tensor in step.args if isinstance(tensor, torch.Tensor)}
    assert handle.tensor.data_ptr() in reads
    assert handle.spec == ArraySpec((4, WIDTH), "float32")


def test_a_stale_handle_is_refused_and_host_outputs_stay(kit) -> None:
    one, _, sink = handle_programs(kit, "tape")
    pending = one(rows_step(1))
    done = sink(rows_step(0), {"logits": pending.handle("logits")})
    ids = done.result("ids").copy()
    newer = one(rows_step(2))
    with pytest.raises(ContractViolation, match="'logits' is stale"):
        sink(rows_step(0), {"logits": pending.handle("logits")})
    with pytest.raises(ContractViolation, match="stale"):
        pending.result("logits")
    sink(rows_step(0), {"logits": newer.handle("logits")})
    assert done.result("ids").tolist() == ids.tolist()


def test_wrong_arrays_are_refused_and_do_not_poison(kit) -> None:
    one, _, sink = handle_programs(kit, "tape")
    with pytest.raises(ContractViolation, match=r"\['logits'\], it was given \[\]"):
        sink(rows_step(0))
    ids = sink(rows_step(0), {"logits": one(rows_step(1)).handle("logits")}).handle("ids")
    with pytest.raises(ContractViolation, match="captured as"):
        sink(rows_step(0), {"logits": ids})
    with pytest.raises(ContractViolation, match="no output 'nothing'"):
        one(rows_step(1)).handle("nothing")


# ---- what a capture refuses, and what a failure does -----------------------------------------------------------


def test_arithmetic_outside_ops_is_refused_by_the_tape(kit) -> None:
    def bad(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"x": ops.add(step.arrays["x"] * 2, step.arrays["x"])}, []

    with pytest.raises(ContractViolation, match="may only call ops"):
        kit.session().capture(bad, EMPTY, ROWS, kit.HandPlanned(kit.pointwise("add")))


def test_a_forward_that_changes_between_runs_is_refused(kit) -> None:
    runs: list[int] = []

    def fickle(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        runs.append(1)
        x = step.arrays["x"]
        return {"x": ops.add(x, x) if len(runs) % 2 else ops.gather_rows(x, step.arrays["pick"])}, []

    with pytest.raises(ContractViolation, match="two runs of the forward differ"):
        kit.session().capture(fickle, EMPTY, ROWS, kit.HandPlanned(kit.pointwise("add", "gather_rows")))


def test_a_dropped_cache_and_an_unknown_host_output_are_refused(kit) -> None:
    session = kit.session()
    session.alloc_caches([kit.kv()], [2], "slots")
    with pytest.raises(ContractViolation, match="returns 0 caches"):
        session.capture(lambda *_: ({}, []), EMPTY, ROWS, kit.HandPlanned({}))
    with pytest.raises(ContractViolation, match="host_outputs"):
        session.capture(lambda o, w, c, s, a: ({}, c), EMPTY, ROWS, kit.HandPlanned({}), {}, frozenset({"ids"}))


@pytest.mark.parametrize("kind", ["tape", "eager"])
def test_foreign_callables_are_recorded_and_a_failure_poisons(kit, kind: str) -> None:
    armed: list[bool] = []

    def triple(x: Any) -> Any:
        if armed:
            raise RuntimeError("the device fell over")
        return 3 * x

    def fn(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"x": ops.add(ops.triple(step.arrays["x"]), step.arrays["x"])}, []

    session = kit.session(program=kind)
    program = session.capture(fn, EMPTY, ROWS, kit.HandPlanned(kit.pointwise("add"), {"triple": triple}))
    assert np.allclose(program(rows_step(5)).result("x"), 4 * rows_step(5)["x"])
    armed.append(True)
    with pytest.raises(RuntimeError, match="fell over"):
        program(rows_step(5))
    armed.clear()
    for call in (lambda: program(rows_step(5)), session.freeze, lambda: session.read_pages(0, np.zeros(1))):
        with pytest.raises(SessionPoisoned, match="fell over"):
            call()
    session.close()


def test_a_program_over_replaced_weights_is_refused(kit) -> None:
    session = layer_session(kit)
    program = session.capture(layer, SHAPE, forward_inputs(SHAPE), layer_ops(kit))
    session.alloc_caches([kit.kv()], [8], "slots")
    with pytest.raises(ContractViolation, match="capture it again"):
        program(layer_steps()[0])


def test_update_reaches_a_captured_program(kit) -> None:
    session = layer_session(kit)
    program = session.capture(layer, SHAPE, forward_inputs(SHAPE), layer_ops(kit), {}, frozenset({"sum"}))
    before = program(layer_steps()[0]).result("sum")
    session.update({"embed": np.zeros((10, WIDTH), np.float32)})
    assert before.any() and not program(layer_steps()[0]).result("sum").any()
