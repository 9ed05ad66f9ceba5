"""Ops without a C kernel: the contract's references, called between two runs of the team.

Slow, and exact: what a plan shows here is for dtypes and features that no kernel of the engine takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final

import numpy as np

from lineshaft_contract.binding import DENSE
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.cache import encode
from lineshaft_contract.ops.quantize import BLOCK_SCHEMES
from lineshaft_contract.ops.spec import Call, HostArray, Numerics, OpSpec
from lineshaft_contract.problems import KVProblem, LinearProblem, Problem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import ArraySpec, StepInputs
from lineshaft_contract.weights import Weight
from lineshaft_cpu.engine.arrays import TapeArray
from lineshaft_cpu.engine.caches import SLOTS
from lineshaft_cpu.engine.kernels.common import live_of
from lineshaft_cpu.engine.tape import Tape

PRIORITY = 1
_CACHED: Final = frozenset({"write_kv", "read_pages", "write_pages", "copy_pages", "copy_slots", "attend"})
_PAGES: Final = ("kv_scheme",)
_TOKENWISE: Final = frozenset(
    {
        "embed", "linear", "head_linear", "add", "silu_mul", "gelu_mul", "merge_rows", "rms_norm", "rope", "attend",
        "router_topk", "moe_combine",
    }
)  # fmt: skip
"""Ops whose results have a row for each token that they are given."""
_HANDLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "linear": ("bias", "scheme"), "head_linear": ("heads",), "embed": ("scale",), "merge_states": ("sinks",),
        "rope": ("interleaved", "attention_factor"), "router_topk": ("groups",), "sample": ("typical",),
        "apply_logits": ("mask", "edits"),
        **dict.fromkeys(("grouped_mlp", "moe_dispatch", "moe_combine"), ("bias", "swiglu_alpha", "swiglu_limit")),
        **dict.fromkeys(_CACHED, _PAGES),
        "attend": (
            *_PAGES, "causal", "window", "softcap", "sinks", "value_in_key", "return_lse", "page_starts", "key_ranges",
            "ancestors",
        ),
    }
)  # fmt: skip


def kernels(backend: str) -> list[Kernel]:
    """One for each op that is neither a collective nor made of others."""
    specs = (spec for spec in all_ops().values() if not spec.collective and spec.default is None)
    return [
        Kernel(
            name=f"cpu_reference_{spec.name}", op=spec.name, backend=backend, bind=binding(spec), priority=PRIORITY,
            layout=SLOTS if spec.name in _CACHED else DENSE if spec.weight else "", supports=supports,
            handles=frozenset(_HANDLES.get(spec.name, ())),
        )
        for spec in specs
    ]  # fmt: skip


def supports(problem: Problem) -> str | None:
    if problem.dtype.startswith("float8"):
        return f"computes in floats of 16 bits and more, not in {problem.dtype}"
    if isinstance(problem, LinearProblem) and problem.scheme in BLOCK_SCHEMES:
        return f"takes weights as numbers, not in blocks of {problem.scheme}"
    return None


def binding(spec: OpSpec) -> Callable[[Any, Any], Callable[..., Any]]:
    """Binds the op's reference: at capture, the call is recorded; in a step, it runs over the arrays in place."""

    def bind(problem: Any, session: Any) -> Callable[..., Any]:
        num = Numerics.of(problem.dtype, spec.accumulate)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            inferred = spec.infer(problem, Call(args, kwargs, {}))
            items = inferred if isinstance(inferred, tuple) else (inferred,)
            reads = arrays_in([*args, *kwargs.values()])
            live = live_of(*reads) if spec.name in _TOKENWISE else None
            made = [made_for(session.tape, item, args, live) for item in items]
            outs = [item for item in made if isinstance(item, TapeArray)]
            compute = _IN_PLACE.get(spec.name, spec.reference)

            def run() -> None:
                values = [value_of(item) for item in args]
                with np.errstate(all="ignore"):
                    found = compute(problem, *values, num=num, **{k: value_of(v) for k, v in kwargs.items()})
                results = found if isinstance(found, tuple) else (found,)
                for out, result in zip(outs, results, strict=False):
                    out.values()[...] = result

            session.tape.host(run, spec.name, reads, outs)
            return tuple(made) if isinstance(inferred, tuple) else made[0]

        return call

    return bind


def made_for(tape: Tape, item: Any, args: Any, live: TapeArray | None) -> TapeArray | Cache:
    """What an op returns: an array to be written to, or the cache that it consumed."""
    if isinstance(item, ArraySpec):
        return tape.new(item.shape, item.dtype, live)
    found: Cache = next(arg for arg in args if isinstance(arg, Cache))
    return found


def arrays_in(value: Any) -> list[TapeArray]:
    """The arrays that an argument is made of."""
    if isinstance(value, TapeArray):
        return [value]
    if isinstance(value, list | tuple):
        return [array for item in value for array in arrays_in(item)]
    if isinstance(value, dict):
        return [array for item in value.values() for array in arrays_in(item)]
    return arrays_in(value.arrays) if isinstance(value, StepInputs) else []


def value_of(value: Any) -> Any:
    """What a reference takes for an argument: values in place; rows of padding tokens are zeros, whatever they hold."""
    if isinstance(value, TapeArray):
        return zeroed(value)
    if isinstance(value, Weight):
        return value.arrays["data"]
    if isinstance(value, Cache):
        return value.arrays
    if isinstance(value, StepInputs):
        return SimpleNamespace(arrays={name: a.values() for name, a in value.arrays.items()}, shape=value.shape)
    if isinstance(value, list):
        return [value_of(item) for item in value]
    if isinstance(value, dict):
        return {name: value_of(item) for name, item in value.items()}
    return value


def zeroed(x: TapeArray) -> HostArray:
    if x.live is None:
        return x.values()
    found, live = x.values().copy(), int(x.live.values()[0])
    found[live:] = 0
    return found


# ---- caches, which the references copy -----------------------------------------------------------------------------


def write_kv(
    problem: KVProblem,
    cache: Mapping[str, HostArray],
    k: HostArray,
    v: HostArray | None,
    step: Any,
    *,
    num: Numerics,
    kv_scales: HostArray | None = None,
) -> Mapping[str, HostArray]:
    """The reference's `write_kv`, in place and without padding tokens."""
    slots, starts = step.arrays[f"slots.{problem.group}"], step.arrays.get("query_starts")
    live = slice(None if starts is None else int(starts[-1]))
    for index, (name, new) in enumerate((("k", k), ("v", v))):
        if new is not None:
            stored = encode(problem, name, new, None if kv_scales is None else kv_scales[index])
            for part, values in stored.items():
                pages = cache[part]
                pages.reshape(-1, *pages.shape[2:])[slots[live]] = values[live].astype(pages.dtype, copy=False)
    return cache


def write_pages(problem: KVProblem, cache: Any, ids: HostArray, pages: Any, *, num: Numerics) -> Any:
    """The reference's `write_pages`, in place."""
    for name, values in pages.items():
        cache[name][ids] = values
    return cache


def copy_pages(problem: KVProblem, cache: Any, src: HostArray, dst: HostArray, *, num: Numerics) -> Any:
    """The reference's `copy_pages`, in place."""
    for pages in cache.values():
        pages[dst] = pages[src]
    return cache


def copy_slots(problem: KVProblem, cache: Any, src: HostArray, dst: HostArray, *, num: Numerics) -> Any:
    """The reference's `copy_slots`, in place."""
    for pages in cache.values():
        flat = pages.reshape(-1, *pages.shape[2:])
        flat[dst] = flat[src]
    return cache


_IN_PLACE: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"write_kv": write_kv, "write_pages": write_pages, "copy_pages": copy_pages, "copy_slots": copy_slots}
)
