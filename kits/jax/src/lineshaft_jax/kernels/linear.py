"""Products with weights: densely packed ones, rows of 8-bit codes with one scale each, groups of 4-bit codes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, INT4, LEAST_SCALE, LINEAR_SCHEMES, weight_scheme
from lineshaft_contract.packing import weight_packing
from lineshaft_contract.problems import LinearProblem
from lineshaft_jax.arrays import Array, jax_dtype, widened
from lineshaft_jax.bound import DENSE, Recipe, dense, recipe, stateless

ONE_ROW = 8
"""Rows that a product of a single bfloat16 row is padded to: XLA has no fast product of one on the CPU (4096 x 4096:
20 ms against 2 ms), and on other platforms tiles have as many rows anyway."""


def product(x: Array, w: Array) -> Array:
    """x [T, I], w [O, I] of x's dtype -> x @ w^T in float32 [T, O]; float32 operands are not narrowed."""
    tokens = x.shape[0]
    if tokens == 1 and x.dtype.itemsize == 2:
        x = jnp.pad(x, ((0, ONE_ROW - 1), (0, 0)))
    out = lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return out[:tokens]


def biased(product_f32: Array, bias: Any) -> Array:
    """f32[T, O] plus bias [O], where there is one."""
    return product_f32 if bias is None else product_f32 + widened(dense(bias))


def linear(x: Array, w: Any, *, bias: Any = None) -> Array:
    """x [T, I], w [O, I], bias [O] -> x @ w^T + bias [T, O], rounded once."""
    return biased(product(x, dense(w)), bias).astype(x.dtype)


def scaled_linear(x: Array, w: Any, *, bias: Any = None) -> Array:
    """x [T, I], w of codes "q" [O, I] and "scale" f32[O], bias [O] -> x @ (q * scale)^T + bias [T, O], rounded once.

    Codes of 8 bits are exact in bfloat16, so that the only rounding is that of the sum in float32.
    """
    out = product(x, w.arrays["q"].astype(x.dtype)) * w.arrays["scale"]
    return biased(out, bias).astype(x.dtype)


def grouped_linear(x: Array, w: Any, *, bias: Any = None) -> Array:
    """x [T, I], w of packed codes "q" uint8[O, I / 2] and "scale" f32[O, groups] (`pack_groups`), bias [O] -> x @ w^T +
    bias [T, O], rounded once. w is restored in float32, which holds each code times its scale but for one rounding."""
    packed, scale = w.arrays["q"], w.arrays["scale"]
    codes = jnp.stack((packed & 15, packed >> 4), -1).reshape(*scale.shape, -1)
    whole = ((widened(codes) - 8) * scale[..., None]).reshape(packed.shape[0], -1)
    return biased(product(widened(x), whole), bias).astype(x.dtype)


def quantized_rows(x: Array, scheme: str) -> tuple[Array, Array]:
    """x [T, I] -> codes [T, I] (int8, float8_e4m3fn) and scales f32[T, 1], as `ops.quantize.quantize_rows` has them.

    What is not finite is looked for by itself: on the CPU XLA's largest of many numbers may be none of the NaN among
    them. It decides each divisor too, as XLA makes of one that is constant, or of a row's, a product with its
    reciprocal, which is off in the last place.
    """
    found, wide = weight_scheme("linear", scheme), widened(x)
    finite = jnp.isfinite(wide)
    kept = finite.all(1, keepdims=True)
    scale = jnp.abs(wide).max(1, keepdims=True) / jnp.where(kept, found.top, 1)
    scale = jnp.where(scale < LEAST_SCALE, 1, scale)
    codes = jnp.clip(wide / jnp.where(finite, scale, 1), -found.top, found.top)
    codes = jnp.where(kept, jnp.round(codes) if found.dtype == "int8" else codes, 0)
    return codes.astype(jax_dtype(found.dtype)), jnp.where(kept, scale, jnp.nan)


def activated_linear(scheme: str, x: Array, w: Any, *, bias: Any = None) -> Array:
    """x [T, I], w of codes "q" [O, I] and "scale" f32[O], bias [O] -> (codes of x @ q^T) * both scales + bias [T, O],
    rounded once. Codes of int8 are summed in int32, of fp8 in float32."""
    codes, tokens = quantized_rows(x, scheme)
    if codes.dtype == jnp.int8:
        sums = lax.dot_general(codes, w.arrays["q"], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    else:
        sums = product(codes.astype(jnp.bfloat16), w.arrays["q"].astype(jnp.bfloat16))
    return biased(widened(sums) * tokens * w.arrays["scale"], bias).astype(x.dtype)


def head_linear(x: Array, w: Any) -> Array:
    """x [T, H, I], w [H, O, I] -> per head x @ w^T [T, H, O]."""
    out = jnp.einsum("thi,hoi->tho", x, dense(w), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def only_scheme(scheme: str, problem: LinearProblem) -> str | None:
    """The `supports` of a kernel for weights of one scheme."""
    return None if problem.scheme == scheme else f"multiplies weights of scheme {scheme!r}, not {problem.scheme!r}"


def quantized_recipe(scheme: str) -> Recipe:
    """`linear` over weights of `scheme`."""
    run = partial(activated_linear, scheme) if scheme in ACTIVATION_SCHEMES else scaled_linear
    packing = weight_packing(scheme)
    return recipe(
        f"xla_linear_{scheme}", "linear", stateless(grouped_linear if scheme == INT4 else run), layout=packing.layout,
        pack=packing.pack, handles=frozenset({"bias", "scheme"}), supports=partial(only_scheme, scheme),
    )  # fmt: skip


def recipes() -> list[Recipe]:
    return [
        recipe("xla_linear", "linear", stateless(linear), layout=DENSE, handles=frozenset({"bias"})),
        *map(quantized_recipe, LINEAR_SCHEMES),
        recipe("xla_head_linear", "head_linear", stateless(head_linear), layout=DENSE, handles=frozenset({"heads"})),
    ]
