"""What steps and requests cost: seconds of a step by what it holds; pages, steps and seconds of a request beforehand.

Knows numbers only, so that a simulation can use it as well as the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

RIDGE = 1e-9
"""Added to the diagonal of the normal equations, relative to it, so that equal columns can be solved."""

Sample = tuple[int, int, int, float]
"""decode rows, prefill tokens, context tokens (keys that all rows see), seconds"""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step, linear in what it holds; no coefficient is negative."""

    step: float = 0.0
    decode_row: float = 0.0
    prefill_token: float = 0.0
    context_token: float = 0.0

    def step_seconds(self, decode_rows: int, prefill_tokens: int, context_tokens: int) -> float:
        """Predicted seconds. context_tokens: keys that the rows see, summed over all of them."""
        rows = self.decode_row * decode_rows + self.prefill_token * prefill_tokens
        return self.step + rows + self.context_token * context_tokens


IN_TOKENS = StepCost(decode_row=1.0, prefill_token=1.0)
"""What costs are compared by before any step was timed: tokens to compute."""


class Fit:
    """Least squares over samples, of which only sums are kept."""

    def __init__(self) -> None:
        self.samples = 0
        self._gram = [[0.0] * 4 for _ in range(4)]
        self._right = [0.0] * 4

    def add(self, decode_rows: int, prefill_tokens: int, context_tokens: int, seconds: float) -> None:
        """Take in one step."""
        features = (1.0, float(decode_rows), float(prefill_tokens), float(context_tokens))
        self.samples += 1
        for i, one in enumerate(features):
            self._right[i] += one * seconds
            for j, other in enumerate(features):
                self._gram[i][j] += one * other

    def solve(self) -> StepCost:
        """The non-negative coefficients with the least squared error; all 0 without samples.

        Four coefficients have sixteen choices of which are not 0: the best choice without a negative one is exact.
        """
        best, least = [0.0] * 4, 0.0
        live = [i for i in range(4) if self._gram[i][i] > 0]
        for chosen in (c for size in range(1, len(live) + 1) for c in combinations(live, size)):
            found = _solve([[self._gram[i][j] for j in chosen] for i in chosen], [self._right[i] for i in chosen])
            error = -sum(x * self._right[i] for x, i in zip(found, chosen, strict=True))
            if min(found) >= 0 and error < least:
                best, least = [0.0] * 4, error
                for x, i in zip(found, chosen, strict=True):
                    best[i] = x
        return StepCost(*best)


def fit(samples: Iterable[Sample]) -> StepCost:
    """The coefficients that fit observed steps best."""
    found = Fit()
    for sample in samples:
        found.add(*sample)
    return found.solve()


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small symmetric positive system by Gauss-Jordan elimination, its diagonal scaled to 1 first."""
    scale = [row[i] ** -0.5 for i, row in enumerate(matrix)]
    n = len(right)
    rows = [[matrix[i][j] * scale[i] * scale[j] + RIDGE * (i == j) for j in range(n)] for i in range(n)]
    rows = [[*row, right[i] * scale[i]] for i, row in enumerate(rows)]
    for i in range(n):
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(n):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[-1] * s for row, s in zip(rows, scale, strict=True)]


@dataclass(frozen=True, slots=True)
class RequestCost:
    """What a request is expected to take."""

    output: int  # tokens
    pages: int  # at its end, over all cache groups
    steps: int  # that hold a row of it, also called rounds
    seconds: float  # that it adds to these steps


def request_cost(cost: StepCost, chunk: int, prompt: int, cached: int, output: int, pages: int) -> RequestCost:
    """The cost of a prompt of which `cached` tokens are in the cache, in steps of at most `chunk` of its tokens."""
    fresh, decodes = prompt - cached, output - 1
    seen = decodes * prompt + decodes * output // 2
    seconds = cost.step_seconds(decodes, fresh, seen) - cost.step
    return RequestCost(output, pages, -(-fresh // chunk) + decodes, seconds)


@dataclass
class Score:
    """How predictions compare with what happened; errors are prediction less actual value."""

    count: int = 0
    _absolute: float = 0.0
    _signed: float = 0.0
    _actual: float = 0.0

    def add(self, predicted: float, actual: float) -> None:
        """Take in one pair."""
        self.count += 1
        self._absolute += abs(predicted - actual)
        self._signed += predicted - actual
        self._actual += actual

    @property
    def mean_absolute_error(self) -> float:
        """In the unit of what is predicted; 0 before the first pair."""
        return self._absolute / self.count if self.count else 0.0

    @property
    def bias(self) -> float:
        """The mean error: above 0 where too much was predicted."""
        return self._signed / self.count if self.count else 0.0

    @property
    def relative_error(self) -> float:
        """The sum of absolute errors over the sum of actual values."""
        return self._absolute / self._actual if self._actual else 0.0
