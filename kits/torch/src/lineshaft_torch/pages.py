"""How this kit lays a paged cache out: "slots", one row of heads per slot; page p is rows p*page to (p+1)*page."""

from __future__ import annotations

import torch

from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_torch.arrays import torch_dtype

SLOTS_LAYOUT = "slots"


def cache_arrays(problem: KVProblem, pages: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The canonical arrays of a page by slot, {"k": [N * page, Hkv, D], "v": [N * page, Hkv, Dv], ...}, zeroed and
    committed."""
    return {
        name: torch.empty((pages * shape[0], *shape[1:]), dtype=torch_dtype(dtype), device=device).zero_()
        for name, (shape, dtype) in problem.page_arrays.items()
    }


def page_view(cache: Cache) -> dict[str, torch.Tensor]:
    """The canonical form without a copy: {"k": [N, page, Hkv, D], "v": [N, page, Hkv, Dv]}."""
    problem = cache.problem
    assert isinstance(problem, KVProblem)
    return {name: a.view(-1, problem.page_size, *a.shape[1:]) for name, a in cache.arrays.items()}


def movable(array: torch.Tensor) -> torch.Tensor:
    """A view that index operations accept: one-byte floats as their bytes."""
    return array.view(torch.uint8) if array.itemsize == 1 else array


def stored_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`, through float32; a finite value beyond its range becomes the largest finite one."""
    if x.dtype == dtype:
        return x
    wide = x if dtype == torch.float64 else x.float()
    top = torch.finfo(dtype).max
    return torch.where(wide.isinf(), wide, wide.clamp(-top, top)).to(dtype)
