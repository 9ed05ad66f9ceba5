"""Kernels over heads: rotary embeddings, and keys and values into the pages of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from lineshaft_contract.ops.rope import rope_frequencies
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import KVProblem, RopeProblem, RopeWriteProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_cpu.engine.caches import PANELS, SLOTS
from lineshaft_cpu.engine.kernels.common import (
    EXTENT,
    Job,
    Recipe,
    TapeArray,
    c_int,
    c_int64,
    c_void_p,
    copied,
    dense,
    extent,
    floats_only,
    grain,
    live_of,
    narrow,
    operand,
    recipe,
    tail_of,
)
from lineshaft_cpu.native import Native
from lineshaft_cpu.priority import NATIVE

PANEL, MOST_KEYS, PANELLED = 32, 256, NATIVE + 1
PAGES = (
    ("keys", c_void_p), ("values", c_void_p),
    *((name, c_int64) for name in ("page_size", "heads", "k_dim", "page_v_dim", "page_narrow", "page_slots")),
)  # fmt: skip
CODING = (
    ("kind", c_int64), ("k_scales", c_void_p), ("v_scales", c_void_p), ("kv_scales", c_void_p), ("per_head", c_int64),
)  # fmt: skip
KINDS: Final = MappingProxyType({"int8": 0, "float8_e4m3fn": 3, "float8_e5m2": 4})
"""What `native/codes.h` calls the codes that pages may hold."""
NUMBERS: Final = 5
CODED = frozenset({"kv_scheme"})
ROPE = Job(
    "rope",
    (
        *EXTENT, ("grain", c_int64),
        *((name, c_void_p) for name in ("q", "k", "q_out", "k_out", "cos", "sin", "positions")),
        *((name, c_int64) for name in ("q_heads", "k_heads", "head_dim", "dim", "q_stride", "k_stride")),
        ("narrow", c_int), ("interleaved", c_int),
        *((name, c_void_p) for name in ("k_pages", "v_pages", "v", "slots")),
        *((name, c_int64) for name in ("v_bytes", "v_stride_bytes", "k_bytes")), *PAGES,
    ),
)  # fmt: skip
WRITE = Job(
    "write",
    (
        *EXTENT, ("grain", c_int64), ("x", c_void_p), ("pages", c_void_p), ("slots", c_void_p), ("bytes", c_int64),
        ("stride", c_int64), ("held", c_int64),
    ),
)  # fmt: skip
PUT = Job(
    "put",
    (
        *EXTENT, ("grain", c_int64), *PAGES, ("k", c_void_p), ("v", c_void_p), ("slots", c_void_p),
        ("k_stride", c_int64), ("v_stride", c_int64), *CODING,
    ),
)  # fmt: skip
TURNS = frozenset({"interleaved", "attention_factor"})


def recipes(native: Native) -> Iterator[Recipe]:
    yield recipe("rope", "rope", bind_rope, rope_supports, handles=TURNS)
    yield recipe("write_kv", "write_kv", bind_write, same_pages, layout=SLOTS)
    yield recipe("write_kv_panels", "write_kv", bind_put, panels_support, PANELLED, layout=PANELS, handles=CODED)
    yield recipe(
        "rope_write_kv_panels", "rope_write_kv", bind_rope_write, rope_panels_support, PANELLED, layout=PANELS,
        handles=TURNS,
    )  # fmt: skip
    yield recipe("rope_write_kv", "rope_write_kv", bind_rope_write, rope_write_supports, layout=SLOTS, handles=TURNS)


def rope_supports(problem: RopeProblem) -> str | None:
    if problem.max_position < 1:
        return "needs max_position, because it reads angles from a table"
    if problem.scaling.kind not in ("none", "linear", "llama3", "yarn"):
        return f"does not know rope scaling {problem.scaling.kind!r}"
    return floats_only(problem)


def same_pages(problem: Any) -> str | None:
    if problem.kv_dtype != problem.dtype:
        return f"works on pages of the executed dtype {problem.dtype}, not {problem.kv_dtype}"
    return floats_only(problem)


def rope_write_supports(problem: RopeWriteProblem) -> str | None:
    return same_pages(problem) or rope_supports(problem)


def pages_in_panels(problem: Any) -> str | None:
    if problem.page_size % PANEL or problem.page_size > MOST_KEYS:
        return f"holds pages of a multiple of {PANEL} keys up to {MOST_KEYS}, not of {problem.page_size}"
    if problem.kv_scheme == "none" and problem.kv_dtype == problem.dtype:
        return floats_only(problem)
    if problem.kv_dtype not in KINDS:
        return f"works on pages of {', '.join(KINDS)} or the executed dtype {problem.dtype}, not {problem.kv_dtype}"
    if problem.kv_scheme == "block":
        return "scales scores and weights by key, and not the parts of a head apart, as kv_scheme 'block' does"
    return floats_only(problem)


def panels_support(problem: KVProblem) -> str | None:
    if problem.v_dim == 0 or problem.qk_dim % PANEL or problem.v_dim % PANEL:
        return f"holds keys and values of a multiple of {PANEL}, not of {problem.qk_dim} and {problem.v_dim}"
    return pages_in_panels(problem)


def rope_panels_support(problem: RopeWriteProblem) -> str | None:
    return same_pages(problem) or panels_support(problem) or rope_supports(problem)


def panels_of(problem: KVProblem, cache: Cache) -> dict[str, Any]:
    """The fields of `Panels` in `native/heads.h`."""
    return {
        "keys": cache.arrays["k"], "values": cache.arrays.get("v"), "page_size": problem.page_size,
        "heads": problem.kv_heads, "k_dim": problem.qk_dim, "page_v_dim": problem.v_dim,
        "page_narrow": narrow(problem.dtype), "page_slots": slots_of(problem, cache),
    }  # fmt: skip


def slots_of(problem: KVProblem, cache: Cache) -> int:
    """How many slots a cache has."""
    return int(cache.arrays["k"].shape[0]) * problem.page_size


def coding_of(problem: Any, cache: Cache, kv_scales: Any, tape: Any) -> tuple[dict[str, Any], list[TapeArray]]:
    """The fields of `Coding` in `native/heads.h`, and what of them a call reads; kv_scales f32[2] or f32[2, Hkv]."""
    given = None if kv_scales is None else operand(kv_scales, "float32")
    given = dense(tape, given) if isinstance(given, TapeArray) else given
    fields = {
        "kind": KINDS.get(problem.kv_dtype, NUMBERS), "k_scales": cache.arrays.get("k_scale"),
        "v_scales": cache.arrays.get("v_scale"), "kv_scales": given, "per_head": int(problem.kv_scheme == "head"),
    }  # fmt: skip
    return fields, [given] if isinstance(given, TapeArray) else []


NO_PANELS: Final = dict.fromkeys(("page_size", "heads", "k_dim", "page_v_dim", "page_narrow", "page_slots"), 0)


def bind_put(problem: KVProblem, session: Any) -> Any:
    def write_kv(cache: Cache, k: TapeArray, v: TapeArray | None, step: StepInputs, *, kv_scales: Any = None) -> Cache:
        """k [T, Hkv, D], v [T, Hkv, Dv] -> the cache with both at the group's slots."""
        assert v is not None
        tape, slots = session.tape, dense(session.tape, step.groups[problem.group].slots)
        k, v = tokenwise(tape, k), tokenwise(tape, v)
        coding, scales = coding_of(problem, cache, kv_scales, tape)
        fields = {
            **extent(k, k.shape[0]), "live": live_of(k, slots), "grain": grain(2 * k.shape[1] * k.shape[2]),
            **panels_of(problem, cache), "k": k, "v": v, "slots": slots, "k_stride": k.strides[0],
            "v_stride": v.strides[0], **coding,
        }  # fmt: skip
        tape.add(PUT, "write_kv", (k, v, slots, *scales), (), fields)
        return cache

    return write_kv


def tables(problem: RopeProblem, session: Any) -> tuple[HostArray, HostArray]:
    """(cos, sin) float32 [max_position, dim / 2] times `attention_factor`, made once per session."""
    key = "rope", problem.dim, problem.base, problem.scaling, problem.attention_factor, problem.max_position

    def make() -> tuple[HostArray, HostArray]:
        angles = np.arange(problem.max_position, dtype=np.float64)[:, None] * rope_frequencies(problem)
        factor = problem.attention_factor
        return (factor * np.cos(angles)).astype(np.float32), (factor * np.sin(angles)).astype(np.float32)

    made: tuple[HostArray, HostArray] = session.constant(key, make)
    return made


def tokenwise(tape: Any, x: TapeArray) -> TapeArray:
    """x [T, H, D] without gaps inside a token."""
    return x if tail_of(x) >= x.shape[1] * x.shape[2] else copied(tape, x)


def turn(
    problem: RopeProblem, session: Any, q: TapeArray, k: TapeArray, positions: TapeArray
) -> tuple[TapeArray, TapeArray, dict[str, Any]]:
    """(q, k, the fields of a job) that turns them and writes nothing."""
    tape, (cos, sin) = session.tape, tables(problem, session)
    q, k, positions = tokenwise(tape, q), tokenwise(tape, k), dense(tape, positions)
    live = live_of(positions, q)
    outs = [tape.new(x.shape, x.dtype, live) for x in (q, k)]
    heads = q.shape[1] + k.shape[1]
    fields = {
        **extent(outs[0], q.shape[0]), "grain": grain(heads * problem.head_dim), "q": q, "k": k, "q_out": outs[0],
        "k_out": outs[1], "cos": cos, "sin": sin, "positions": positions, "q_heads": q.shape[1], "k_heads": k.shape[1],
        "head_dim": problem.head_dim, "dim": problem.dim, "q_stride": q.strides[0], "k_stride": k.strides[0],
        "narrow": narrow(q.dtype), "interleaved": int(problem.interleaved), "k_pages": None, "v_pages": None, "v": None,
        "slots": None, "v_bytes": 0, "v_stride_bytes": 0, "k_bytes": 0, "keys": None, "values": None, **NO_PANELS,
    }  # fmt: skip
    return outs[0], outs[1], fields


def bind_rope(problem: RopeProblem, session: Any) -> Any:
    def rope(q: TapeArray, k: TapeArray, positions: TapeArray) -> tuple[TapeArray, TapeArray]:
        """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated."""
        q_out, k_out, fields = turn(problem, session, q, k, positions)
        session.tape.add(ROPE, "rope", arrays_of(fields, "q", "k", "positions"), (q_out, k_out), fields)
        return q_out, k_out

    return rope


def bind_rope_write(problem: RopeWriteProblem, session: Any) -> Any:
    def rope_write_kv(
        cache: Cache, q: TapeArray, k: TapeArray, v: TapeArray | None, positions: TapeArray, step: StepInputs
    ) -> tuple[TapeArray, Cache]:
        """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] or None -> q rotated, and the cache with k rotated and v."""
        tape, slots = session.tape, dense(session.tape, step.groups[problem.group].slots)
        q_out, k_out, fields = turn(problem, session, q, k, positions)
        fields |= {"slots": slots, "k_bytes": k_out.row_bytes()}
        slotwise = {"k_pages": cache.arrays["k"], "page_slots": slots_of(problem, cache)}
        fields |= panels_of(problem, cache) if cache.layout == PANELS else slotwise
        if v is not None:
            v = tokenwise(tape, v)
            width = v.shape[1] * v.shape[2] * v.itemsize
            fields |= {"v": v, "v_bytes": width, "v_stride_bytes": v.row_bytes()}
            fields |= {} if cache.layout == PANELS else {"v_pages": cache.arrays["v"]}
        reads = arrays_of(fields, "q", "k", "v", "positions", "slots")
        tape.add(ROPE, "rope_write_kv", reads, (q_out, k_out), fields)
        return q_out, cache

    return rope_write_kv


def bind_write(problem: KVProblem, session: Any) -> Any:
    def write_kv(cache: Cache, k: TapeArray, v: TapeArray | None, step: StepInputs) -> Cache:
        """k [T, Hkv, D], v [T, Hkv, Dv] or None -> the cache with both at the group's slots."""
        tape, slots = session.tape, dense(session.tape, step.groups[problem.group].slots)
        for name, x in (("k", k), ("v", v)):
            if x is not None:
                x = tokenwise(tape, x)
                nbytes = x.shape[1] * x.shape[2] * x.itemsize
                fields = {
                    **extent(x, x.shape[0]), "live": live_of(x, slots), "grain": grain(nbytes), "x": x,
                    "pages": cache.arrays[name], "slots": slots, "bytes": nbytes, "stride": x.row_bytes(),
                    "held": slots_of(problem, cache),
                }  # fmt: skip
                tape.add(WRITE, "write_kv", (x, slots), (), fields)
        return cache

    return write_kv


def arrays_of(fields: dict[str, Any], *names: str) -> tuple[TapeArray, ...]:
    return tuple(fields[name] for name in names if isinstance(fields[name], TapeArray))
