"""Kernels are measured in sessions of their backend: packed weights too, all that share a tie, and only what can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lineshaft.config import validate_options
from lineshaft.plan import Resolver
from lineshaft.registry import discover, load_attribute
from lineshaft_contract.backends import Backend, World
from lineshaft_contract.errors import Unsupported
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.problems import (
    AttendProblem,
    CollectiveProblem,
    KVProblem,
    LinearProblem,
    PointwiseProblem,
    Problem,
    SampleProblem,
)
from lineshaft_contract.reference.backend import reference_kernel
from lineshaft_contract.reference.session import ReferenceSession
from lineshaft_contract.sessions import Tree
from lineshaft_contract.steps import ArraySpec
from lineshaft_contract.timing import Contest, fastest, measure, unmeasurable, values
from lineshaft_contract.weights import Local, Param, Weight

OPS = all_ops()
ADD = PointwiseProblem(dtype="float32", rows=2, width=8)
X = ArraySpec((2, 8), "float32")
BACKENDS = {"numpy": {}, "cpu": {}, "tpu": {"platform": "cpu", "cache_dir": "off"}}


class NoCheckpoint:
    """A checkpoint that nobody may read."""


def unread(checkpoint: object, place: object) -> Local:
    raise AssertionError("the model's own values were read")


def backend(name: str) -> Backend:
    info = discover().named(name)
    made: Backend = load_attribute(info.factory)(validate_options(info, BACKENDS[name]), World(threads=1))
    return made


def kernel(name: str, seconds: float = 0.0, breaks: str = "", op: str = "add") -> Kernel:
    """The reference of an op that takes so long for a call, or raises at "bind" or at a "call" after capture."""
    made = reference_kernel(OPS[op])
    calls = [0]

    def bind(problem: Any, session: Any) -> Callable[..., Any]:
        if breaks == "bind":
            raise RuntimeError("no such device")
        run = made.bind(problem, session)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if breaks == "call" and calls[0] > 4:  # of one capture
                raise ValueError("lost\nits way")
            time.sleep(seconds)
            return run(*args, **kwargs)

        return call

    return replace(made, name=name, bind=bind, tunable=True)


def race(*kernels: Kernel) -> Any:
    return measure(Contest(OPS["add"], ADD, kernels, [[X, X], {}]), ReferenceSession, NoCheckpoint())


def test_the_fastest_is_taken_and_every_time_is_told() -> None:
    choice = race(kernel("a_slow", 0.004), kernel("b_fast"), kernel("c_slower", 0.008))
    assert choice.kernel == "b_fast" and not choice.failed
    assert list(choice.seconds) == ["a_slow", "b_fast", "c_slower"]
    assert 0.004 < choice.seconds["a_slow"] < choice.seconds["c_slower"] < 0.1
    assert "b_fast" in str(choice) and str(choice).count(" ms") == 3


def test_a_small_difference_goes_to_the_name_that_sorts_first() -> None:
    assert fastest({"b": 1.0, "a": 1.029, "c": 0.9999}) == "a"
    assert fastest({"b": 1.0, "a": 1.031}) == "b"
    assert fastest({"b": 0.0, "a": 0.0}) == "a"


@pytest.mark.parametrize(("breaks", "told"), [("bind", "RuntimeError"), ("call", "ValueError")])
def test_a_kernel_that_raises_is_left_out_with_its_reason(breaks: str, told: str) -> None:
    choice = race(kernel("a_broken", breaks=breaks), kernel("b"), kernel("c", 0.003))
    assert choice.kernel == "b" and list(choice.seconds) == ["b", "c"]
    assert list(choice.failed) == ["a_broken"] and told in choice.failed["a_broken"]
    assert "\n" not in choice.failed["a_broken"]


def test_where_all_fail_the_error_names_each() -> None:
    with pytest.raises(Unsupported, match=r"add .*rows=2.*: a raises RuntimeError.*; b raises .*: no such device"):
        race(kernel("a", breaks="bind"), kernel("b", breaks="bind"))


def test_every_session_is_closed() -> None:
    made: list[ReferenceSession] = []

    def session() -> ReferenceSession:
        assert all(other.closed for other in made)
        made.append(ReferenceSession())
        return made[-1]

    measure(Contest(OPS["add"], ADD, [kernel("a", breaks="bind"), kernel("b")], [[X, X], {}]), session, NoCheckpoint())
    assert len(made) == 2 and all(other.closed for other in made)


def test_large_operands_are_called_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    counted = kernel("a")
    bind = counted.bind
    monkeypatch.setattr("lineshaft_contract.timing.MOST_BYTES", 2 * X.nbytes + 1)

    def counting(problem: Any, session: Any) -> Any:
        run = bind(problem, session)
        return lambda *args: calls.append(1) or run(*args)

    race(replace(counted, bind=counting))
    assert len(calls) == 1 + 7  # capture, and a call in each round


def test_made_up_values_suit_every_operand() -> None:
    floats = values((3, 5000), "bfloat16").astype(np.float32)
    assert floats.shape == (3, 5000) and floats.min() >= 0 and floats.max() <= 1 and floats.std() > 0.2
    assert not values((4,), "int32").any() and values((4,), "int32").dtype == np.int32
    assert (values((9,), "float32") == values((9,), "float32")).all()


def test_what_depends_on_a_step_or_on_other_ranks_is_not_measured() -> None:
    paged = {"kv_heads": 1, "qk_dim": 4, "v_dim": 4, "page_size": 8, "kv_dtype": "float32", "dtype": "float32"}
    assert "rank" in unmeasurable(CollectiveProblem(dtype="float32", axis=("tp",), size=2, shape=(4,)))
    assert "lengths" in unmeasurable(AttendProblem(q_heads=1, scale=1.0, **paged))  # type: ignore[arg-type]
    assert "lengths" in unmeasurable(KVProblem(**paged))  # type: ignore[arg-type]
    assert unmeasurable(ADD) == ""


def linear(scheme: str) -> tuple[Problem, Tree, Sequence[Param]]:
    problem = LinearProblem(dtype="float32", n=48, k=64, m=3, scheme=scheme)
    param = Param("w", "w", (48, 64), "float32", {"linear": replace(problem, m=0)}, unread)
    return problem, [[ArraySpec((3, 64), "float32"), Weight(0, "w", param.problems, "")], {}], [param]


@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_packing_of_a_weight_is_measured_by_its_own_backend(name: str, scheme: str) -> None:
    problem, operands, params = linear(scheme)
    made = backend(name)
    taken = Resolver(name, made.kernels(), {}).candidates("linear", problem).taken
    assert taken
    for layout in {k.layout for k in taken}:
        kernels = [k for k in taken if k.layout == layout]
        choice = measure(
            Contest(OPS["linear"], problem, kernels, operands, params), lambda: made.session(0), NoCheckpoint()
        )
        assert not choice.failed and all(seconds > 0 for seconds in choice.seconds.values())
        assert choice.seconds.keys() == {k.name for k in kernels}


@pytest.mark.parametrize("name", BACKENDS)
def test_operands_may_be_named_lists_and_integers(name: str) -> None:
    made = backend(name)
    sample = SampleProblem(dtype="float32", vocab=64, rows=2)
    inputs = {key: ArraySpec((2,), "float32") for key in ("temperature", "top_p", "min_p")}
    inputs["top_k"] = ArraySpec((2,), "int32")
    given: Tree = [[ArraySpec((2, 64), "float32"), inputs, ArraySpec((2, 1), "float32")], {}]
    concat = PointwiseProblem(dtype="float32", rows=2, width=16)
    for op, problem, operands in (("sample", sample, given), ("concat", concat, [[[X, X], 1], {}])):
        kernels = Resolver(name, made.kernels(), {}).candidates(op, problem).taken
        assert kernels
        choice = measure(Contest(OPS[op], problem, kernels, operands), lambda: made.session(0), NoCheckpoint())
        assert not choice.failed, choice


def test_a_backend_without_times_of_its_own_is_timed_by_the_clock() -> None:
    class Untimed(ReferenceSession):
        def capture(self, *args: Any, **kwargs: Any) -> Any:
            program = super().capture(*args, **kwargs)

            def run(*given: Any) -> Any:
                return replace(program(*given), kernel_seconds=float("nan"))

            return run

    choice = measure(Contest(OPS["add"], ADD, [kernel("a", 0.002)], [[X, X], {}]), Untimed, NoCheckpoint())
    assert 0.002 < choice.seconds["a"] < 0.05
