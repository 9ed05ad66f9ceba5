"""What pages hold under each `kv_scheme`: codes of keys and values, and back.

`lineshaft_contract.ops.cache.encode` says what each scheme's scales are.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lineshaft_contract.problems import SCALE_BLOCK, KVProblem
from lineshaft_jax.arrays import Array, jax_dtype, widened

SCHEMES = ("tensor", "head", "token_head", "block")


def encode(problem: KVProblem, name: str, x: Array, scale: Array | None) -> dict[str, Array]:
    """x [T, Hkv, D], the "k" or "v" of T tokens, with the scale of this array, f32[] or f32[Hkv] -> what pages hold:
    {name: [T, Hkv, D]} and, under token_head and block, {name_scale: f32[T, Hkv, 1 or D / 32]}."""
    if problem.kv_dtype == problem.dtype and problem.kv_scheme == "none":
        return {name: x}
    values = widened(x)
    if scale is None:
        return {name: to_codes(values, problem.kv_dtype)}
    if problem.kv_scheme in ("tensor", "head"):
        return {name: to_codes(values / scale[..., None], problem.kv_dtype)}
    grouped = (values / scale).reshape(*x.shape[:2], *groups(problem.kv_scheme, x.shape[2]))
    stored = jnp.abs(grouped).max(-1) / largest_code(problem.kv_dtype)
    codes = to_codes(grouped / jnp.where(stored > 0, stored, 1)[..., None], problem.kv_dtype)
    return {name: codes.reshape(x.shape), f"{name}_scale": stored}


def decode(scheme: str, codes: Array, scale: Array, stored: Array | None) -> Array:
    """codes [n, Hkv, ..., page, D], this array's scale f32[] or f32[Hkv], stored f32[n, Hkv, ..., page, 1 or D / 32]
    -> the values in float32."""
    values = widened(codes)
    if stored is None:
        return values * scale.reshape(-1, *([1] * (values.ndim - 2)))
    grouped = values.reshape(*values.shape[:-1], *groups(scheme, values.shape[-1]))
    return (grouped * (stored * scale)[..., None]).reshape(values.shape)


def groups(scheme: str, dim: int) -> tuple[int, int]:
    """(how many scales a head of `dim` values has, values that share one)."""
    return (1, dim) if scheme == "token_head" else (dim // SCALE_BLOCK, SCALE_BLOCK)


def largest_code(kv_dtype: str) -> float:
    """The largest finite value that pages of `kv_dtype` hold; 127 for int8."""
    return 127.0 if kv_dtype == "int8" else float(jnp.finfo(jax_dtype(kv_dtype)).max)


def to_codes(x: Array, kv_dtype: str) -> Any:
    """f32 x rounded to `kv_dtype`, ties to even; a finite x beyond its range becomes the largest finite value."""
    top = largest_code(kv_dtype)
    clipped = jnp.where(jnp.isfinite(x), jnp.clip(x, -top, top), x)
    return (jnp.round(clipped) if kv_dtype == "int8" else clipped).astype(jax_dtype(kv_dtype))
