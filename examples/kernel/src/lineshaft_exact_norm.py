"""One kernel for a backend of another plugin: an RMS norm in float64, for the engine "torch" of `cpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lineshaft_contract.hooks import hookimpl
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import NormProblem

if TYPE_CHECKING:
    import torch


def rms_norm(problem: NormProblem, x: torch.Tensor, w: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, H], w [H] -> x / sqrt(mean(x^2) + eps) * w, in float64, rounded once."""
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + problem.eps).rsqrt()
    normed = wide * scale * w.arrays["data"].double()
    return normed.to(x.dtype) if out is None else out.copy_(normed)


@hookimpl
def lineshaft_kernels(backend: str) -> list[Kernel]:
    if backend != "cpu":
        return []
    from lineshaft_torch.bound import DENSE, recipe, with_problem  # only here: discovery imports no torch

    make = recipe("exact_rms_norm", "rms_norm", with_problem(rms_norm), out=True, layout=DENSE, priority=20)
    return [make(backend)]
