"""Runs checks over and over with fresh seeds, to find those that fail now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.runner.pool import Listed, Pool, Task
from lineshaft_conformance.runner.run import further_seeds, select
from lineshaft_conformance.subject import Target

LEVELS = (1, 2)
"""Levels whose checks take a seed of their own."""


@dataclass
class Soaked:
    """How often the checks ran, and every failure."""

    checks: int = 0
    seeds: int = 0  # rounds in which every check ran once
    tries: int = 0
    failures: list[Result] = field(default_factory=list)
    not_claimed: int = 0  # checks that the backend declines


Told = Callable[[Soaked], None]
"""Told after each round."""


def soak(
    target: Target,
    minutes: float,
    least: int = 50,
    *,
    seed: int = 0,
    jobs: int | None = None,
    only: Sequence[str] = (),
    told: Told = lambda soaked: None,
    **pool: Any,
) -> Soaked:
    """The smoke checks of L1 and L2 with as many fresh seeds as fit into `minutes`, at least `least`.

    A check that the backend declines is tried once. `pool` are further arguments of `Pool`. Raises as
    `run_suite`, and LoadFailed.
    """
    soaked, until = Soaked(), time.monotonic() + 60 * minutes
    with Pool(target, "smoke", max(LEVELS), jobs=jobs, **pool) as running:
        checks = select([check for check in running.checks if check.level in LEVELS], only)
        soaked.checks = len(checks)
        for fresh in fresh_seeds(seed):
            if soaked.seeds >= least and time.monotonic() >= until:
                break
            checks = claimed(running, checks, fresh, soaked)
            soaked.seeds += 1
            told(soaked)
    return soaked


def claimed(pool: Pool, checks: Sequence[Listed], seed: int, soaked: Soaked) -> tuple[Listed, ...]:
    """Try every check with one seed; those that the backend does not decline."""
    declined = set()
    for _, result in pool.run([Task(check, seed) for check in checks]):
        soaked.tries += 1
        if result.status is Status.FAIL:
            soaked.failures.append(result)
        elif result.status is Status.NOT_CLAIMED:
            soaked.not_claimed += 1
            declined.add(result.id)
    return tuple(check for check in checks if check.id not in declined)


def fresh_seeds(seed: int) -> Iterator[int]:
    """Endlessly many seeds that follow from one."""
    return (next(further_seeds(seed + number, 1)) for number in count())
