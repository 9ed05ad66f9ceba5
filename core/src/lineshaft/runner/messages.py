"""What the engine tells a worker about one step and what comes back, as plain data that crosses a process border."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lineshaft.cache import PageSwap
from lineshaft.plan import Plan
from lineshaft.plan.plan import make_shape
from lineshaft.sampling.logprobs import Logprobs
from lineshaft.scheduler import Limits
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import HostStep, InputLayout, StepShape, forward_inputs

Frames = tuple[dict[str, Any], list[HostArray]]
"""A JSON-able header, and arrays that follow it."""


@dataclass(frozen=True)
class StepMessage:
    """The forward of one step of one replica: its packed inputs, and the pages to move first.

    Pages are saved to the host (`swaps_out`), then copied, then brought back (`swaps_in`). `copies` is int32 [n, 3] of
    (group, src, dst). `on_host`, told with `swaps_out`: the sequences whose pages are still wanted there.
    """

    shape: StepShape
    forward: HostStep
    copies: HostArray
    swaps_out: tuple[PageSwap, ...] = ()
    swaps_in: tuple[PageSwap, ...] = ()
    on_host: tuple[int, ...] = ()

    def copies_by_group(self) -> Iterator[tuple[int, HostArray, HostArray]]:
        """(group, src int32 [n], dst int32 [n]) of each group that has copies: what `Session.copy_pages` takes."""
        for group in np.unique(self.copies[:, 0]):
            own = self.copies[:, 0] == group
            yield int(group), self.copies[own, 1], self.copies[own, 2]

    def to_frames(self) -> Frames:
        header = {
            "shape": dataclasses.asdict(self.shape),
            "out": self.swaps_out,
            "in": self.swaps_in,
            "host": self.on_host,
        }
        return header, [self.forward.buffer, self.copies]

    @classmethod
    def from_frames(cls, header: Mapping[str, Any], arrays: Sequence[HostArray]) -> StepMessage:
        shape = make_shape(header["shape"])
        out, back = (tuple(PageSwap(s, g, tuple(pages)) for s, g, pages in header[key]) for key in ("out", "in"))
        return cls(shape, HostStep(forward_inputs(shape), arrays[0]), arrays[1], out, back, tuple(header["host"]))


@dataclass(frozen=True)
class ChoiceMessage:
    """How the tokens of a step are chosen from its R rows of logits, sent while its forward runs.

    `adjust` are the steps that edit and mask the logits first, each over the result of the one before; `sampling` is
    None where every row is greedy. Further outputs are made only where they are wanted.
    """

    sampling: HostStep | None = None
    adjust: tuple[HostStep, ...] = ()
    logprobs: bool = False
    logits: bool = False  # as they were adjusted
    scored: HostArray | None = None  # int32 [R]: ids whose log-probability is wanted; -1: the chosen one's

    def to_frames(self) -> Frames:
        hosts = [*self.adjust, *([] if self.sampling is None else [self.sampling])]
        header = {
            "logprobs": self.logprobs, "logits": self.logits, "adjust": len(self.adjust),
            "hosts": [host.layout.to_json() for host in hosts],
        }  # fmt: skip
        scored = [] if self.scored is None else [self.scored]
        return header, [*(host.buffer for host in hosts), *scored]

    @classmethod
    def from_frames(cls, header: Mapping[str, Any], arrays: Sequence[HostArray]) -> ChoiceMessage:
        layouts = [InputLayout.from_json(fields) for fields in header["hosts"]]
        hosts = tuple(map(HostStep, layouts, arrays))
        adjust, sampling = hosts[: header["adjust"]], hosts[header["adjust"] :]
        scored = arrays[len(hosts)] if len(arrays) > len(hosts) else None
        return cls(sampling[0] if sampling else None, adjust, header["logprobs"], header["logits"], scored)


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
    asynchronous: bool = False  # whether a step runs on while the host goes on
    windows: tuple[int, ...] = ()  # keys that a query sees in each group; 0: all before it

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sizes:
        """The inverse of `to_json` after a trip through JSON."""
        return cls(
            plan=Plan.from_json(data["plan"]), weight_bytes=data["weight_bytes"], page_bytes=tuple(data["page_bytes"]),
            pages=tuple(data["pages"]), page_sizes=tuple(data["page_sizes"]), limits=Limits(**data["limits"]),
            shapes=tuple(make_shape(shape) for shape in data["shapes"]), vocab=data["vocab"],
            asynchronous=data["asynchronous"], windows=tuple(data["windows"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Started:
    """What starting cost a worker, in seconds and bytes."""

    load_seconds: float
    capture_seconds: float
    programs: int
    arena_bytes: int
    ops_per_decode: int = 0
