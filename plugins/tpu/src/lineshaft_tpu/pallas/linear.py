"""Products with weights of one byte, which are widened in VMEM: half the traffic of a bfloat16 weight or less."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineshaft_contract.problems import LinearProblem, itemsize
from lineshaft_tpu.chips import MIB, Chip
from lineshaft_tpu.tiling import LANES, padded, sublanes, usable_vmem

Array = jax.Array

ROWS = 256
BUDGET = 24 * MIB
"""What blocks may take, at most and if half of the chip's VMEM is more."""


@dataclass(frozen=True)
class Blocks:
    """Rows, outputs and terms of a grid step."""

    m: int
    n: int
    k: int


def blocks(problem: LinearProblem, chip: Chip) -> Blocks:
    """Up to ROWS rows, 512 outputs and all terms up to 4096, and less of the terms where VMEM is short; all three are
    divided as evenly as tiles allow."""
    each = -(-problem.m // -(-problem.m // ROWS))
    found = Blocks(padded(each, sublanes(problem.dtype)), _divisor(problem.n, 512), _divisor(problem.k, 4096))
    while vmem_bytes(problem, found) > min(chip.vmem // 2, BUDGET) and found.k > LANES:
        found = replace(found, k=_divisor(problem.k, found.k - LANES))
    return found


def _divisor(size: int, limit: int) -> int:
    """The largest multiple of LANES that divides `size`, itself one, and is at most `limit`."""
    return next(part for part in range(min(size, limit) // LANES * LANES, 0, -LANES) if size % part == 0)


def vmem_bytes(problem: LinearProblem, sizes: Blocks) -> int:
    """What the blocks of a grid step take, each twice, with the widened weight and the sum; a float32 product splits
    its operands into three parts of bfloat16."""
    wide, operands = itemsize(problem.dtype), (sizes.m + sizes.n) * sizes.k
    twice = sizes.m * sizes.k * wide + sizes.n * sizes.k + sizes.m * sizes.n * wide + 8 * sizes.n * 4
    parts = 3 * 2 * operands if problem.dtype == "float32" else 0
    return 2 * twice + sizes.n * sizes.k * wide + sizes.m * sizes.n * 4 + parts


def linear(problem: LinearProblem, chip: Chip, x: Array, q: Array, scale: Array, *, interpret: Any = False) -> Array:
    """x [m, k] times q [n, k], of int8 or float8_e4m3fn, times scale f32[n] of its rows -> [m, n] of x's dtype.

    The codes are exact in x's dtype; sums are made in float32 and scaled and rounded once.
    """
    sizes = blocks(problem, chip)
    rows = padded(problem.m, sizes.m)
    wide = jnp.pad(x, ((0, rows - problem.m), (0, 0)))
    out = pl.pallas_call(
        _kernel,
        grid=(rows // sizes.m, problem.n // sizes.n, problem.k // sizes.k),
        in_specs=[
            pl.BlockSpec((sizes.m, sizes.k), lambda m, n, k: (m, k)),
            pl.BlockSpec((sizes.n, sizes.k), lambda m, n, k: (n, k)),
            pl.BlockSpec((1, sizes.n), lambda m, n, k: (0, n)),
        ],
        out_specs=pl.BlockSpec((sizes.m, sizes.n), lambda m, n, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((rows, problem.n), x.dtype),
        scratch_shapes=[pltpu.VMEM((sizes.m, sizes.n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=usable_vmem(chip)
        ),
        interpret=interpret,
        name="lineshaft_quantized_linear",
    )(wide, q, scale.reshape(1, -1))
    return out[: problem.m]


def _kernel(x: Any, q: Any, scale: Any, out: Any, total: Any) -> None:
    """x [m, k] and q [n, k] of one step of k: add to total f32[m, n]; after the last, scale and round."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    total[...] += lax.dot_general(
        x[...], q[...].astype(x.dtype), (((1,), (1,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = (total[...] * scale[...]).astype(out.dtype)
