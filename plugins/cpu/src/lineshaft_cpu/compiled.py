"""The C kernels of `native/` as kernels of the contract: thin calls over the addresses of tensors.

Knows which tensors a kernel takes as they are; whatever it declines, the torch kernels serve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch

from lineshaft_contract.problems import (
    AttendProblem,
    KVProblem,
    NormProblem,
    PointwiseProblem,
    Problem,
    RopeProblem,
    SampleProblem,
)
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs, StepShape
from lineshaft_cpu import attention, native
from lineshaft_cpu.priority import NATIVE
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_torch.kernels.cache import consuming
from lineshaft_torch.kernels.rope import Pair, shared_table
from lineshaft_torch.kernels.rope import supports as rope_supports
from lineshaft_torch.pages import SLOTS_LAYOUT

DTYPES = ("bfloat16", "float32")
VECTOR, MOST_DIM = 32, 640
"""Attention takes head sizes in multiples of the one up to the other (`native/attend.h`)."""
WHOLE = 512
"""Rows of several queries with at most this context are attended natively; for longer ones torch's matrix products,
which use whole tiles of queries, are quicker."""

Out = torch.Tensor | None
Outs = tuple[torch.Tensor, torch.Tensor] | None


class AttendFields(ctypes.Structure):
    """`lineshaft_attend_problem` of `native/attend.h`."""

    _fields_ = [
        *((name, c_int64) for name in ("q_heads", "kv_heads", "qk_dim", "v_dim", "page_size", "v_stride", "window")),
        *((name, c_int64) for name in ("causal", "narrow", "whole")),
        ("scale", c_float), ("softcap", c_float),
    ]  # fmt: skip


@cache
def load(wanted: str) -> native.Native:
    """The library at a level, sharing the threads that torch's own kernels run on, where they are OpenMP's."""
    found = native.load(wanted)
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    found.library.lineshaft_use_team(ctypes.cast(team, c_void_p) if team is not None else None)
    return found


def is_narrow(dtype: str) -> int:
    return int(dtype == "bfloat16")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., W] as rows [R, W] without gaps inside a row."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] without gaps inside a token."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def operand(weight: Any, like: torch.Tensor) -> torch.Tensor:
    """A weight as the kernels read it: without gaps, in the dtype of `like`."""
    found: torch.Tensor = dense(weight)
    return found if found.dtype == like.dtype and found.is_contiguous() else found.to(like.dtype).contiguous()


def whole_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Recipes:
    """The recipes of all native kernels, at the level `wanted`."""

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted

    def all(self) -> Iterator[Recipe]:
        yield self._recipe("rms_norm", self._rms_norm, layout=DENSE)
        yield self._recipe("add_rms_norm", self._add_rms_norm, layout=DENSE)
        yield self._recipe("silu_mul", self._silu_mul)
        yield self._recipe("rope", self._rope, self._rope_supports, handles=frozenset({"attention_factor"}))
        yield self._recipe("argmax", self._argmax)
        yield self._recipe("write_kv", self._write_kv, attention.supports, out=False, layout=SLOTS_LAYOUT)
        yield self._recipe(
            "attend", self._attend, self._attend_supports, layout=SLOTS_LAYOUT, handles=attention.FEATURES,
            prepare=self._attend_prepare,
        )  # fmt: skip

    def _recipe(self, op: str, bind: Any, supports: Any = None, *, out: bool = True, **fields: Any) -> Recipe:
        def checked(problem: Any) -> str | None:
            return native.reason(self._wanted) or (supports or floats_only)(problem)

        return recipe(f"cpu_native_{op}", op, bind, out=out, priority=NATIVE, supports=checked, **fields)

    def _function(self, name: str, *argtypes: Any) -> Callable[..., Any]:
        return load(self._wanted).function(name, *argtypes)

    # ---- rows --------------------------------------------------------------------------------------------------

    def _norm(self) -> Callable[..., Any]:
        return self._function("norm", *[c_void_p] * 5, *[c_int64] * 4, c_float, c_int, c_int)

    def _rms_norm(self, problem: NormProblem, session: Any) -> Any:
        run, threads, narrow = self._norm(), torch.get_num_threads(), is_narrow(problem.dtype)

        def rms_norm(x: torch.Tensor, w: Any, *, out: Out = None) -> torch.Tensor:
            """x [T, H], w [H] -> x / sqrt(mean(x^2) + eps) * w, rounded once."""
            out = whole_like(x) if out is None else out
            x, w = rows_of(x), operand(w, x)
            run(
                x.data_ptr(), None, w.data_ptr(), out.data_ptr(), None, x.shape[0], problem.width,
                x.stride(0), 0, problem.eps, narrow, threads,
            )  # fmt: skip
            return out

        return rms_norm

    def _add_rms_norm(self, problem: NormProblem, session: Any) -> Any:
        run, threads, narrow = self._norm(), torch.get_num_threads(), is_narrow(problem.dtype)

        def add_rms_norm(x: torch.Tensor, r: torch.Tensor, w: Any, *, out: Outs = None) -> Any:
            """x, r [T, H] -> (rms_norm(x + r), x + r); the sum is rounded before it is normed."""
            normed, total = (whole_like(x), whole_like(x)) if out is None else out
            x, r, w = rows_of(x), rows_of(r), operand(w, x)
            run(
                x.data_ptr(), r.data_ptr(), w.data_ptr(), normed.data_ptr(), total.data_ptr(), x.shape[0],
                problem.width, x.stride(0), r.stride(0), problem.eps, narrow, threads,
            )  # fmt: skip
            return normed, total

        return add_rms_norm

    def _silu_mul(self, problem: PointwiseProblem, session: Any) -> Any:
        run = self._function("silu_mul", c_void_p, c_void_p, *[c_int64] * 3, c_int, c_int)
        threads, narrow = torch.get_num_threads(), is_narrow(problem.dtype)

        def silu_mul(x: torch.Tensor, *, out: Out = None) -> torch.Tensor:
            """x [T, 2F], gate first -> silu(gate) * up [T, F]."""
            width = x.shape[-1] // 2
            out = x.new_empty((*x.shape[:-1], width)) if out is None else out
            x = rows_of(x)
            run(x.data_ptr(), out.data_ptr(), x.shape[0], width, x.stride(0), narrow, threads)
            return out

        return silu_mul

    def _argmax(self, problem: SampleProblem, session: Any) -> Any:
        run = self._function("argmax", c_void_p, c_void_p, *[c_int64] * 3, c_int, c_int)
        threads, narrow = torch.get_num_threads(), is_narrow(problem.dtype)

        def argmax(logits: torch.Tensor, *, out: Out = None) -> torch.Tensor:
            """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
            out = torch.empty(logits.shape[0], dtype=torch.int32) if out is None else out
            logits = rows_of(logits)
            run(logits.data_ptr(), out.data_ptr(), *logits.shape, logits.stride(0), narrow, threads)
            return out

        return argmax

    # ---- heads -------------------------------------------------------------------------------------------------

    def _rope(self, problem: RopeProblem, session: Any) -> Any:
        run = self._function("rope", *[c_void_p] * 7, *[c_int64] * 7, c_int, c_int)
        threads, narrow = torch.get_num_threads(), is_narrow(problem.dtype)
        cos, sin = shared_table(problem, session)

        def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, out: Pair | None = None) -> Pair:
            """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated, halves of a head against each other."""
            results = (q.new_empty(q.shape), k.new_empty(k.shape)) if out is None else out
            q, k, positions = heads_of(q), heads_of(k), positions.contiguous()
            run(
                q.data_ptr(), k.data_ptr(), results[0].data_ptr(), results[1].data_ptr(), cos.data_ptr(),
                sin.data_ptr(), positions.data_ptr(), *q.shape[:2], k.shape[1], q.shape[2], problem.dim, q.stride(0),
                k.stride(0), narrow, threads,
            )  # fmt: skip
            return results

        return rope

    @staticmethod
    def _rope_supports(problem: RopeProblem) -> str | None:
        return floats_only(problem) or rope_supports(problem)

    def _write_kv(self, problem: KVProblem, session: Any) -> Any:
        run = self._function("write_rows", *[c_void_p] * 3, *[c_int64] * 3)

        def write_kv(
            problem: KVProblem, cache: Cache, k: torch.Tensor, v: torch.Tensor | None, step: StepInputs
        ) -> Cache:
            """k [T, Hkv, D], v [T, Hkv, Dv] or None -> the cache with both stored at the group's slots."""
            slots = step.groups[problem.group].slots
            for name, new in (("k", k), ("v", v)):
                if new is not None:
                    new, size = heads_of(new), new.itemsize
                    row = new.shape[1] * new.shape[2] * size
                    pages = cache.arrays[name]
                    run(new.data_ptr(), pages.data_ptr(), slots.data_ptr(), new.shape[0], row, new.stride(0) * size)
            return cache

        return consuming(write_kv)(problem, session)

    # ---- attention ---------------------------------------------------------------------------------------------

    def _attend(self, problem: AttendProblem, session: Any) -> Any:
        run = self._function("attend", *[c_void_p] * 10, *[c_int64] * 4, c_int)
        threads, fields = torch.get_num_threads(), ctypes.byref(attend_fields(problem))
        planner = attention.shared_planner(problem, session, WHOLE) if leaves_rows(problem) else None

        def attend(
            q: torch.Tensor, cache: Cache, step: StepInputs, *, sinks: torch.Tensor | None = None, out: Any = None
        ) -> Any:
            """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse f32[T, Hq])."""
            result, lse = attention.results(problem, q, out)
            q, group = heads_of(q), step.groups[problem.group]
            k, table = cache.arrays["k"], group.page_table
            v = k if problem.value_in_key else cache.arrays["v"]
            sinks = None if sinks is None else operand(sinks, q)
            plan = None if planner is None else planner.plan(step, q.shape[0])
            if plan is not None and plan.gaps:
                attention.clear(result, lse)
            run(
                fields, q.data_ptr(), k.data_ptr(), v.data_ptr(), result.data_ptr(),
                None if lse is None else lse.data_ptr(), None if sinks is None else sinks.data_ptr(),
                step.query_starts.data_ptr(), group.context_lens.data_ptr(), table.data_ptr(), table.shape[0],
                q.shape[0], table.shape[1], q.stride(0), threads,
            )  # fmt: skip
            if plan is not None:
                attention.attend_rows(problem, plan.groups, q, cache, result, lse, sinks)
            return result if lse is None else (result, lse)

        return attend

    @staticmethod
    def _attend_prepare(problem: AttendProblem, shape: StepShape, session: Any) -> Any:
        return attention.shared_planner(problem, session, WHOLE).prepare if leaves_rows(problem) else None

    @staticmethod
    def _attend_supports(problem: AttendProblem) -> str | None:
        for dim in (problem.qk_dim, problem.v_dim):
            if dim % VECTOR or not 0 < dim <= MOST_DIM:
                return f"attends heads of a multiple of {VECTOR} up to {MOST_DIM} values, not of {dim}"
        return floats_only(problem) or attention.supports(problem)


def floats_only(problem: Problem) -> str | None:
    return None if problem.dtype in DTYPES else f"computes in {' or '.join(DTYPES)}, not in {problem.dtype}"


def leaves_rows(problem: AttendProblem) -> bool:
    """Whether a step may have rows that the native kernel leaves to torch."""
    return problem.max_query != 1 and problem.pages * problem.page_size > WHOLE


def attend_fields(problem: AttendProblem) -> AttendFields:
    return AttendFields(
        problem.q_heads, problem.kv_heads, problem.qk_dim, problem.v_dim, problem.page_size,
        problem.qk_dim if problem.value_in_key else problem.v_dim, problem.window, int(problem.causal),
        is_narrow(problem.dtype), WHOLE, problem.scale, problem.softcap,
    )  # fmt: skip
