"""The paged cache: writing keys and values, moving pages and slots, and what each `kv_scheme` stores.

Canonical pages are {"k": [N, page, Hkv, D], "v": [N, page, Hkv, Dv]} in `kv_dtype`, without "v" where `v_dim` is 0.
Schemes `token_head` and `block` add "k_scale" and "v_scale" in float32: [N, page, Hkv], or [N, page, Hkv, D / 32]
(`KVProblem.page_arrays`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from lineshaft_contract.ops.cases import (
    FUZZ_DTYPES,
    GARBAGE,
    PagedStep,
    Paging,
    fuzz_paging,
    paged_step,
    seeded,
    short,
    variants,
)
from lineshaft_contract.ops.checks import cache_problem, expect, refuse
from lineshaft_contract.ops.spec import (
    EXACT,
    CacheArg,
    Call,
    Case,
    HostArray,
    Numerics,
    OpSpec,
    Size,
    Tolerance,
    numpy_dtype,
)
from lineshaft_contract.problems import SCALE_BLOCK, KVProblem
from lineshaft_contract.steps import ArraySpec

Pages = Mapping[str, HostArray]


def specs() -> tuple[OpSpec, ...]:
    return (_write_kv_spec(), _read_pages_spec(), *(_consumer(name) for name in _CONSUMERS))


def _write_kv_spec() -> OpSpec:
    return OpSpec(
        name="write_kv",
        signature="write_kv(cache, k [T, Hkv, D], v [T, Hkv, Dv] | None, step, *, kv_scales) -> cache",
        problem=KVProblem,
        specialise=lambda base, call: specialise_write("write_kv", *call.args),
        infer=lambda p, call: "cache",
        reference=write_kv,
        cases=_write_cases,
        fuzz=_fuzz_write,
        tolerance=Tolerance(exact=True),
        consumes=("cache",),
        optional={"kv_scales": "kv_scheme"},
        moved=lambda p: 2 * p.rows * p.page_bytes // p.page_size,
    )


def _read_pages_spec() -> OpSpec:
    return OpSpec(
        name="read_pages",
        signature=(
            "read_pages(cache, ids int32[n]) -> (k [n, page, Hkv, D], v [n, page, Hkv, Dv], scales if "
            "the pages hold any); ids padded with 0"
        ),
        problem=KVProblem,
        specialise=lambda base, call: _specialise_ids("read_pages", call, 1),
        infer=_infer_read,
        reference=read_pages,
        cases=_read_cases,
        tolerance=Tolerance(exact=True),
        required=False,
        moved=lambda p: 2 * p.rows * p.page_bytes,
    )


_CONSUMERS = ("write_pages", "copy_pages", "copy_slots")


def _consumer(name: str) -> OpSpec:
    table: dict[str, tuple[str, Callable[..., Any], Callable[..., Iterable[Case]], int]] = {
        "write_pages": ("(cache, ids int32[n], pages {name: [n, page, ...]}) -> cache", write_pages, _put_cases, 1),
        "copy_pages": ("(cache, src int32[n], dst int32[n]) -> cache; padded with 0", copy_pages, _copy_page_cases, 2),
        "copy_slots": ("(cache, src int32[n], dst int32[n]) -> cache; padded with 0", copy_slots, _copy_slot_cases, 2),
    }
    signature, reference, cases, ids = table[name]
    return OpSpec(
        name=name,
        signature=name + signature,
        problem=KVProblem,
        specialise=lambda base, call: _specialise_ids(name, call, ids),
        infer=lambda p, call: "cache",
        reference=reference,
        cases=cases,
        tolerance=Tolerance(exact=True),
        required=False,
        consumes=("cache",),
        moved=lambda p: 2 * p.rows * p.page_bytes // (p.page_size if name == "copy_slots" else 1),
    )


# ---- references ------------------------------------------------------------------------------------------------


def write_kv(
    problem: KVProblem,
    cache: Pages,
    k: HostArray,
    v: HostArray | None,
    step: Any,
    *,
    num: Numerics = EXACT,
    kv_scales: HostArray | None = None,
) -> dict[str, HostArray]:
    """Store token t's key and value at slot t of the group's slots; a copy of the cache with the writes.

    v is None where the cache holds no values. Slots of page 0 are scribble space: their content means nothing.
    """
    slots = step.arrays[f"slots.{problem.group}"].astype(np.int64)
    out = {name: pages.copy() for name, pages in cache.items()}
    for index, (name, new) in enumerate((("k", k), ("v", v))):
        if new is not None:
            with np.errstate(divide="ignore", invalid="ignore"):  # padding tokens may be NaN, scales of an empty step 0
                stored = encode(problem, name, new, None if kv_scales is None else kv_scales[index])
            for part, values in stored.items():
                pages = out[part]
                flat = pages.reshape(-1, *pages.shape[2:])
                flat[slots] = values.astype(pages.dtype, copy=False)
    return out


def read_pages(
    problem: KVProblem, cache: Pages, ids: HostArray, *, num: Numerics = EXACT
) -> HostArray | tuple[HostArray, ...]:
    """Pages `ids` of every array of the cache, in canonical order; a bare array if there is only one."""
    out = tuple(pages[ids] for pages in cache.values())
    first: HostArray = out[0]
    return out if len(out) > 1 else first


def write_pages(
    problem: KVProblem, cache: Pages, ids: HostArray, pages: Pages, *, num: Numerics = EXACT
) -> dict[str, HostArray]:
    """A copy of the cache with `pages` at `ids`."""
    out = {name: held.copy() for name, held in cache.items()}
    for name, values in pages.items():
        out[name][ids] = values
    return out


def copy_pages(
    problem: KVProblem, cache: Pages, src: HostArray, dst: HostArray, *, num: Numerics = EXACT
) -> dict[str, HostArray]:
    """A copy of the cache with page src[i] at dst[i]; all reads come before all writes."""
    return write_pages(problem, cache, dst, {name: pages[src] for name, pages in cache.items()})


def copy_slots(
    problem: KVProblem, cache: Pages, src: HostArray, dst: HostArray, *, num: Numerics = EXACT
) -> dict[str, HostArray]:
    """A copy of the cache with slot src[i] at dst[i]; all reads come before all writes."""
    out = {name: held.copy() for name, held in cache.items()}
    for name, held in cache.items():
        flat = (-1, *held.shape[2:])
        out[name].reshape(flat)[dst] = held.reshape(flat)[src]
    return out


# ---- schemes ---------------------------------------------------------------------------------------------------


def encode(problem: KVProblem, name: str, x: HostArray, scale: HostArray | None) -> dict[str, HostArray]:
    """What the cache stores for x [T, Hkv, D], as "k" or "v": x / scale in float32, saturated, rounded to even.

    scheme      kv_scales (k and v)   scale of a value
    none        not passed            1
    tensor      f32[2]                kv_scales
    head        f32[2, Hkv]           kv_scales[head]
    token_head  f32[2]                kv_scales * the stored scale, which is max |x| of (token, head) / largest code
    block       f32[2]                the same per 32 values of the head
    """
    if problem.kv_dtype == problem.dtype and problem.kv_scheme == "none":
        return {name: x}
    values = x.astype(np.float64 if problem.kv_dtype == "float64" else np.float32)
    if problem.kv_scheme in ("none", "tensor", "head"):
        return {name: to_codes(values if scale is None else values / _per_head(scale), problem.kv_dtype)}
    assert scale is not None
    grouped = _grouped(problem, values / scale)
    stored = np.abs(grouped).max(-1) / largest_code(problem.kv_dtype)
    codes = to_codes(grouped / np.where(stored > 0, stored, 1)[..., None], problem.kv_dtype)
    return {name: codes.reshape(x.shape), f"{name}_scale": stored.reshape(_scale_shape(problem, x.shape))}


def decode(
    problem: Any, name: str, cache: Pages, pages: HostArray, scale: HostArray | None, num: Numerics
) -> HostArray:
    """Keys or values of `pages` [n], widened and scaled: [n * page, Hkv, D]."""
    stored = num.load(cache[name][pages])
    flat = stored.reshape(-1, *stored.shape[2:])
    if scale is None:
        return flat
    if problem.kv_scheme in ("tensor", "head"):
        out: HostArray = flat * num.load(_per_head(scale))
        return out
    factors = num.load(cache[f"{name}_scale"][pages]).reshape(*flat.shape[:2], -1, 1) * num.load(scale)
    scaled: HostArray = (_grouped(problem, flat) * factors).reshape(flat.shape)
    return scaled


def _per_head(scale: HostArray) -> HostArray:
    return scale if np.ndim(scale) == 0 else scale[:, None]


def _grouped(problem: Any, x: HostArray) -> HostArray:
    """x [T, Hkv, D] -> [T, Hkv, groups, values that share a scale]."""
    return x.reshape(*x.shape[:2], -1, x.shape[2] if problem.kv_scheme == "token_head" else SCALE_BLOCK)


def _scale_shape(problem: KVProblem, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if problem.kv_scheme == "token_head" else (*shape[:2], shape[2] // SCALE_BLOCK)


def largest_code(kv_dtype: str) -> float:
    """The largest finite value that pages of `kv_dtype` hold; 127 for int8."""
    if kv_dtype == "int8":
        return 127.0
    return float(ml_dtypes.finfo(numpy_dtype(kv_dtype)).max)  # type: ignore[no-untyped-call]


def to_codes(x: HostArray, kv_dtype: str) -> HostArray:
    """x rounded to `kv_dtype`, ties to even; a finite x beyond its range saturates to the largest finite value."""
    top = largest_code(kv_dtype)
    clipped = np.where(np.isfinite(x), np.clip(x, -top, top), x)
    out: HostArray = (np.rint(clipped) if kv_dtype == "int8" else clipped).astype(numpy_dtype(kv_dtype))
    return out


# ---- shapes ----------------------------------------------------------------------------------------------------


def specialise_write(op: str, cache: Any, k: Any, v: Any, step: Any) -> KVProblem:
    """The cache's problem with the number of rows that are written to it; raises ContractViolation."""
    problem = cache_problem(op, cache)
    k = expect(op, "k", k, (None, problem.kv_heads, problem.qk_dim), problem.dtype)
    if (v is None) != (problem.v_dim == 0):
        refuse(op, f"v = {type(v).__name__}", f"{'None' if not problem.v_dim else 'an array'} for this cache")
    if v is not None:
        expect(op, "v", v, (k.shape[0], problem.kv_heads, problem.v_dim), problem.dtype)
    expect(op, "step slots", step.arrays.get(f"slots.{problem.group}"), k.shape[:1], "int32")
    return replace(problem, rows=k.shape[0])


def _specialise_ids(op: str, call: Call, count: int) -> KVProblem:
    problem = cache_problem(op, call.args[0])
    first = expect(op, "ids", call.args[1], (None,), "int32")
    if count == 2:
        expect(op, "dst", call.args[2], first.shape, "int32")
    return replace(problem, rows=first.shape[0])


def _infer_read(problem: KVProblem, call: Call) -> ArraySpec | tuple[ArraySpec, ...]:
    found = tuple(ArraySpec((problem.rows, *shape), dtype) for shape, dtype in problem.page_arrays.values())
    return found if len(found) > 1 else found[0]


# ---- cases -----------------------------------------------------------------------------------------------------

FNUZ = "fp8 codes read as the other flavour are twice or half their value: https://github.com/vllm-project/vllm/issues/45562"
SPARSE = (
    "page ids above 65 535: https://github.com/ROCm/ATOM/issues/702, "
    "int32 offsets: https://github.com/vllm-project/vllm/issues/50427"
)
FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
INT8 = {"kv_dtype": "int8"}
BLOCKS = {**INT8, "kv_scheme": "block", "qk_dim": 64, "v_dim": 32}
WHOLE = {"qk_dim": 64, "v_dim": 32}
"""Heads that kernels take which work on vectors of 32."""
_MIXED = Paging(((1, 20), (5, 5), (0, 7), (3, 37)), padding=3)
_LONG = Paging(((1, 40), (1, 1), (5, 37), (0, 7), (33, 33)), 32, padding=3)
_WRITES: dict[str, tuple[Paging, dict[str, Any], str]] = {
    "mixed/page16": (_MIXED, {}, "write_kv stores at its slots alone; those of page 0 may repeat"),
    "mixed/query0": (Paging(((0, 9), (2, 20), (0, 33), (1, 5), (0, 16))), {}, "query length 0: fully cached prompts"),
    "mixed/positions_shifted": (replace(_MIXED, shifted=True), {}, "positions are for RoPE only: slots say where"),
    "decode/page1-d64": (Paging(((1, 3), (1, 1)), page_size=1), {"qk_dim": 64, "v_dim": 64}, ""),
    "decode/page8-d80": (Paging(((1, 9), (2, 17)), page_size=8), {"kv_heads": 1, "qk_dim": 80, "v_dim": 80}, ""),
    "decode/page24": (Paging(((1, 25), (1, 24), (1, 1)), page_size=24), {}, "pages that 32 does not divide"),
    "prefill/page128-d256": (Paging(((7, 130),), page_size=128), {"kv_heads": 1, "qk_dim": 256, "v_dim": 256}, ""),
    "all_padding/page16": (Paging(((0, 0), (0, 0)), padding=4), {}, "the empty step is legal, writes to page 0 alone"),
    "prefill/page20-group1": (Paging(((21, 21),), page_size=20, group=1), {"group": 1}, "slots are of its own group"),
    "value_in_key/page16": (_MIXED, {"v_dim": 0}, ""),
    "high_ids/page4": (Paging(((1, 9), (2, 6)), 4, pool=70_000), {"kv_heads": 1, "qk_dim": 8, "v_dim": 8}, SPARSE),
    "bf16_pages/page16": (_MIXED, {"kv_dtype": "bfloat16"}, ""),
    "fp8_saturates/page16": (_MIXED, {"kv_dtype": "float8_e4m3fn"}, "a finite value beyond the range saturates"),
    "fp8_saturates/e5m2": (_MIXED, {"kv_dtype": "float8_e5m2"}, "beyond the range a value saturates, not to inf"),
    "fnuz/e4m3fnuz": (_MIXED, {"kv_dtype": "float8_e4m3fnuz"}, FNUZ + "; 0x80 is NaN there, so that -0 is stored as 0"),
    "fnuz/e5m2fnuz": (_MIXED, {"kv_dtype": "float8_e5m2fnuz"}, FNUZ + "; 0x80 is NaN there, so that -0 is stored as 0"),
    "kv_tensor/page16": (_MIXED, {"kv_dtype": "float8_e4m3fn", "kv_scheme": "tensor"}, ""),
    "kv_tensor/e4m3fnuz": (_MIXED, {"kv_dtype": "float8_e4m3fnuz", "kv_scheme": "tensor"}, FNUZ),
    "kv_tensor/int8": (_MIXED, {**INT8, "kv_scheme": "tensor"}, "codes saturate at 127"),
    "kv_head/page16": (_MIXED, {"kv_dtype": "float8_e5m2", "kv_scheme": "head"}, ""),
    "kv_token_head/page16": (_MIXED, {**INT8, "kv_scheme": "token_head"}, "a token of zeros is stored with scale 0"),
    "kv_block/page16": (_MIXED, BLOCKS, "a token of zeros is stored with scale 0"),
    "kv_token_head/page32-d64": (_LONG, {**INT8, **WHOLE, "kv_scheme": "token_head"}, "scales lie as codes do"),
    "kv_head/page32-d64": (_LONG, {**INT8, **WHOLE, "kv_scheme": "head"}, "each head has scales of its own"),
    "kv_tensor/page32-d64": (_LONG, {"kv_dtype": "float8_e5m2", **WHOLE, "kv_scheme": "tensor"}, ""),
    "fp8_saturates/page32-d64": (_LONG, {"kv_dtype": "float8_e4m3fn", **WHOLE}, "beyond the range a value saturates"),
}  # fmt: skip
_LARGE_WRITES: dict[str, tuple[Paging, dict[str, Any], str]] = {
    "sparse_ids/page16": (
        Paging(((1, 40), (3, 35), (0, 9)), pool=70_000), {"kv_heads": 1, "qk_dim": 32, "v_dim": 32},
        SPARSE + "; reaches byte 2^27 of an array, as an offset of 2^31 values does not fit 512 MB",
    ),
}  # fmt: skip


def make_cache(
    rng: np.random.Generator,
    problem: Any,
    paged: PagedStep,
    v_dim: int | None = None,
    garbage: Sequence[float] = GARBAGE,
) -> dict[str, HostArray]:
    """Canonical pages for `problem`: random where live, garbage elsewhere. Quantized pages hold codes, scales are
    powers of two, and NaN where nothing is live."""
    dims = {"k": problem.qk_dim, "v": problem.v_dim if v_dim is None else v_dim}
    dead, pages = _stored_garbage(problem.kv_dtype, garbage), {}
    live = paged.live[..., None, None]
    for name, dim in dims.items():
        if dim:
            filled = paged.fill(rng, (problem.kv_heads, dim), dead, problem.kv_dtype)
            pages[name] = np.where(live, np.rint(filled * 16), filled) if problem.kv_scheme != "none" else filled
            if problem.kv_dtype.startswith("float8"):
                pages[name][paged.live, :, 0] = -0.0  # 0x80, which is NaN where codes are taken for fnuz
    if problem.kv_scheme in ("token_head", "block"):
        for name in list(pages):
            groups = dims[name] // SCALE_BLOCK if problem.kv_scheme == "block" else 1
            scales = np.where(live, 2.0 ** rng.integers(-7, -4, (*pages[name].shape[:3], groups)), np.nan)
            pages[f"{name}_scale"] = (scales if problem.kv_scheme == "block" else scales[..., 0]).astype(np.float32)
    return pages


def _stored_garbage(kv_dtype: str, garbage: Sequence[float]) -> Sequence[float]:
    """Garbage that pages of `kv_dtype` can hold."""
    if kv_dtype == "int8":
        return (127.0, -128.0)
    top = largest_code(kv_dtype)
    return [np.clip(value, -top, top) if np.isfinite(value) else value for value in garbage]


def make_scales(rng: np.random.Generator, problem: Any) -> dict[str, HostArray]:
    """{"kv_scales": distinct powers of two} where the scheme wants them, so that encoding is exact."""
    if problem.kv_scheme == "none":
        return {}
    shape = (2, problem.kv_heads) if problem.kv_scheme == "head" else (2,)
    powers = rng.permutation(math.prod(shape)) - 3.0 - math.prod(shape) // 2
    return {"kv_scales": (2.0**powers).astype(np.float32).reshape(shape)}


def _write_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    table = {**_WRITES, **_LARGE_WRITES}
    for name, dtype in variants(size, _WRITES, _LARGE_WRITES):
        if name in _LARGE_WRITES and dtype == "float64":
            continue  # 570 MB
        case_id = f"{name}-{short(dtype)}"
        yield _write_case(case_id, draw(case_id), dtype, *table[name])


def _write_case(
    case_id: str, rng: np.random.Generator, dtype: str, paging: Paging, fields: Mapping[str, Any], why: str = ""
) -> Case:
    problem = _problem(dtype, paging, fields)
    paged = paged_step(rng, paging)
    cache = CacheArg(make_cache(rng, problem, paged))
    k, v = (new_rows(rng, problem, paging, dim) for dim in (problem.qk_dim, problem.v_dim))
    return Case(case_id, problem, (cache, k, v, paged.step), make_scales(rng, problem), why)


def _fuzz_write(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 6])
    dtype = str(pick.choice(FUZZ_DTYPES))
    dims = {name: int(pick.choice([8, 32, 64, 80])) for name in ("qk_dim", "v_dim")}
    fields = {"kv_heads": int(pick.integers(1, 5)), **dims, **fuzz_stored(pick, dtype)}
    return _write_case(f"fuzz/{n}-{short(dtype)}", rng, dtype, fuzz_paging(pick), fields)


def fuzz_stored(pick: np.random.Generator, dtype: str) -> dict[str, str]:
    """A random `kv_dtype`, that of `dtype` often, and a `kv_scheme` whose encoding of `new_rows` is exact with it."""
    kv_dtype = str(pick.choice([dtype, dtype, "bfloat16", "int8", "int8", *FP8]))
    schemes = ("tensor", "head", "token_head") if kv_dtype == "int8" else ("none", "tensor", "head")
    scheme = str(pick.choice(schemes)) if kv_dtype in ("int8", *FP8) else "none"
    return {"kv_dtype": kv_dtype, "kv_scheme": scheme}


def _problem(dtype: str, paging: Paging, fields: Mapping[str, Any]) -> KVProblem:
    given = {"kv_heads": 2, "qk_dim": 16, "v_dim": 12, "kv_dtype": dtype, **fields}
    return KVProblem(dtype=dtype, page_size=paging.page_size, rows=paging.tokens, **given)


def new_rows(rng: np.random.Generator, problem: KVProblem, paging: Paging, dim: int) -> HostArray | None:
    """Keys or values [T, Hkv, D] whose encoding is exact: on a coarse grid, whose largest step is a whole code.

    Values that round to -0 are among them; padding tokens are NaN.
    """
    if not dim:
        return None
    shape = (paging.tokens, problem.kv_heads, dim)
    if problem.kv_scheme in ("token_head", "block"):
        x = rng.integers(-127, 128, shape) / 64
        x[..., ::SCALE_BLOCK] = 127 / 64
        groups = dim // SCALE_BLOCK if problem.kv_scheme == "block" else 1
        x *= np.repeat(2.0 ** rng.integers(-2, 3, (*shape[:2], groups)), dim // groups, axis=2)
        x[:1] = 0.0
    elif problem.kv_scheme != "none":
        x = rng.integers(-15, 16, shape) / 8.0
        x[..., :2] = 1e6, -1e6  # beyond every range
    else:
        x = rng.standard_normal(shape)
        if problem.kv_dtype.startswith("float8"):
            x *= 0.7 * largest_code(problem.kv_dtype)
            x[..., :2] = -0.0, -1e-9
    x[paging.tokens - paging.padding :] = np.nan
    return x


_POOL = Paging(((3, 40), (1, 17)), pool=12)
_STORED: dict[str, dict[str, Any]] = {
    "": {}, "value_in_key": {"v_dim": 0}, "e4m3fn": {"kv_dtype": "float8_e4m3fn"},
    "e5m2fnuz": {"kv_dtype": "float8_e5m2fnuz"}, "token_head": {**INT8, "kv_scheme": "token_head"}, "block": BLOCKS,
}  # fmt: skip
"""What pages that are moved hold, by the last part of a case's name."""


def _pool_case(rng: np.random.Generator, dtype: str, name: str, rows: int) -> tuple[KVProblem, CacheArg]:
    problem = replace(_problem(dtype, _POOL, _STORED[name.partition("-")[2]]), rows=rows)
    garbage = (np.nan, 0.1, -np.inf, 1 / 3, -2 / 3)  # moved as it is
    return problem, CacheArg(make_cache(rng, problem, paged_step(rng, _POOL), garbage=garbage))


def _named(names: Iterable[str]) -> list[str]:
    """Case names, and the first of them for everything else that pages may hold."""
    given = list(names)
    return [*given, *(f"{given[0]}-{stored}" for stored in _STORED if stored)]


def _ids(*values: int) -> HostArray:
    return np.array(values, np.int32)


def _read_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    ids = {"padded": _ids(7, 3, 0, 0), "one": _ids(11), "repeated": _ids(2, 2, 5)}
    for name, dtype in variants(size, _named(ids)):
        case_id, wanted = f"{name}-{short(dtype)}", ids[name.partition("-")[0]]
        problem, cache = _pool_case(draw(case_id), dtype, name, len(wanted))
        yield Case(case_id, problem, (cache, wanted))


def _put_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    ids = {"padded": _ids(4, 9, 0, 0), "one": _ids(11)}
    for name, dtype in variants(size, _named(ids)):
        case_id, wanted = f"{name}-{short(dtype)}", ids[name.partition("-")[0]]
        rng = draw(case_id)
        problem, cache = _pool_case(rng, dtype, name, len(wanted))
        new = {key: rng.permutation(held)[: len(wanted)] for key, held in cache.pages.items()}
        yield Case(case_id, problem, (cache, wanted, CacheArg(new)), why="ids are padded with 0, the null page")


def _copy_page_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    pairs = {
        "padded": (_ids(4, 9, 0, 0), _ids(5, 1, 0, 0)), "swap": (_ids(2, 3), _ids(3, 2)), "none": (_ids(0), _ids(0)),
        "chain": (_ids(2, 3, 4), _ids(3, 4, 5)), "fan_out": (_ids(6, 6), _ids(7, 8)),
    }  # fmt: skip
    return _copy_cases(rng, size, pairs)


def _copy_slot_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    pairs = {
        "padded": (_ids(70, 35, 0, 0), _ids(71, 190, 0, 0)), "swap": (_ids(40, 41), _ids(41, 40)),
        "into_null": (_ids(100, 101), _ids(3, 3)), "chain": (_ids(30, 31, 32), _ids(31, 32, 33)),
    }  # fmt: skip
    return _copy_cases(rng, size, pairs)


def _copy_cases(
    rng: np.random.Generator, size: Size, pairs: Mapping[str, tuple[HostArray, HostArray]]
) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _named(pairs)):
        case_id = f"{name}-{short(dtype)}"
        src, dst = pairs[name.partition("-")[0]]
        problem, cache = _pool_case(draw(case_id), dtype, name, len(src))
        why = "all reads come before all writes" if name in ("swap", "chain") else ""
        yield Case(case_id, problem, (cache, src, dst), why=why)
