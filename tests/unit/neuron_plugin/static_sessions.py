"""Sessions on the stand-in, and programs for them whose forwards are a few calls of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from lineshaft_contract.backends import World
from lineshaft_contract.problems import ConstProblem, KVProblem
from lineshaft_contract.sessions import Memory, UncountedMemory
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepShape
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_neuron import stand_in
from lineshaft_neuron.collectives import SharedWorld
from lineshaft_neuron.compile_lane import CompileLane
from lineshaft_neuron.session import NeuronSession

WIDTH = 8
Forward = Callable[..., Any]


class Planned:
    """A PlannedOps without kernels: what `bind` makes of a session is what a forward gets as its ops."""

    def __init__(self, bind: Callable[[Any], Any] = lambda session: None) -> None:
        self.bind = bind

    def prepares(self, session: Any) -> list[Any]:
        return []


def started(memory: Memory | None = None, world: World | None = None, shared: SharedWorld | None = None) -> Any:
    """A session of its own lane."""
    place, groups = world or World(), shared or SharedWorld("gloo", own_dtype=False)
    return NeuronSession(CompileLane(stand_in.start()), place, groups, memory or UncountedMemory())


def layout(tokens: int = 4) -> InputLayout:
    """x float32[T, 8] and rows int32[T]."""
    return InputLayout([InputField("x", "float32", (tokens, WIDTH)), InputField("rows", "int32", (tokens,))])


def capture(
    session: Any,
    forward: Forward,
    arrays: Mapping[str, ArraySpec] | None = None,
    *,
    tokens: int = 4,
    bind: Callable[[Any], Any] = lambda session: None,
    host: frozenset[str] = frozenset(),
) -> Any:
    """A program over `layout(tokens)`."""
    shape = StepShape(tokens, 1, (), 1, tokens)
    return session.capture(forward, shape, layout(tokens), Planned(bind), arrays, host)


def giving(fn: Callable[..., Mapping[str, torch.Tensor]]) -> Forward:
    """The forward that leaves caches alone and returns fn(x, arrays, weights)."""
    return lambda ops, weights, caches, step, arrays: (fn(step.arrays["x"], arrays, weights), caches)


def step(seed: int = 0, tokens: int = 4, rows: Any = None) -> HostStep:
    """Random x, and `rows`, else 0 to T - 1."""
    made = HostStep(layout(tokens))
    made["x"][:] = np.random.default_rng(seed).standard_normal((tokens, WIDTH))
    made["rows"][:] = np.arange(tokens) if rows is None else rows
    return made


def const(name: str, values: Any) -> Param:
    """A parameter that a forward finds as a bare tensor."""
    array = np.asarray(values)
    stored = Stored("none", array.shape, {"data": array})
    problem = ConstProblem(dtype=array.dtype.name, shape=array.shape)
    return Param(name, name, array.shape, array.dtype.name, {"const": problem}, lambda *_: Local((stored,)))


def kv(**fields: Any) -> KVProblem:
    given = {"dtype": "float32", "kv_dtype": "float32", "kv_heads": 2, "qk_dim": 4, "v_dim": 4, "page_size": 4}
    return KVProblem(**{**given, **fields})


def writing(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
    """Puts x at the slots `rows`; gives the sum of the cache after that."""
    k = caches[0].arrays["k"]
    k.index_copy_(0, step.arrays["rows"].long(), step.arrays["x"].view(-1, 2, 4))
    return {"sum": k.sum(0)}, caches
