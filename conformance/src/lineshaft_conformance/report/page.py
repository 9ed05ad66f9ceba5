"""A run as one HTML page that needs nothing else: no script, no link, no font.

The template beside this file holds the look; here is what it shows. Jinja escapes every value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from statistics import median

from jinja2 import Environment, StrictUndefined, Template

from lineshaft_conformance.report.canonical import visible
from lineshaft_conformance.report.summary import (
    counts,
    evidence,
    facts,
    headline,
    level_title,
    levels,
    not_passed,
    worst_error,
)
from lineshaft_conformance.results import Evidence, Report, Result, Status

DECADES = range(-6, 3)
"""Powers of ten of error over allowed that the plots show; what lies outside is drawn at the ends."""
BINS_PER_DECADE = 6
BINS = (len(DECADES) - 1) * BINS_PER_DECADE


@dataclass(frozen=True)
class Chip:
    """The checks of one op, dtype and shape class: "decode 12/13", in the colour of the worst status.

    `partly`: all that ran passed, and others are not claimed.
    """

    name: str
    passed: int
    total: int
    status: Status

    @property
    def partly(self) -> bool:
        return self.status is Status.PASS and self.passed < self.total


@dataclass(frozen=True)
class Declined:
    """The checks that are not claimed for one reason, and the ops that they are of."""

    reason: str
    count: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """The checks of one op and dtype."""

    op: str
    dtype: str
    chips: tuple[Chip, ...]
    worst: float | None
    kernels: tuple[str, ...]
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Plot:
    """The errors of one op as shares of what is allowed: bars are (bin, height of 0 to 1, too large)."""

    op: str
    count: int
    middle: float
    largest: float
    bars: tuple[tuple[int, float, bool], ...]


def html_page(report: Report) -> str:
    """The page; all of the run's text is escaped."""
    return _template().render(
        report=report, headline=headline(report), certified=report.certified, facts=list(facts(report)),
        counts=counts(report.results), evidence=evidence(report.results),
        levels=[_level(report, level) for level in levels(report)],
        not_passed=not_passed(report), declined=_declined(report.results),
        rows=list(_rows(report.results)), plots=list(_plots(report.results)),
        results=report.results, decades=DECADES, bins=BINS,
    )  # fmt: skip


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_text
    )
    environment.filters.update(share=share, worst_error=worst_error, status_class=_status_class)
    environment.globals.update(Status=Status)
    return environment.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))


def _text(value: object) -> object:
    return visible(value) if type(value) is str else value


def _status_class(status: Status) -> str:
    return status.replace(" ", "-")


def share(value: float | None) -> str:
    """A share of what is allowed, in three digits."""
    return "" if value is None else f"{value:.3g}"


def _level(report: Report, level: int) -> tuple[str, Counter[Status], float]:
    results = report.of_level(level)
    return level_title(level), counts(results), sum(result.seconds for result in results)


def _worst(statuses: Iterable[Status]) -> Status:
    order = (Status.FAIL, Status.WAIVED, Status.PASS, Status.NOT_CLAIMED)
    return min(statuses, key=order.index)


def _rows(results: Iterable[Result]) -> Iterator[Row]:
    of_ops = sorted((r for r in results if r.op), key=lambda r: (r.op, r.dtype, r.shape_class))
    for (op, dtype), group in groupby(of_ops, key=lambda r: (r.op, r.dtype)):
        found = list(group)
        errors = [error for error in map(worst_error, found) if error is not None]
        yield Row(
            op, dtype, tuple(_chips(found)), max(errors, default=None),
            kernels=tuple(sorted({kernel for result in found for kernel in result.kernels})),
            evidence=tuple(evidence(found)),
        )  # fmt: skip


def _chips(results: Iterable[Result]) -> Iterator[Chip]:
    for name, group in groupby(results, key=lambda r: r.shape_class):
        statuses = [result.status for result in group]
        yield Chip(name or "all", statuses.count(Status.PASS), len(statuses), _worst(statuses))


def _declined(results: Iterable[Result]) -> list[Declined]:
    """By reason, the most frequent first."""
    reasons: dict[str, list[Result]] = {}
    for result in results:
        if result.status is Status.NOT_CLAIMED:
            reasons.setdefault(result.reason, []).append(result)
    found = [Declined(why, len(of), tuple(sorted({r.op for r in of if r.op}))) for why, of in reasons.items()]
    return sorted(found, key=lambda declined: -declined.count)


def _plots(results: Iterable[Result]) -> Iterator[Plot]:
    errors: dict[str, list[float]] = {}
    for result in results:
        error = worst_error(result)
        if error is not None:
            errors.setdefault(result.op or "other", []).append(error)
    for op, found in sorted(errors.items()):
        bins = Counter(map(_bin, found))
        highest = max(bins.values())
        bars = tuple((i, n / highest, i >= -DECADES[0] * BINS_PER_DECADE) for i, n in sorted(bins.items()))
        yield Plot(op, len(found), median(found), max(found), bars)


def _bin(error: float) -> int:
    """The bin of an error; one that is just allowed (1.0) is in the last bin before the line."""
    if not 0 < error < math.inf:
        return 0 if error == 0 else BINS - 1
    position = math.ceil((math.log10(error) - DECADES[0]) * BINS_PER_DECADE) - 1
    return min(max(position, 0), BINS - 1)
