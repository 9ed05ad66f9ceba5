"""Attention by FlashAttention 2 and 3, where they are installed, over pages as this kit keeps them.

Entry points: `flash_attn.flash_attn_varlen_func` of version 2.8, whose `block_table` makes it paged, and
`flash_attn_interface.flash_attn_with_kvcache` of version 3. They are imported when a plan has chosen them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lineshaft_contract.kernels import HostPrepare
from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import HostStep, StepInputs, StepShape
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.pages import SLOTS_LAYOUT
from lineshaft_triton.priority import DECLARED
from lineshaft_triton.targets import Target

NAME = "flash_attend"
PAGE_MULTIPLE = 256
MOST_HEAD = 256


def common(problem: AttendProblem) -> str | None:
    """What both versions decline."""
    if problem.dtype not in ("bfloat16", "float16"):
        return f"computes in bfloat16 and float16, not in {problem.dtype}"
    if problem.kv_dtype != problem.dtype:
        return f"reads pages of the executed dtype, not of {problem.kv_dtype}"
    if problem.qk_dim > MOST_HEAD or problem.qk_dim % 8 or problem.v_dim != problem.qk_dim:
        sizes = f"multiples of 8 up to {MOST_HEAD}"
        return f"takes heads of {sizes}, keys as values, not {problem.qk_dim} and {problem.v_dim}"
    if problem.q_heads % problem.kv_heads:
        return f"groups query heads evenly, {problem.kv_heads} do not divide {problem.q_heads}"
    return None


def supports(problem: AttendProblem) -> str | None:
    if problem.page_size % PAGE_MULTIPLE:
        return f"reads pages of a multiple of {PAGE_MULTIPLE} tokens, not of {problem.page_size} (cache.page_size)"
    return common(problem)


class KeyStarts:
    """Where the keys of each row would start, were they not paged: int32[B + 1], on the device."""

    def __init__(self, problem: AttendProblem, session: Any) -> None:
        self._group = problem.group
        self.starts = torch.zeros(problem.rows + 1, dtype=torch.int32, device=session.device)

    def prepare(self, host: HostStep) -> None:
        lens = torch.from_numpy(host[f"context_lens.{self._group}"])
        self.starts[1:].copy_(lens.cumsum(0, dtype=torch.int32))


def _key_starts(problem: AttendProblem, session: Any) -> KeyStarts:
    found: KeyStarts = session.constant((NAME, problem), lambda: KeyStarts(problem, session))
    return found


def prepare(problem: AttendProblem, shape: StepShape, session: Any) -> HostPrepare:
    return _key_starts(problem, session).prepare


def bind(problem: AttendProblem, session: Any) -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    keys, finish = _key_starts(problem, session), _finish(problem, session)

    def attend(q: torch.Tensor, cache: Cache, step: StepInputs) -> torch.Tensor:
        """q [T, Hq, D] -> [T, Hq, D]."""
        k, v = _paged(problem, cache)
        out = flash_attn_varlen_func(
            q, k, v, step.query_starts, keys.starts, _longest(problem), problem.pages * problem.page_size,
            softmax_scale=problem.scale, causal=True, softcap=problem.softcap,
            block_table=step.groups[problem.group].page_table,
        )  # fmt: skip
        return finish(out, step)

    return attend


def bind_third(problem: AttendProblem, session: Any) -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_with_kvcache

    finish = _finish(problem, session)

    def attend(q: torch.Tensor, cache: Cache, step: StepInputs) -> torch.Tensor:
        """q [T, Hq, D] -> [T, Hq, D]."""
        view = step.groups[problem.group]
        k, v = _paged(problem, cache)
        out = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=view.context_lens, page_table=view.page_table, cu_seqlens_q=step.query_starts,
            max_seqlen_q=_longest(problem), softmax_scale=problem.scale, causal=True, softcap=problem.softcap,
        )  # fmt: skip
        return finish(out, step)

    return attend


def _paged(problem: AttendProblem, cache: Cache) -> list[torch.Tensor]:
    shape = (-1, problem.page_size, problem.kv_heads, problem.qk_dim)
    return [cache.arrays[name].view(shape) for name in ("k", "v")]


def _longest(problem: AttendProblem) -> int:
    return problem.max_query or problem.tokens


def _finish(problem: AttendProblem, session: Any) -> Callable[[torch.Tensor, StepInputs], torch.Tensor]:
    """Padding tokens belong to no row, and what is returned for them is whatever was there: they become 0."""
    at = torch.arange(problem.tokens, dtype=torch.int32, device=session.device)[:, None, None]

    def finish(out: torch.Tensor, step: StepInputs) -> torch.Tensor:
        return out.masked_fill_(at >= step.query_starts[-1], 0)

    return finish


def recipes(where: Target) -> list[tuple[Recipe, str]]:
    """Both versions, each with the module that it needs; the third is for Hopper."""

    def supports_third(problem: AttendProblem) -> str | None:
        return common(problem) if where.name == "sm90" else f"has kernels for sm90, not for {where.name}"

    shared: dict[str, Any] = {
        "layout": SLOTS_LAYOUT, "priority": DECLARED, "handles": frozenset({"softcap"}),
    }  # fmt: skip
    return [
        (recipe("flash_attend", "attend", bind, supports=supports, prepare=prepare, **shared), "flash_attn"),
        (recipe("flash3_attend", "attend", bind_third, supports=supports_third, **shared), "flash_attn_interface"),
    ]
