"""What all reports say of a run: counts, the worst error of a result, the headline. Knows no format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lineshaft_conformance.results import Evidence, Report, Result, Status

LEVEL_NAMES = (
    "loads and tells the truth",
    "ops",
    "paged attention and caches",
    "graphs and collectives",
    "end to end",
    "determinism and speed",
)


def level_title(level: int) -> str:
    """ "L1 ops"."""
    return f"L{level} {LEVEL_NAMES[level]}" if 0 <= level < len(LEVEL_NAMES) else f"L{level}"


def levels(report: Report) -> range:
    """The levels to show: all up to the one asked for."""
    return range(min(report.level + 1, len(LEVEL_NAMES)))


def counts(results: Iterable[Result]) -> Counter[Status]:
    return Counter(result.status for result in results)


def headline(report: Report) -> str:
    """What the run certifies and on which evidence, in words; the same in every format."""
    certified = report.certified
    if report.chosen:
        return f"{report.backend} is not certified: only chosen checks ran"
    above = ", ".join(_obstacles(report, 0 if certified is None else certified + 1))
    above = above and f"; {above}"
    if certified is None:
        return f"{report.backend} is not certified at any level{above}"
    seen = evidence(result for result in report.results if result.level <= certified)
    return f"{report.backend} is certified at {level_title(certified)} ({', '.join(seen)}){above}"


def _obstacles(report: Report, first: int) -> Iterator[str]:
    """What keeps the levels from `first` on from being certified: "L1 fails (8)"."""
    for level in range(first, report.level + 1):
        found = counts(report.of_level(level))
        if found[Status.FAIL]:
            yield f"L{level} fails ({found[Status.FAIL]})"
        elif found[Status.WAIVED]:
            yield f"L{level} is waived ({found[Status.WAIVED]})"
        elif level == first and not found[Status.PASS]:
            yield f"L{level} has no pass"


def evidence(results: Iterable[Result]) -> Counter[Evidence]:
    """How many checks hold how far, the best word first; a check that is not claimed shows nothing."""
    found = Counter(result.evidence for result in results if result.status is not Status.NOT_CLAIMED)
    return Counter({word: found[word] for word in Evidence if found[word]})


def not_passed(report: Report) -> list[Result]:
    """Failures, then waived checks: what keeps a level from being certified."""
    return [result for status in (Status.FAIL, Status.WAIVED) for result in report.results if result.status is status]


def worst_error(result: Result) -> float | None:
    """The largest error over what is allowed, of all outputs; inf if one is not a number, None if none was taken."""
    return max((deviation.share for deviation in result.deviations), default=None)


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Everything that a run is identified by, as (name, text): size, seed, options, then the facts; nested by dots."""
    yield from (("size", report.size), ("seed", str(report.seed)), ("started", report.started))
    yield "seconds", f"{report.seconds:.1f}"
    yield from _flat("option", report.options)
    yield from _flat("", report.facts)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from _flat(full, value)
        else:
            yield full, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
