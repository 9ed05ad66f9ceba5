"""Sessions on the stand-in: fresh outputs, caches in place, typed refusals, and nothing that compiles once frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.neuron_plugin.static_sessions import (
    WIDTH,
    capture,
    const,
    giving,
    kv,
    layout,
    started,
    step,
    writing,
)
from tests.unit.torch_kit.conftest import HandPlanned, KitTools
from tests.unit.torch_kit.layer import layer_session, run_layer
from torch import fx

from lineshaft.errors import ContractViolation, LineshaftError, SessionClosed, SessionFrozen
from lineshaft.plan import Resolver
from lineshaft_contract.backends import World
from lineshaft_contract.steps import ArraySpec, HostStep
from lineshaft_neuron import stand_in
from lineshaft_neuron.backend import NeuronBackend, create
from lineshaft_neuron.options import NeuronOptions

X = ArraySpec((4, WIDTH), "float32")
DOUBLE = giving(lambda x, arrays, weights: {"y": x * 2})
ADD = giving(lambda x, arrays, weights: {"y": arrays["a"] + arrays["b"]})
TWO = {"a": X, "b": X}


def compiled() -> int:
    return stand_in.compiler().counts.compiled


# ---- outputs and inputs ----------------------------------------------------------------------------------------------


def test_an_output_stays_what_it_is_when_its_program_runs_again(session: Any) -> None:
    program = capture(session, DOUBLE)
    pendings = [program(step(seed)) for seed in range(3)]
    for seed, pending in enumerate(pendings):
        assert np.array_equal(pending.result("y"), step(seed)["x"] * 2)
    sink = capture(session, ADD, TWO)
    first, last = pendings[0].handle("y"), pendings[2].handle("y")
    got = sink(step(9), {"a": first, "b": last}).result("y")
    assert np.array_equal(got, (step(0)["x"] + step(2)["x"]) * 2)


def test_an_output_that_is_an_input_is_a_copy_of_it(session: Any) -> None:
    program = capture(session, giving(lambda x, arrays, weights: {"x": x, "row": x[1], "given": arrays["a"]}), {"a": X})
    given = capture(session, DOUBLE)(step(5)).handle("y")
    one, other = program(step(1), {"a": given}), program(step(2), {"a": given})
    for seed, pending in ((1, one), (2, other)):
        assert np.array_equal(pending.result("x"), step(seed)["x"])
        assert np.array_equal(pending.result("row"), step(seed)["x"][1])
        assert np.array_equal(pending.result("given"), step(5)["x"] * 2)


def test_the_step_is_free_when_the_call_returns_and_zeros_are_legal(session: Any) -> None:
    program = capture(session, DOUBLE, host=frozenset({"y"}))
    host = step(1)
    wanted = host["x"] * 2
    pending = program(host)
    host.buffer[:] = 255
    assert np.array_equal(pending.result("y"), wanted)
    assert not program(HostStep(layout())).result("y").any()


def test_weights_are_replaced_between_steps_without_a_compilation(session: Any) -> None:
    session.load({"w": const("w", np.full(WIDTH, 2, np.float32))}, None, {})
    program = capture(session, giving(lambda x, arrays, weights: {"y": x * weights["w"]}))
    before, host = compiled(), step(3)
    session.freeze()
    assert np.array_equal(program(host).result("y"), host["x"] * 2)
    session.update({"w": np.full(WIDTH, -3, np.float32)})
    assert np.array_equal(program(host).result("y"), host["x"] * -3)
    assert compiled() == before


def test_a_program_of_weights_that_were_loaded_over_is_refused(session: Any) -> None:
    params = {"w": const("w", np.ones(WIDTH, np.float32))}
    session.load(params, None, {})
    program = capture(session, DOUBLE)
    session.load(params, None, {})
    with pytest.raises(ContractViolation, match="capture it again"):
        program(step())
    assert np.array_equal(capture(session, DOUBLE)(step()).result("y"), step()["x"] * 2)


# ---- handles ---------------------------------------------------------------------------------------------------------


def test_handles_of_any_program_feed_another_without_a_compilation(session: Any) -> None:
    """Whatever lies behind a handle: a transposed result, a slice, one that is given twice, one of two names."""
    odd = capture(
        session,
        giving(lambda x, arrays, weights: {"t": (x @ x.t() + 1).t()[:, :2], "wide": torch.cat([x, x], 1)[:, 4:12]}),
    )
    same = capture(session, giving(lambda x, arrays, weights: dict.fromkeys("pq", x + 1)))
    double, sink = capture(session, DOUBLE), capture(session, ADD, TWO)
    narrow = ArraySpec((4, 2), "float32")
    thin = capture(session, giving(lambda x, arrays, weights: {"y": arrays["t"] * 2}), {"t": narrow})
    session.freeze()
    before, x = compiled(), step(1)["x"]
    wide, pair = odd(step(1)), same(step(1))
    turned = np.concatenate([x[:, 4:], x[:, :4]], 1)
    for a, b, wanted in (
        (wide.handle("wide"), wide.handle("wide"), 2 * turned),
        (wide.handle("wide"), double(step(1)).handle("y"), turned + 2 * x),
        (pair.handle("p"), pair.handle("q"), (x + 1) * 2),
    ):
        assert np.array_equal(sink(step(2), {"a": a, "b": b}).result("y"), wanted)
    made = thin(step(2), {"t": wide.handle("t")})
    assert made.handle("y").spec == narrow
    assert np.allclose(made.result("y"), 2 * (x @ x.T + 1).T[:, :2], atol=1e-5)
    assert compiled() == before


def test_a_handle_that_does_not_fit_is_refused_and_harms_nothing(session: Any) -> None:
    double, sink = capture(session, DOUBLE), capture(session, ADD, TWO)
    handle = double(step(1)).handle("y")
    short = capture(session, DOUBLE, tokens=2)(step(1, 2)).handle("y")
    with pytest.raises(ContractViolation, match=r"\['a', 'b'\], it was given \['a'\]"):
        sink(step(2), {"a": handle})
    with pytest.raises(ContractViolation, match=r"array 'b' was captured as .*\(4, 8\).*given is .*\(2, 8\)"):
        sink(step(2), {"a": handle, "b": short})
    with pytest.raises(ContractViolation, match="no output 'z'; it has y"):
        double(step(1)).handle("z")
    assert np.array_equal(sink(step(2), {"a": handle, "b": handle}).result("y"), step(1)["x"] * 4)


# ---- caches ----------------------------------------------------------------------------------------------------------


def replacing(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
    """As `writing`, by a cache that is returned and not written in place."""
    k = caches[0].arrays["k"].index_copy(0, step.arrays["rows"].long(), step.arrays["x"].view(-1, 2, 4))
    return {"sum": k.sum(0)}, [replace(caches[0], arrays={**caches[0].arrays, "k": k})]


@pytest.mark.parametrize("forward", [writing, replacing])
def test_caches_stay_where_they_are_and_programs_share_them(session: Any, forward: Callable[..., Any]) -> None:
    (cache,) = session.alloc_caches([kv()], [4], "slots")
    lies = {name: array.data_ptr() for name, array in cache.arrays.items()}
    programs = {tokens: capture(session, forward, tokens=tokens) for tokens in (4, 2)}
    assert not session.read_pages(0, np.arange(1, 4))["k"].any(), "capturing has written nothing but the null page"
    session.freeze()
    wanted = np.zeros((16, 2, 4), np.float32)
    wanted[:4] = session.read_pages(0, np.zeros(1, np.int32))["k"][0]
    for seed, (tokens, rows) in enumerate([(4, [5, 9, 4, 15]), (2, [9, 6]), (4, [6, 7, 8, 5])]):
        host = step(seed, tokens, rows)
        wanted[rows] = host["x"].reshape(-1, 2, 4)
        total = programs[tokens](host).result("sum")
        assert np.allclose(total, wanted.sum(0), atol=1e-5)
        assert np.array_equal(session.read_pages(0, np.arange(4))["k"], wanted.reshape(4, 4, 2, 4))
    assert lies == {name: array.data_ptr() for name, array in session.caches[0].arrays.items()}
    assert not session.read_pages(0, np.arange(4))["v"].any()


def test_a_forward_has_to_return_its_caches(session: Any) -> None:
    session.alloc_caches([kv()], [2], "slots")
    with pytest.raises(ContractViolation, match="returns 0 caches"):
        capture(session, lambda ops, weights, caches, step, arrays: ({"y": step.arrays["x"]}, []))


class NeuronKit(KitTools):
    """The tools of the torch kit's tests, with the backend's own sessions and kernels."""

    class HandPlanned(HandPlanned):
        def bind(self, session: Any) -> Any:
            resolver = Resolver("neuron", backend().kernels(), {})
            best = {op: resolver.candidates(op, problem).best() for op, problem in self.problems.items()}
            return SimpleNamespace(**{op: best[op].bind(problem, session) for op, problem in self.problems.items()})

    def session(self, **options: Any) -> Any:
        return backend().session(0)


def backend() -> NeuronBackend:
    return create(NeuronOptions(stand_in=True), World())


def test_a_layer_of_kernels_computes_what_it_computes_on_the_host(session: Any) -> None:
    kit, plain = NeuronKit(), KitTools()
    got = run_layer(layer_session(kit), kit)
    wanted = run_layer(layer_session(plain), plain)
    assert len(got) == len(wanted) == 5 and np.frombuffer(wanted[-1], np.float32).any()
    for one, other in zip(got, wanted, strict=True):
        assert np.allclose(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), atol=1e-5)


# ---- what is told of a program ---------------------------------------------------------------------------------------


def test_a_report_tells_calls_memory_and_inputs(session: Any) -> None:
    def three(x: torch.Tensor, arrays: Any, weights: Any) -> Any:
        return {"y": (x * 2).exp() + 1}

    report = capture(session, giving(three)).report
    cuts = 2  # x is cut out of its array and viewed
    assert report.ops == 3 + cuts and report.temporaries == 2 * 4 * WIDTH * 4
    assert report.packed == 4 * WIDTH * 4 + 4 * 4 == layout().nbytes
    assert report.collectives == () and not report.cached and report.seconds > 0
    twice = capture(session, giving(three), tokens=8).report
    assert twice.ops == report.ops and twice.temporaries == 2 * report.temporaries


def test_programs_of_equal_work_have_one_digest_in_every_session(session: Any) -> None:
    def digest(value: float, width: int = WIDTH, factor: int = 2, tokens: int = 4) -> str:
        own = started()
        own.load({"w": const("w", np.full(width, value, np.float32))}, None, {})
        forward = giving(lambda x, arrays, weights: {"y": x[:, :width] * weights["w"] * factor})
        made: str = capture(own, forward, tokens=tokens).digest
        own.close()
        return made

    assert digest(1) == digest(7)
    assert len({digest(1), digest(1, width=4), digest(1, factor=3), digest(1, tokens=2)}) == 4


# ---- forwards that are no program ------------------------------------------------------------------------------------

HELD = torch.ones(WIDTH)
VALUES = "depends on values; a program is traced before there are any"
REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "a host tensor": (lambda x: x * torch.ones(8), "calls mul with tensors on cpu and neuron:0; make a tensor on"),
    "values of its own": (lambda x: x + torch.tensor([1.0] * 8), "calls add with tensors on cpu and neuron:0"),
    "a host number": (lambda x: x * torch.tensor(3.0), "a tensor on cpu: .*name the device"),
    "a tensor it holds": (lambda x: x * HELD, "calls mul with tensors on cpu and neuron:0; .* load it as a weight"),
    "item": (lambda x: x * x[0, 0].item(), f"calls item, .*{VALUES}"),
    "tolist": (lambda x: x * x[0].tolist()[0], VALUES),
    "float": (lambda x: x * float(x[0, 0]), f"calls __float__, .*{VALUES}"),
    "numpy": (lambda x: x * torch.from_numpy(x.numpy()), f"calls numpy, .*{VALUES}"),
    "asarray": (lambda x: x * float(np.asarray(x)[0, 0]), f"calls __array__, .*{VALUES}"),
    "a branch": (lambda x: x if x.sum() > 0 else x + 1, f"calls __bool__, .*{VALUES}"),
    "a mask as index": (lambda x: x[x > 0], f"calls __getitem__, .*{VALUES}"),
    "nonzero": (lambda x: x.nonzero(), f"calls nonzero, .*{VALUES}"),
    "sort": (lambda x: x.sort()[0], r"no sort and no search; use topk"),
    "float64": (lambda x: x.double(), "use float32"),
    "int64": (lambda x: x.argmax(-1), "an output of torch.int64: convert it to int32"),
    "the host": (lambda x: x.cpu(), "a tensor on cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forward_that_is_no_program_is_refused_and_the_session_goes_on(session: Any, name: str) -> None:
    made, says = REFUSED[name]
    before = capture(session, DOUBLE)
    with pytest.raises(ContractViolation, match=says) as refused:
        capture(session, giving(lambda x, arrays, weights: {"y": made(x)}))
    assert "\n" not in str(refused.value)
    for program in (before, capture(session, DOUBLE)):
        assert np.array_equal(program(step(1)).result("y"), step(1)["x"] * 2)


def test_an_error_of_the_forward_itself_stays_what_it_is(session: Any) -> None:
    with pytest.raises(RuntimeError, match="same reduction dim") as error:
        capture(session, giving(lambda x, arrays, weights: {"y": x @ x}))
    assert not isinstance(error.value, LineshaftError)
    with pytest.raises(ContractViolation, match=r"host_outputs \['z'\] are no outputs of the forward: \['y'\]"):
        capture(session, DOUBLE, host=frozenset({"z"}))


# ---- frozen, and closed ----------------------------------------------------------------------------------------------


def test_once_frozen_nothing_compiles_whatever_is_called(session: Any) -> None:
    earlier = stand_in.compiler().counts.recompiled  # by other tests of this process
    session.alloc_caches([kv(), kv(group=1, kv_dtype="bfloat16")], [40, 40], "slots")
    programs = [capture(session, writing, tokens=tokens) for tokens in (4, 2)]
    double, sink = capture(session, DOUBLE), capture(session, ADD, TWO)
    session.freeze()
    session.freeze()
    before = vars(stand_in.compiler().counts).copy()
    rng = np.random.default_rng(3)
    for count in (0, 1, 15, 16, 17, 35):
        ids = rng.permutation(np.arange(1, 40))[:count].astype(np.int32)
        for cache in (0, 1):
            session.write_pages(cache, ids, session.read_pages(cache, ids)).wait()
            session.copy_pages(cache, ids, ids[::-1].copy()).wait()
        programs[0](step(count))
        programs[1](step(count, 2))
        sink(step(), {"a": double(step(1)).handle("y"), "b": double(step(2)).handle("y")})
    assert vars(stand_in.compiler().counts) == before and before["recompiled"] == earlier
    for call in (
        lambda: capture(session, DOUBLE),
        lambda: session.load({}, None, {}),
        lambda: session.alloc_caches([], [], "slots"),
    ):
        with pytest.raises(SessionFrozen, match="call thaw first"):
            call()
    with pytest.raises(ContractViolation, match="thaw the session first"):
        session.lane.compile(fx.symbolic_trace(lambda x: (x,)), [session.caches[0].arrays["k"]], ())
    session.thaw()
    assert np.array_equal(capture(session, DOUBLE)(step(1)).result("y"), step(1)["x"] * 2)
    assert compiled() == before["compiled"] + 1


def test_pages_move_before_a_freeze_and_after_a_thaw_too(session: Any) -> None:
    session.alloc_caches([kv(v_dim=0)], [3], "slots")
    pages = {"k": np.random.default_rng(1).standard_normal((1, 4, 2, 4)).astype(np.float32)}
    session.write_pages(0, np.array([2]), pages)
    session.freeze()
    session.thaw()
    session.alloc_caches([kv(v_dim=0), kv()], [5], "slots")
    session.write_pages(0, np.array([4]), pages)
    assert np.array_equal(session.read_pages(0, np.array([4, 2]))["k"], np.stack([pages["k"][0], np.zeros((4, 2, 4))]))


def test_the_caller_may_be_in_the_inference_mode_or_not(session: Any) -> None:
    def everything(made: Any) -> list[Any]:
        made.write_pages(0, np.array([1]), made.read_pages(0, np.array([1])))
        return [program(step(1)).result(name) for program, name in zip(programs, ("y", "sum"), strict=True)]

    for first in (True, False):
        own = started()
        with torch.inference_mode(first):
            own.alloc_caches([kv()], [3], "slots")
            programs = [capture(own, DOUBLE), capture(own, writing)]
            own.freeze()
        found = []
        for mode in (not first, first):
            with torch.inference_mode(mode):
                found.append(everything(own))
        assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])
        own.close()


def test_after_close_every_call_raises_and_close_is_idempotent(session: Any) -> None:
    session.alloc_caches([kv()], [2], "slots")
    program = capture(session, DOUBLE)
    session.close()
    session.close()
    ids = np.zeros(1, np.int32)
    for call in (
        session.freeze,
        session.thaw,
        lambda: program(step()),
        lambda: session.load({}, None, {}),
        lambda: session.update({}),
        lambda: session.alloc_caches([], [], "slots"),
        lambda: session.read_pages(0, ids),
        lambda: session.write_pages(0, ids, {}),
        lambda: session.copy_pages(0, ids, ids),
        lambda: capture(session, DOUBLE),
    ):
        with pytest.raises(SessionClosed):
            call()
