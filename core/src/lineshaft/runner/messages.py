"""What the engine tells a worker about one step and what comes back, as plain data that crosses a process border."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lineshaft.contract.sessions import HostArray
from lineshaft.contract.steps import HostStep, InputField, InputLayout, StepShape, forward_inputs
from lineshaft.plan import Plan
from lineshaft.plan.plan import make_shape
from lineshaft.sampling.logprobs import Logprobs
from lineshaft.scheduler import Limits

Frames = tuple[dict[str, Any], list[HostArray]]
"""A JSON-able header, and arrays that follow it."""


@dataclass(frozen=True)
class StepMessage:
    """One step of one replica: the packed inputs, page copies to make first, and which extra outputs are wanted.

    `copies` is int32 [n, 3] of (group, src, dst). `sampling` is None where every row is greedy; `adjust` are the steps
    that mask and edit the logits first, each over the result of the one before.
    """

    shape: StepShape
    forward: HostStep
    copies: HostArray
    sampling: HostStep | None = None
    logprobs: bool = False
    logits: bool = False
    adjust: tuple[HostStep, ...] = ()

    def copies_by_group(self) -> Iterator[tuple[int, HostArray, HostArray]]:
        """(group, src int32 [n], dst int32 [n]) of each group that has copies: what `Session.copy_pages` takes."""
        for group in np.unique(self.copies[:, 0]):
            own = self.copies[:, 0] == group
            yield int(group), self.copies[own, 1], self.copies[own, 2]

    def to_frames(self) -> Frames:
        header = {
            "shape": dataclasses.asdict(self.shape), "logprobs": self.logprobs, "logits": self.logits,
            "sampling": None if self.sampling is None else _fields(self.sampling),
            "adjust": [_fields(host) for host in self.adjust],
        }  # fmt: skip
        arrays = [self.forward.buffer, self.copies, *(host.buffer for host in self.adjust)]
        return header, arrays if self.sampling is None else [*arrays, self.sampling.buffer]

    @classmethod
    def from_frames(cls, header: Mapping[str, Any], arrays: Sequence[HostArray]) -> StepMessage:
        shape = make_shape(header["shape"])
        sampling = None if header["sampling"] is None else _host(header["sampling"], arrays[-1])
        forward = HostStep(forward_inputs(shape), arrays[0])
        adjust = tuple(map(_host, header["adjust"], arrays[2:]))
        return cls(shape, forward, arrays[1], sampling, header["logprobs"], header["logits"], adjust)


def _fields(host: HostStep) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(item.name, item.dtype, item.shape) for item in host.layout.fields]


def _host(fields: Sequence[tuple[str, str, Sequence[int]]], buffer: HostArray) -> HostStep:
    return HostStep(InputLayout([InputField(name, dtype, tuple(shape)) for name, dtype, shape in fields]), buffer)


@dataclass(frozen=True)
class StepResult:
    """What a step gave: token ids int32 [R] (-1: no token can be sampled), and what else was wanted."""

    token_ids: HostArray
    kernel_seconds: float
    logprobs: Logprobs | None = None
    logits: HostArray | None = None  # f32 [R, V]

    def to_frames(self) -> Frames:
        arrays = [self.token_ids]
        if self.logprobs is not None:
            arrays += [self.logprobs.chosen, self.logprobs.top_ids, self.logprobs.top]
        if self.logits is not None:
            arrays.append(self.logits)
        has = {"logprobs": self.logprobs is not None, "logits": self.logits is not None}
        return {"kernel_seconds": self.kernel_seconds, **has}, arrays

    @classmethod
    def from_frames(cls, header: Mapping[str, Any], arrays: Sequence[HostArray]) -> StepResult:
        logprobs = Logprobs(*arrays[1:4]) if header["logprobs"] else None
        return cls(arrays[0], header["kernel_seconds"], logprobs, arrays[-1] if header["logits"] else None)


@dataclass(frozen=True)
class Sizes:
    """What a worker found before it allocates anything; equal on every rank but for `pages`."""

    plan: Plan
    weight_bytes: int
    page_bytes: tuple[int, ...]  # of one page id in each group, over all caches that share it
    pages: tuple[int, ...]  # that this worker can hold in each group, with the null page
    page_sizes: tuple[int, ...]  # tokens a page, of each group
    limits: Limits
    shapes: tuple[StepShape, ...]  # forward buckets, smallest first
    vocab: int

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sizes:
        """The inverse of `to_json` after a trip through JSON."""
        return cls(
            plan=Plan.from_json(data["plan"]), weight_bytes=data["weight_bytes"], page_bytes=tuple(data["page_bytes"]),
            pages=tuple(data["pages"]), page_sizes=tuple(data["page_sizes"]), limits=Limits(**data["limits"]),
            shapes=tuple(make_shape(shape) for shape in data["shapes"]), vocab=data["vocab"],
        )  # fmt: skip


@dataclass(frozen=True)
class Started:
    """What starting cost a worker, in seconds and bytes."""

    load_seconds: float
    capture_seconds: float
    programs: int
    arena_bytes: int
    ops_per_decode: int = 0
