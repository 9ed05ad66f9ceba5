"""Products with weights: densely packed ones, and rows of 8-bit codes with one scale each."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from lineshaft_contract.ops.quantize import WEIGHT_SCHEMES
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.problems import LinearProblem
from lineshaft_jax.arrays import Array, widened
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


def head_linear(x: Array, w: Any) -> Array:
    """x [T, H, I], w [H, O, I] -> per head x @ w^T [T, H, O]."""
    out = jnp.einsum("thi,hoi->tho", x, dense(w), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def only_scheme(scheme: str, problem: LinearProblem) -> str | None:
    """The `supports` of a kernel for weights of one scheme."""
    return None if problem.scheme == scheme else f"multiplies weights of scheme {scheme!r}, not {problem.scheme!r}"


def row_scaled(scheme: str) -> Recipe:
    """`linear` over rows of codes of `scheme`."""
    return recipe(
        f"xla_linear_{scheme}", "linear", stateless(scaled_linear), layout=f"{scheme}_rows", pack=pack_rows(scheme),
        handles=frozenset({"bias", "scheme"}), supports=partial(only_scheme, scheme),
    )  # fmt: skip


def recipes() -> list[Recipe]:
    return [
        recipe("xla_linear", "linear", stateless(linear), layout=DENSE, handles=frozenset({"bias"})),
        *map(row_scaled, WEIGHT_SCHEMES),
        recipe("xla_head_linear", "head_linear", stateless(head_linear), layout=DENSE, handles=frozenset({"heads"})),
    ]
