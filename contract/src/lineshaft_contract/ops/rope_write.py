"""The composite `rope_write_kv`: rotary embeddings, and the rotated keys with their values into the paged cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cache import FNUZ, FP8, SPARSE, make_cache, new_rows, specialise_write, write_kv
from lineshaft_contract.ops.cases import FUZZ_DTYPES, Paging, fuzz_paging, paged_step, seeded, short, variants
from lineshaft_contract.ops.checks import base_problem, refuse
from lineshaft_contract.ops.rope import rope, specialise_rope
from lineshaft_contract.ops.spec import EXACT, CacheArg, Call, Case, HostArray, Numerics, OpSpec, Size
from lineshaft_contract.problems import RopeScaling, RopeWriteProblem, itemsize

Pages = Mapping[str, HostArray]
NAME = "rope_write_kv"


def specs() -> tuple[OpSpec, ...]:
    return (
        OpSpec(
            name=NAME,
            signature=(
                "rope_write_kv(cache, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] | None, positions int32[T], step) "
                "-> (q, cache)"
            ),
            problem=RopeWriteProblem,
            specialise=_specialise,
            infer=lambda p, call: (call.spec(1), "cache"),
            reference=rope_write_kv,
            cases=_cases,
            fuzz=_fuzz,
            copied=frozenset({"cache.v"}),
            required=False,
            consumes=("cache",),
            default=_rotated_then_written,
            parts=lambda p: {"rope": p.rope},
            flops=lambda p: 3 * p.rows * (p.q_heads + p.kv_heads) * p.dim,
            moved=lambda p: 2 * p.rows * (p.q_heads * p.head_dim * itemsize(p.dtype) + p.page_bytes // p.page_size),
        ),
    )


# ---- reference -------------------------------------------------------------------------------------------------


def rope_write_kv(
    problem: RopeWriteProblem,
    cache: Pages,
    q: HostArray,
    k: HostArray,
    v: HostArray | None,
    positions: HostArray,
    step: Any,
    *,
    num: Numerics = EXACT,
) -> tuple[HostArray, dict[str, HostArray]]:
    """q rotated as by `rope`, and a copy of the cache with the rotated k, and v as it is, written as by `write_kv`.

    The rotated k may be rounded to the executed dtype before it is rounded to the pages', as the default decomposition
    does, or at once.
    """
    q, k = rope(problem, q, k, positions, num=num)
    return q, write_kv(problem, cache, k, v, step, num=num)


def _rotated_then_written(
    ops: Any, problem: RopeWriteProblem, cache: Any, q: Any, k: Any, v: Any, positions: Any, step: Any
) -> tuple[Any, Any]:
    q, k = ops.rope(q, k, positions)
    return q, ops.write_kv(cache, k, v, step)


# ---- shapes ----------------------------------------------------------------------------------------------------


def _specialise(base: Any, call: Call) -> RopeWriteProblem:
    declared = base_problem(NAME, base, RopeWriteProblem)
    cache, q, k, v, positions, step = call.args
    written = specialise_write(NAME, cache, k, v, step)
    if written != replace(declared.kv, rows=written.rows):
        refuse(NAME, f"a cache of {written.describe()}", declared.kv.describe())
    if written.kv_scheme != "none":
        refuse(NAME, f"kv_scheme {written.kv_scheme!r}", "none: rope and write_kv write a cache with scales")
    return RopeWriteProblem.of(specialise_rope(NAME, declared.rope, q, k, positions), written)


# ---- cases -----------------------------------------------------------------------------------------------------

_UNUSED = (np.nan, np.inf, -np.inf)
"""What lies where no key is live: numbers would count in the norms by which the written keys are judged."""
_MIXED = Paging(((1, 20), (5, 5), (0, 7), (3, 37)), padding=3)
_LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
_TURNS: dict[str, Any] = {"interleaved": True, "dim": 6, "qk_dim": 10, "attention_factor": 1.25}
_VARIANTS: dict[str, tuple[Paging, dict[str, Any], str]] = {
    "mixed/page16": (_MIXED, {}, "padding tokens, NaN among them, go to page 0 and nowhere else"),
    "mixed/interleaved-page16": (_MIXED, {"interleaved": True}, "value 2i turns with 2i + 1"),
    "mixed/partial-d8of16": (_MIXED, {"dim": 8}, "values beyond dim pass unchanged"),
    "mixed/grown-partial": (_MIXED, {"dim": 8, "attention_factor": 1.5}, "the rotated grow, values beyond dim do not"),
    "mixed/interleaved-grown-d6of10": (_MIXED, _TURNS, ""),
    "mixed/llama3-d32": (_MIXED, {"dim": 32, "qk_dim": 32, "scaling": _LLAMA3}, ""),
    "mixed/positions_shifted": (
        replace(_MIXED, shifted=True), {"max_position": 2048}, "positions turn; slots say where to write",
    ),
    "mixed/query0": (Paging(((0, 9), (2, 20), (0, 33), (1, 5), (0, 16))), {}, "query length 0: fully cached prompts"),
    "decode/mha-d64-page16": (
        Paging(((1, 3), (1, 17), (1, 16))), {"q_heads": 3, "kv_heads": 3, "dim": 64, "qk_dim": 64, "v_dim": 64}, "",
    ),
    "mixed/gqa3-d64-page32": (
        replace(_MIXED, page_size=32), {"q_heads": 6, "dim": 64, "qk_dim": 64, "v_dim": 64}, "pages of whole vectors",
    ),
    "decode/gqa8-page24": (
        Paging(((1, 25), (1, 24), (1, 1)), page_size=24), {"q_heads": 8, "kv_heads": 1},
        "pages that 32 does not divide",
    ),
    "decode/d80-page5": (Paging(((1, 9), (2, 11)), page_size=5), {"dim": 80, "qk_dim": 80, "v_dim": 80}, ""),
    "decode/page1": (Paging(((1, 3), (1, 1)), page_size=1), {}, ""),
    "prefill/page20-group1": (Paging(((21, 21),), page_size=20, group=1), {"group": 1}, "slots are of its own group"),
    "all_padding/page16": (Paging(((0, 0), (0, 0)), padding=4), {}, "the empty step is legal, writes to page 0 alone"),
    "keys_alone/page16": (_MIXED, {"v_dim": 0}, "v is None where the cache holds no values"),
    "bf16_pages/page16": (_MIXED, {"kv_dtype": "bfloat16"}, "what is stored is the rotated key, rounded to the pages'"),
    "fp8_pages/e4m3fn": (_MIXED, {"kv_dtype": "float8_e4m3fn"}, "a rotated key beyond the range saturates"),
    "fp8_pages/e5m2": (_MIXED, {"kv_dtype": "float8_e5m2", "dim": 8}, "a rotated key beyond the range saturates"),
    "fnuz/e4m3fnuz": (_MIXED, {"kv_dtype": "float8_e4m3fnuz"}, FNUZ),
    "high_ids/page4": (
        Paging(((1, 9), (2, 6)), 4, pool=70_000), {"kv_heads": 1, "q_heads": 2, "dim": 8, "qk_dim": 8, "v_dim": 8},
        SPARSE,
    ),
    "prefill/d128-page128": (
        Paging(((130, 260), (9, 9)), page_size=128), {"q_heads": 8, "dim": 128, "qk_dim": 128, "v_dim": 128}, "",
    ),
}  # fmt: skip
_FULL = ("prefill/d128-page128",)


def _cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, [name for name in _VARIANTS if name not in _FULL], _FULL):
        case_id = f"{name}-{short(dtype)}"
        yield _case(case_id, draw(case_id), dtype, *_VARIANTS[name])


def _case(
    case_id: str, rng: np.random.Generator, dtype: str, paging: Paging, fields: Mapping[str, Any], why: str = ""
) -> Case:
    given = {
        "q_heads": 4, "kv_heads": 2, "dim": 16, "base": 10000.0, "max_position": 512, "qk_dim": 16, "v_dim": 12,
        "kv_dtype": dtype, "page_size": paging.page_size, "rows": paging.tokens, **fields,
    }  # fmt: skip
    problem = RopeWriteProblem(dtype=dtype, head_dim=given["qk_dim"], **given)
    paged = paged_step(rng, paging)
    cache = CacheArg(make_cache(rng, problem, paged, garbage=_UNUSED))
    k, v = (new_rows(rng, problem.kv, paging, dim) for dim in (problem.qk_dim, problem.v_dim))
    q = rng.standard_normal((problem.rows, problem.q_heads, problem.head_dim))
    q[paging.tokens - paging.padding :] = np.nan
    return Case(case_id, problem, (cache, q, k, v, paged.step.arrays["positions"], paged.step), why=why)


def _fuzz(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 7])
    dtype, kv_dtype = str(pick.choice(FUZZ_DTYPES)), str(pick.choice(["", "", "bfloat16", *FP8]))
    dim, kv_heads = 2 * int(pick.integers(1, 65)), int(pick.integers(1, 5))
    fields = {
        "dim": dim, "qk_dim": dim + int(pick.choice([0, 6])), "v_dim": int(pick.choice([0, 8, 64, 80])),
        "kv_heads": kv_heads, "q_heads": kv_heads * int(pick.integers(1, 5)), "kv_dtype": kv_dtype or dtype,
        "base": float(pick.choice([1e4, 5e5])), "interleaved": bool(pick.random() < 0.3),
    }  # fmt: skip
    return _case(f"fuzz/{n}-{short(dtype)}", rng, dtype, fuzz_paging(pick), fields)
