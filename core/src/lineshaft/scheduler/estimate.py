"""What requests and steps will cost, by what was seen so far, and how good such predictions were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lineshaft.scheduler.batch import Batch
from lineshaft.scheduler.cost import IN_TOKENS, Fit, RequestCost, Score, StepCost, request_cost
from lineshaft.scheduler.lengths import OutputLengths
from lineshaft.scheduler.request import Request

MEDIAN = 0.5
FIRST_FIT = 32
"""Timed steps before the first fit; the next come each time that their number has doubled."""


@dataclass
class Scores:
    """Predictions against what happened: of a request, made when it was admitted, and of a step, by the last fit."""

    output: Score = field(default_factory=Score)  # tokens
    pages: Score = field(default_factory=Score)
    steps: Score = field(default_factory=Score)  # of one request, also called rounds
    seconds: Score = field(default_factory=Score)  # of one step


class Estimator:
    """Learns from requests that ended and steps that ran."""

    def __init__(self, chunk: int, pages: Callable[[int], int]) -> None:
        """chunk: the most tokens of a request in one step. pages: how many pages so many tokens need."""
        self.scores = Scores()
        self.step_cost: StepCost = IN_TOKENS
        self._chunk, self._pages = chunk, pages
        self._lengths = OutputLengths()
        self._fit, self._next_fit = Fit(), FIRST_FIT

    def known_output(self, request: Request) -> int | None:
        """The median output of requests like this one; None while too few are known."""
        return self._lengths.quantile(request.salt, len(request.prompt), MEDIAN)

    def cost(self, request: Request, cached: int) -> RequestCost:
        """What the request is expected to take if `cached` of its tokens need not be computed."""
        prompt, most = len(request.prompt), request.most - len(request.prompt)
        output = min(most, self.known_output(request) or most)
        return request_cost(self.step_cost, self._chunk, prompt, cached, output, self._pages(prompt + output - 1))

    def learn(self, request: Request) -> None:
        """Compare a request that came to its end with what was expected, and remember its length."""
        prompt, output = len(request.prompt), len(request.output)
        if request.cost is not None and output:
            self.scores.output.add(request.cost.output, output)
            self.scores.pages.add(request.cost.pages, self._pages(prompt + output - 1))
            self.scores.steps.add(request.cost.steps, request.chunks + output)
        if output:
            self._lengths.add(request.salt, prompt, output)

    def observe(self, batch: Batch, seconds: float) -> bool:
        """Learn from a step that ran; return whether costs were fitted anew."""
        decodes = sum([row.count == 1 for row in batch.rows])
        context = sum([row.start + row.count for row in batch.rows])
        held = decodes, batch.tokens - decodes, context
        if self.step_cost is not IN_TOKENS:
            self.scores.seconds.add(self.step_cost.step_seconds(*held), seconds)
        self._fit.add(*held, seconds)
        if self._fit.samples < self._next_fit:
            return False
        self._next_fit *= 2
        self.step_cost = self._fit.solve()
        return True
