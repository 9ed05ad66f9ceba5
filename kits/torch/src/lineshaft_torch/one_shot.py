"""Sums of small messages in one shot: each rank reads all others' parts from memory that they share, and adds them up.

By `torch.ops.symm_mem.one_shot_all_reduce_out` (torch/csrc/distributed/c10d/symm_mem/CUDASymmetricMemoryOps.cu), where
this torch has it and the devices can read each other's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from lineshaft_contract.problems import CollectiveProblem
from lineshaft_torch.bound import Recipe, recipe

LIMIT = 256 << 10
"""Bytes of the largest message, as float32: what PyTorch's own choice takes (intra_node_comm.cpp). Beyond it every rank
reads more than rings of the transport do."""
MOST_RANKS = 8
NEEDED = ("one_shot_all_reduce_out",)


class Shared(Protocol):
    """Memory of a group: what a rank writes to `part`, float32[LIMIT / 4], all others can read."""

    part: torch.Tensor

    def add_up(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueue: `out` becomes the sum of all ranks' values of `part`, a view of the memory at its start."""
        ...


class SymmetricMemory:
    """`Shared` by torch. Every member has to make it; they meet in `store`."""

    def __init__(self, store: Any, name: str, index: int, size: int, device: torch.device) -> None:
        from torch._C._distributed_c10d import _SymmetricMemory

        _SymmetricMemory.set_group_info(name, index, size, store)
        self.part = _SymmetricMemory.empty_strided_p2p((LIMIT // 4,), (1,), torch.float32, device, name)
        self._name, self._kept = name, _SymmetricMemory.rendezvous(self.part, name)

    def add_up(self, part: torch.Tensor, out: torch.Tensor) -> None:
        torch.ops.symm_mem.one_shot_all_reduce_out(part, "sum", self._name, out)


def unavailable(devices: Sequence[int]) -> str:
    """Why these devices cannot do it; "" if they can."""
    if any(not hasattr(torch.ops.symm_mem, name) for name in NEEDED):
        return f"torch {torch.__version__} has no {' nor '.join(NEEDED)}"
    apart = [(a, b) for a in devices for b in devices if a != b and not torch.cuda.can_device_access_peer(a, b)]
    return f"device {apart[0][0]} cannot read the memory of device {apart[0][1]}" if apart else ""


def supports(problem: CollectiveProblem) -> str | None:
    nbytes = 4 * math.prod(problem.shape)
    if nbytes > LIMIT:
        return f"is for messages of at most {LIMIT >> 10} KiB in float32, not of {nbytes / 1024:.0f}"
    if problem.size > MOST_RANKS:
        return f"is for at most {MOST_RANKS} ranks, not {problem.size}"
    if problem.dtype not in ("bfloat16", "float16", "float32"):
        return f"sums in float32, which is too narrow for {problem.dtype}"
    return None


def bind(problem: CollectiveProblem, session: Any) -> Callable[..., torch.Tensor]:
    shared: Shared = session.constant(("one shot", problem.axis), lambda: share(problem, session))
    part = shared.part[: math.prod(problem.shape)].view(problem.shape)
    total = torch.empty(problem.shape, dtype=torch.float32, device=session.device)

    def all_reduce(x: torch.Tensor, axis: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over all members, in float32, rounded once."""
        part.copy_(x)
        shared.add_up(part, total)
        return total.to(x.dtype, copy=True) if out is None else out.copy_(total)

    return all_reduce


def share(problem: CollectiveProblem, session: Any) -> Shared:
    """The memory of the problem's group."""
    group = session.groups.group(problem.axis)
    store, name = session.groups.meeting(problem.axis, "one-shot")
    return SymmetricMemory(store, name, group.index, group.size, session.device)


def recipes(priority: int) -> list[Recipe]:
    return [recipe("one_shot_all_reduce", "all_reduce", bind, out=True, priority=priority, supports=supports)]
