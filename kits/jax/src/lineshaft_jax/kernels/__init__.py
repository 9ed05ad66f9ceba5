"""XLA kernels for every op of the contract: static shapes, any platform that JAX compiles for.

The composites `rope_write_kv`, `expert_mlp` and `latent_attend` have none: their decompositions call these, or better.
"""

from __future__ import annotations

from lineshaft_contract.kernels import Kernel
from lineshaft_jax.kernels import attend, cache, collectives, experts, linear, logits, norm, rope, rows


def xla_kernels(backend: str, attention_memory_mib: int = attend.MEMORY_MIB) -> list[Kernel]:
    """One kernel per op and packing, of priority 0, registered for `backend`; `attention_memory_mib` bounds the
    temporaries of attend, which takes smaller blocks of queries and keys for it."""
    themes = [rows, norm, linear, rope, cache, experts, logits, collectives]
    recipes = [recipe for theme in themes for recipe in theme.recipes()] + attend.recipes(attention_memory_mib)
    return [recipe(backend) for recipe in recipes]


__all__ = ["xla_kernels"]
