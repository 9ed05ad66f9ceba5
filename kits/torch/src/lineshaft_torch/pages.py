"""How this kit lays a paged cache out: "slots", one row of heads per slot, so that page p is rows p*page .. (p+1)*page."""

from __future__ import annotations

import torch
from lineshaft.contract.problems import KVProblem
from lineshaft.contract.sessions import Cache

from lineshaft_torch.arrays import torch_dtype

SLOTS_LAYOUT = "slots"


def cache_arrays(problem: KVProblem, pages: int, device: torch.device) -> dict[str, torch.Tensor]:
    """{"k": [N * page, Hkv, D], "v": [N * page, Hkv, Dv]}, zeroed and committed; no "v" if `v_dim` is 0."""
    slots, dtype = pages * problem.page_size, torch_dtype(problem.kv_dtype)
    dims = {"k": problem.qk_dim, "v": problem.v_dim}
    return {
        name: torch.empty((slots, problem.kv_heads, dim), dtype=dtype, device=device).zero_()
        for name, dim in dims.items()
        if dim
    }


def page_view(cache: Cache) -> dict[str, torch.Tensor]:
    """The canonical form without a copy: {"k": [N, page, Hkv, D], "v": [N, page, Hkv, Dv]}."""
    problem = cache.problem
    assert isinstance(problem, KVProblem)
    return {name: a.view(-1, problem.page_size, *a.shape[1:]) for name, a in cache.arrays.items()}
