"""What the engine tells a worker about one step and what comes back, as plain data that crosses a process border."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Self

import numpy as np
from pydantic import PlainSerializer, PlainValidator, SerializationInfo, TypeAdapter, ValidationInfo

from lineshaft.cache import PageSwap
from lineshaft.plan import Plan
from lineshaft.sampling.logprobs import Logprobs
from lineshaft.scheduler import Limits
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import HostStep, InputLayout, StepShape
from lineshaft_contract.timing import Choice

Frames = tuple[dict[str, Any], list[HostArray]]
"""A JSON-able header, and arrays that follow it."""
adapter: Callable[[type[Any]], TypeAdapter[Any]] = cache(TypeAdapter)  # type: ignore[assignment]


def _place(array: HostArray, info: SerializationInfo) -> int:
    """Where an array of a message comes among those that follow the header."""
    following: list[HostArray] = info.context  # type: ignore[assignment]
    following.append(array)
    return len(following) - 1


def _array(place: int, info: ValidationInfo) -> HostArray:
    return info.context[place]  # type: ignore[index, no-any-return]


SentArray = Annotated[HostArray, PlainValidator(_array), PlainSerializer(_place)]
SentStep = Annotated[
    HostStep,
    PlainValidator(lambda sent, info: HostStep(InputLayout.from_json(sent[0]), _array(sent[1], info))),
    PlainSerializer(lambda step, info: (step.layout.to_json(), _place(step.buffer, info))),
]
SentLogprobs = Annotated[
    Logprobs,
    PlainValidator(lambda places, info: Logprobs(*(_array(place, info) for place in places))),
    PlainSerializer(lambda found, info: [_place(array, info) for array in vars(found).values()]),
]


class Message:
    """A dataclass whose fields cross a process border, the arrays in them apart."""

    def to_frames(self) -> Frames:
        arrays: list[HostArray] = []
        return adapter(type(self)).dump_python(self, context=arrays), arrays

    @classmethod
    def from_frames(cls, header: Mapping[str, Any], arrays: Sequence[HostArray] = ()) -> Self:
        """The inverse of `to_frames`, after a trip of the header through JSON; what else is in there is left alone."""
        made: Self = adapter(cls).validate_python(header, context=arrays)
        return made


@dataclass(frozen=True)
class StepMessage(Message):
    """The forward of one step of one replica: its packed inputs, and the pages to move first.

    Pages are saved to the host (`swaps_out`), then copied, then brought back (`swaps_in`). `copies` is int32 [n, 3] of
    (group, src, dst). `on_host`, told with `swaps_out`: the sequences whose pages are still wanted there.
    """

    shape: StepShape
    forward: SentStep
    copies: SentArray
    swaps_out: tuple[PageSwap, ...] = ()
    swaps_in: tuple[PageSwap, ...] = ()
    on_host: tuple[int, ...] = ()

    def copies_by_group(self) -> Iterator[tuple[int, HostArray, HostArray]]:
        """(group, src int32 [n], dst int32 [n]) of each group that has copies: what `Session.copy_pages` takes."""
        for group in np.unique(self.copies[:, 0]) if len(self.copies) else ():
            own = self.copies[:, 0] == group
            yield int(group), self.copies[own, 1], self.copies[own, 2]


@dataclass(frozen=True)
class ChoiceMessage(Message):
    """How the tokens of a step are chosen from its R rows of logits, sent while its forward runs.

    `adjust` are the steps that edit and mask the logits first, each over the result of the one before; `sampling` is
    None where every row is greedy. Further outputs are made only where they are wanted.
    """

    sampling: SentStep | None = None
    adjust: tuple[SentStep, ...] = ()
    logprobs: bool = False
    logits: bool = False  # as they were adjusted
    scored: SentArray | None = None  # int32 [R]: ids whose log-probability is wanted; -1: the chosen one's


@dataclass(frozen=True)
class StepResult(Message):
    """What a step gave: token ids int32 [R] (-1: no token can be sampled), and what else was wanted."""

    token_ids: SentArray
    kernel_seconds: float
    logprobs: SentLogprobs | None = None
    logits: SentArray | None = None  # f32 [R, V]


@dataclass(frozen=True)
class Sizes(Message):
    """What a worker found before it allocates anything; equal on every rank but for `pages`."""

    plan: Plan
    page_bytes: tuple[int, ...]  # of one page id in each group, over all caches that share it
    pages: tuple[int, ...]  # that this worker can hold in each group, with the null page
    page_sizes: tuple[int, ...]  # tokens a page, of each group
    limits: Limits
    shapes: tuple[StepShape, ...]  # forward buckets, smallest first
    vocab: int
    asynchronous: bool = False  # whether a step runs on while the host goes on
    windows: tuple[int, ...] = ()  # keys that a query sees in each group; 0: all before it


@dataclass(frozen=True)
class Settled(Message):
    """How rank 0 has settled ties of kernels (`Plan.choices`), for the others; None: nobody says."""

    choices: Mapping[str, Choice] | None = None


@dataclass(frozen=True)
class Started(Message):
    """What starting cost a worker, in seconds and bytes."""

    load_seconds: float
    capture_seconds: float
    arena_bytes: int
