"""Two runs side by side, and a run against a second try of some of its checks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lineshaft_conformance.report.bundle import load_bundle
from lineshaft_conformance.report.summary import facts, worst_error
from lineshaft_conformance.results import Report, Result, Status

ERROR_FACTOR = 2.0
"""Errors that differ by less are told apart by no one: another seed or thread count moves them as much."""
DIFFERENCES = ("status", "error", "kernels", "evidence")
"""What two results of a check are compared in."""
REPEATABLE = (Status.PASS, Status.NOT_CLAIMED)


@dataclass(frozen=True)
class Change:
    """One thing that differs; `what` is status, error (share of the allowed), kernels, evidence, or a fact's name."""

    id: str  # of the check; "" for a fact of the run
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Diff:
    """How two runs differ. `only_a` and `only_b` are ids of checks that the other lacks."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changes: tuple[Change, ...]
    shared: int = 0  # checks in both
    absent_a: tuple[str, ...] = ()  # levels of B ("L3") of which A has not a single check
    absent_b: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.only_a or self.only_b or self.changes)

    @property
    def counts(self) -> Counter[str]:
        """How many checks differ in status, error, kernels and evidence; the run's own facts are not in it."""
        return Counter(change.what for change in self.changes if change.id)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": {what: self.counts[what] for what in DIFFERENCES}}


def diff_bundles(a: Path, b: Path) -> Diff:
    """How the runs of two bundles differ. Raises BundleError if one of them is not whole."""
    return diff_reports(load_bundle(a), load_bundle(b))


def diff_reports(a: Report, b: Report) -> Diff:
    """Start and duration are left out, seconds of checks too."""
    in_a, in_b = ({result.id: result for result in report.results} for report in (a, b))
    shared = [case for case in in_a if case in in_b]
    changes = (change for case in shared for change in _result_changes(in_a[case], in_b[case]))
    return Diff(
        tuple(case for case in in_a if case not in in_b),
        tuple(case for case in in_b if case not in in_a),
        (*_fact_changes(a, b), *changes),
        len(shared),
        _absent(a, b),
        _absent(b, a),
    )


def _absent(one: Report, other: Report) -> tuple[str, ...]:
    """The levels that `one` lacks wholly and `other` has."""
    missing = {result.level for result in other.results} - {result.level for result in one.results}
    return tuple(f"L{level}" for level in sorted(missing))


def _fact_changes(a: Report, b: Report) -> Iterator[Change]:
    of_a, of_b = ({"backend": r.backend, "level": f"L{r.level}", **dict(facts(r))} for r in (a, b))
    for name in dict.fromkeys([*of_a, *of_b]):
        before, after = of_a.get(name, ""), of_b.get(name, "")
        if before != after and name not in ("started", "seconds"):
            yield Change("", name, before, after)


def _result_changes(a: Result, b: Result) -> Iterator[Change]:
    for name in ("status", "kernels", "evidence"):
        before, after = getattr(a, name), getattr(b, name)
        if before != after:
            shown = [", ".join(value) if isinstance(value, tuple) else str(value) for value in (before, after)]
            yield Change(a.id, name, *shown)
    before, after = worst_error(a), worst_error(b)
    if before is not None and after is not None and max(before, after) > ERROR_FACTOR * min(before, after):
        yield Change(a.id, "error", f"{before:.3g}", f"{after:.3g}")


def sample_ids(report: Report, count: int, seed: int) -> tuple[str, ...]:
    """Ids for a second try, drawn without repetition from the checks that hold: passed or not claimed."""
    held = sorted(result.id for result in report.results if result.status in REPEATABLE)
    return tuple(random.Random(seed).sample(held, min(count, len(held))))


def compare_rerun(report: Report, results: Iterable[Result], run_determinism: bool) -> tuple[str, ...]:
    """What a second try, with each check's own seed and without waivers, gives otherwise than the report says.

    Outputs must be equal bit by bit only where the backend claims `run` determinism.
    """
    told = {result.id: result for result in report.results}
    return tuple(
        problem for result in results for problem in _rerun_problems(told.get(result.id), result, run_determinism)
    )


def _rerun_problems(told: Result | None, again: Result, run_determinism: bool) -> Iterator[str]:
    if told is None:
        yield f"{again.id} is not in the report"
        return
    expected = Status.FAIL if told.status is Status.WAIVED else told.status
    if again.status is not expected:
        yield f"{again.id} is {again.status} now, the report says {expected}: {again.reason or told.reason}"
    elif run_determinism and told.seed == again.seed and told.digest and again.digest and told.digest != again.digest:
        yield f"{again.id} gives other outputs now, though the backend claims the same in each run"
