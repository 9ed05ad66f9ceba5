"""One step of all replicas on its way: what was scheduled, where its tokens are chosen, and what came back.

Knows batches, messages and choices; not how requests come and go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lineshaft.meter import Clock
from lineshaft.runner.messages import ChoiceMessage, StepMessage, StepResult
from lineshaft.runner.pack import Packed, Place, places
from lineshaft.sampling.choice import Choice
from lineshaft.sampling.logprobs import PromptLogprobs, TokenLogprobs, top_logprobs
from lineshaft.sampling.pack import pack_adjust, pack_sampling
from lineshaft.sampling.params import SamplingParams
from lineshaft.sampling.processors import ProcessedRow, choose_processed
from lineshaft.scheduler import Batch, Request, Row
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import StepShape

GREEDY = SamplingParams(temperature=0)
NO_COPIES = np.zeros((0, 3), np.int32)


@dataclass(slots=True)
class Live:
    """A request while it runs: what it remembers of its tokens, and its times."""

    request: Request
    replica: int
    clock: Clock = field(default_factory=Clock)
    choice: Choice | None = None
    scores: PromptLogprobs | None = None


@dataclass(slots=True)
class Token:
    """One token that a step gave to a request."""

    request: Request
    clock: Clock
    token_id: int  # -1: there is none, the request ended without
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token, where they were asked for


@dataclass
class Flight:
    """A step from when it is scheduled until it is committed; sequences are by replica."""

    shape: StepShape
    batches: Sequence[Batch]
    packed: Sequence[Packed]
    began: float  # when its scheduling began, in seconds
    masks: Future[list[ChoiceMessage]] | None = None  # its choices, where they are made while its forward is submitted

    @cached_property
    def scored(self) -> list[list[tuple[int, Row]]]:
        """Rows of the batches that take rows of logits, each with the first of those."""
        found = []
        for batch in self.batches:
            end, rows = 0, []
            for row in batch.rows:
                if row.logits:
                    rows.append((end, row))
                    end += row.logits
            found.append(rows)
        return found

    @cached_property
    def sampled(self) -> list[list[Place]]:
        """The requests that get a token, each with its row of logits."""
        return [places(rows) for rows in self.scored]

    def messages(self) -> list[StepMessage]:
        """What the workers are told."""
        parts = zip(self.packed, self.batches, strict=True)
        return [
            StepMessage(self.shape, packed.host, page_copies(batch), batch.swaps_out, batch.swaps_in, packed.on_host)
            for packed, batch in parts
        ]

    def fill(self, before: Flight, ids: Sequence[Sequence[int]]) -> None:
        """Put in the tokens of the step before, in the midst of which this one was scheduled."""
        for packed, sampled, given in zip(self.packed, before.sampled, ids, strict=True):
            packed.fill({request.id: token for (_, request), token in zip(sampled, given, strict=True)})

    def masked(self, live: Mapping[int, Live]) -> bool:
        """Whether a grammar's mask is to be computed for it."""
        each = (live.get(request.id) for sampled in self.sampled for _, request in sampled)
        return any(own is not None and own.choice is not None and own.choice.grammar is not None for own in each)

    # ---- how its tokens are chosen -----------------------------------------------------------------------------

    def choices(self, live: Mapping[int, Live], vocab: int, *, logits: bool) -> list[ChoiceMessage]:
        """How the workers choose the tokens, once all before are known; `logits`: whether those come back."""
        return [self._choice(replica, live, vocab, logits) for replica in range(len(self.batches))]

    def _choice(self, replica: int, live: Mapping[int, Live], vocab: int, logits: bool) -> ChoiceMessage:
        sampled, rows = self.sampled[replica], self.shape.logits
        requests = [request for _, request in sampled]
        scored = self._prompt_ids(replica, live)
        return ChoiceMessage(
            pack_sampling(*spread(sampled), rows) if any(r.params.temperature for r in requests) else None,
            pack_adjust(choices_of(sampled, live), rows, vocab),
            logprobs=scored is not None or any(request.params.logprobs is not None for request in requests),
            logits=logits or any(request.params.logits_processors for request in requests),
            scored=scored,
        )

    def _prompt_ids(self, replica: int, live: Mapping[int, Live]) -> HostArray | None:
        """The prompts' own next ids int32 [R] where their log-probabilities are wanted, else -1; None if nowhere."""
        ids = None
        for start, row in self.scored[replica]:
            own = live.get(row.request.id)
            if own is not None and own.scores is not None and not own.scores.complete:
                ids = np.full(self.shape.logits, -1, np.int32) if ids is None else ids
                ids[start : start + row.logits] = own.scores.ids(row.start, row.logits)
        return ids

    # ---- what came back ----------------------------------------------------------------------------------------

    def processed(self, results: Sequence[StepResult]) -> list[StepResult]:
        """The results, with the rows of requests that have logits processors chosen anew on the host."""
        return [self._processed(sampled, result) for sampled, result in zip(self.sampled, results, strict=True)]

    @staticmethod
    def _processed(sampled: Sequence[Place], result: StepResult) -> StepResult:
        rows = [
            ProcessedRow(row, r.params, r.fork, len(r.tokens), r.prompt, r.output)
            for row, r in sampled
            if r.params.logits_processors
        ]
        if not rows:
            return result
        assert result.logits is not None
        ids, found = choose_processed(rows, result.logits, result.token_ids, result.logprobs)
        return dataclasses.replace(result, token_ids=ids, logprobs=found)

    def book_prompts(self, results: Sequence[StepResult], live: Mapping[int, Live]) -> None:
        """Keep the log-probabilities of prompts that the step found."""
        for rows, result in zip(self.scored, results, strict=True):
            for start, row in rows:
                own = live.get(row.request.id)
                if own is not None and own.scores is not None and result.logprobs is not None:
                    own.scores.add(row.start, row.logits, result.logprobs, start)


def spread(sampled: Sequence[Place]) -> tuple[list[SamplingParams], list[int], list[int]]:
    """For each row of logits, up to the last that a token is chosen from: params, fork and position of that token. A
    row that none is chosen from counts as greedy."""
    requests = [request for _, request in sampled]
    if not sampled or sampled[-1][0] + 1 == len(sampled):
        return [r.params for r in requests], [r.fork for r in requests], [position(r) for r in requests]
    size = sampled[-1][0] + 1
    params, forks, positions = [GREEDY] * size, [0] * size, [0] * size
    for row, request in sampled:
        params[row], forks[row], positions[row] = request.params, request.fork, position(request)
    return params, forks, positions


def position(request: Request) -> int:
    """Of its next token, in prompt and output together."""
    return len(request.prompt) + len(request.output)


def choices_of(sampled: Sequence[Place], live: Mapping[int, Live]) -> list[Choice | None]:
    """For each row of logits, up to the last that is adjusted: what remembers how."""
    found: list[Choice | None] = []
    for row, request in sampled:
        own = live.get(request.id)
        if own is not None and own.choice is not None:
            found += [None] * (row - len(found))
            found.append(own.choice)
    return found


def token_of(live: Live, row: int, token: int, result: StepResult) -> Token:
    """The token of a row of logits, with what its request wants to know of it."""
    found, wanted, scores = None, live.request.params.logprobs, live.scores
    if wanted is not None and result.logprobs is not None and token >= 0:
        found = top_logprobs(result.logprobs, row, token, wanted)
    first = scores is not None and len(live.request.output) <= 1
    return Token(live.request, live.clock, token, found, scores.result if scores is not None and first else None)


def page_copies(batch: Batch) -> HostArray:
    """The copies to make before a step, int32 [n, 3] of (group, src, dst)."""
    if not batch.copies:
        return NO_COPIES
    return np.array([(c.group, c.src, c.dst) for c in batch.copies], np.int32)
