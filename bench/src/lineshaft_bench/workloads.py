"""The work that engines are measured on: token ids from a seed, so that every engine gets the same; knows no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

SEED = 20260101
FIRST_ID, LAST_ID = 100, 49151
"""Ids are drawn from here, and folded into a smaller vocabulary; below are special tokens."""
AT_ONCE = 32
"""Requests that run together in `offline` and `shared`."""


@dataclass(frozen=True)
class Job:
    """A request: prompt ids, how many tokens to generate (no token ends it), and seconds after the round's begin."""

    prompt: Sequence[int]
    out: int
    at: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {"prompt": list(self.prompt), "out": self.out, "at": self.at}


Round = Sequence[Job]


@dataclass(frozen=True)
class Workload:
    """A round of fresh ids that nobody times, and those that are timed."""

    name: str
    warmup: Round
    rounds: Sequence[Round]

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(len(job.prompt) + job.out for round in self.rounds for job in round)


class Ids:
    """Draws prompts. The order of draws is part of the workloads."""

    def __init__(self, seed: int, vocab: int) -> None:
        self.rng, self._vocab = Random(seed), vocab

    def draw(self, count: int) -> list[int]:
        """`count` random ids."""
        ids = [self.rng.randrange(FIRST_ID, LAST_ID + 1) for _ in range(count)]
        return ids if self._vocab > LAST_ID else [id % self._vocab for id in ids]


def workload(name: str, vocab: int, rounds: int | None = None, seed: int = SEED) -> Workload:
    """One of WORKLOADS, with so many rounds, or as many as ROUNDS says."""
    ids = Ids(seed, vocab)
    made = WORKLOADS[name](ids)
    return Workload(name, next(made), list(islice(made, rounds or ROUNDS[name])))


def single(ids: Ids) -> Iterator[Round]:
    """One request alone: 128 tokens in, 128 out."""
    while True:
        yield [Job(ids.draw(128), 128)]


def prefill(ids: Ids) -> Iterator[Round]:
    """One long prompt alone: 2048 tokens in, one out."""
    while True:
        yield [Job(ids.draw(2048), 1)]


def offline(ids: Ids) -> Iterator[Round]:
    """64 requests of 8 810 tokens in and 4 546 out, the same lengths in every round."""
    ids.draw(6 * 128)
    lengths = [(ids.rng.randint(16, 256), ids.rng.randint(16, 128)) for _ in range(2 * AT_ONCE)]
    yield [Job(ids.draw(64), 16) for _ in range(AT_ONCE)]
    while True:
        yield [Job(ids.draw(prompt), out) for prompt, out in lengths]


def shared(ids: Ids) -> Iterator[Round]:
    """32 requests that share their first 512 tokens: 32 more in, 32 out."""
    while True:
        prefix = ids.draw(512)
        yield [Job(prefix + ids.draw(32), 32) for _ in range(AT_ONCE)]


WORKLOADS = {"single": single, "offline": offline, "prefill": prefill, "shared": shared}
ROUNDS = {"single": 5, "offline": 3, "prefill": 3, "shared": 3}
