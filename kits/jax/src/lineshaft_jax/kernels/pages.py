"""How this kit lays a paged cache out: "hnd", per array [N, Hkv, page, D padded to the session's lanes].

A platform without lanes (1) is one where XLA updates arrays of narrow floats by way of whole copies in float32, so
there they are kept as unsigned integers of their width. `stored` and `loaded` hide that.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from lineshaft_contract.problems import KVProblem
from lineshaft_jax.arrays import Array, as_bits, jax_dtype, of_dtype, round_up

LAYOUT = "hnd"

Arrays = Mapping[str, Array]


def cache_specs(problem: KVProblem, pages: int, lanes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of a cache of `pages` pages.

    Keys and values are [N, Hkv, page, D rounded up to `lanes`], their scales [N, Hkv, page, 1 or D / 32].
    """
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, (shape, dtype) in problem.page_arrays.items():
        page, heads, *rest = shape
        last = rest[0] if rest else 1
        width = last if name.endswith("_scale") else round_up(last, lanes)
        specs[name] = ((pages, heads, page, width), _held(dtype, lanes))
    return specs


def _held(dtype: str, lanes: int) -> str:
    narrow = jax_dtype(dtype).itemsize < 4 and dtype != "int8"
    return f"uint{8 * jax_dtype(dtype).itemsize}" if narrow and lanes == 1 else dtype


def stored(values: Array, array: Array) -> Array:
    """values [..., D] of the dtype that pages hold, as `array` [..., Dp] keeps them: padded by zeros, maybe as bits."""
    kept = values if values.dtype == array.dtype else as_bits(values)
    padding = array.shape[-1] - values.shape[-1]
    return jnp.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, padding)]) if padding else kept


def loaded(kept: Array, width: int, dtype: str) -> Array:
    """What `stored` made of values [..., width] of `dtype`."""
    return of_dtype(kept[..., :width], dtype)


def to_canonical(problem: KVProblem, arrays: Arrays) -> dict[str, Array]:
    """Pages [n, Hkv, page, Dp] of each array -> the canonical form, {"k": [n, page, Hkv, D], ...}."""
    canonical = {}
    for name, (shape, dtype) in problem.page_arrays.items():
        values = loaded(arrays[name], (*shape, 1)[2], dtype)
        canonical[name] = values.swapaxes(1, 2).reshape(-1, *shape)
    return canonical


def from_canonical(problem: KVProblem, pages: Arrays, like: Arrays) -> dict[str, Array]:
    """Canonical pages {"k": [n, page, Hkv, D], ...} -> [n, Hkv, page, Dp], as the cache's arrays `like` keep them."""
    kept = {}
    for name, (shape, _) in problem.page_arrays.items():
        values = jnp.asarray(pages[name]).reshape(-1, *shape[:2], (*shape, 1)[2])
        kept[name] = stored(values.swapaxes(1, 2), like[name])
    return kept
