"""Row-wise kernels: add, concat, gated activations, row gathers. Every result may be written in place of allocating."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from lineshaft_torch.bound import Recipe, recipe, stateless

Out = torch.Tensor | None


def add(x: torch.Tensor, y: torch.Tensor, *, out: Out = None) -> torch.Tensor:
    """x, y [T, H] -> x + y."""
    return torch.add(x, y, out=out)


def concat(xs: Sequence[torch.Tensor], dim: int, *, out: Out = None) -> torch.Tensor:
    """Arrays that agree in every dim but `dim`, joined along it."""
    return torch.cat(list(xs), dim, out=out)


def silu_mul(x: torch.Tensor, *, out: Out = None) -> torch.Tensor:
    """x [T, 2F], gate first -> silu(gate) * up [T, F]."""
    gate, up = x.chunk(2, -1)
    return torch.mul(F.silu(gate.float() if gate.itemsize < 4 else gate), up, out=_like(up, out))


def gelu_mul(x: torch.Tensor, *, out: Out = None) -> torch.Tensor:
    """x [T, 2F], gate first -> gelu(gate) * up [T, F], with the tanh approximation."""
    gate, up = x.chunk(2, -1)
    return torch.mul(F.gelu(gate.float() if gate.itemsize < 4 else gate, approximate="tanh"), up, out=_like(up, out))


def _like(x: torch.Tensor, out: Out) -> torch.Tensor:
    """`out`, or an array as `x`: a product of float32 and a narrower array is rounded once, when it is written."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out


def gather_rows(x: torch.Tensor, rows: torch.Tensor, *, out: Out = None) -> torch.Tensor:
    """x [T, H], rows int32[R] -> x[rows] [R, H]."""
    return torch.index_select(x, 0, rows, out=out)


def merge_rows(x: torch.Tensor, embeds: torch.Tensor, source: torch.Tensor, *, out: Out = None) -> torch.Tensor:
    """x [T, H], embeds [M, H], source int32[T] -> embeds[source[t]] where source[t] >= 0, else x[t]."""
    chosen = embeds.index_select(0, source.clamp(min=0))
    return torch.where((source >= 0)[:, None], chosen, x, out=out)


def recipes() -> list[Recipe]:
    plain: list[Callable[..., torch.Tensor]] = [add, concat, silu_mul, gelu_mul, gather_rows, merge_rows]
    return [recipe(f"torch_{run.__name__}", run.__name__, stateless(run), out=True) for run in plain]
