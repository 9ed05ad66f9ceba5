"""A backend's waiver file: which failing checks are known, why and until when; and what waivers make of results.

Knows no backend. A waiver never makes a check pass: a level with a waived check is not certified.
"""

from __future__ import annotations

import tomllib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lineshaft.errors import LineshaftError
from lineshaft_conformance.checks import LEVELS
from lineshaft_conformance.results import Result, Status

KEYS = ("case", "issue", "until", "reason")
DECIDED = (Status.PASS, Status.FAIL, Status.WAIVED)
"""Statuses of checks that ran: only these make a waiver be of use."""


class WaiverError(LineshaftError):
    """The waiver file cannot be read, or an entry of it is wrong."""


@dataclass(frozen=True)
class Waiver:
    """One entry: the id of a check or a shell pattern of ids, a link to the issue, the last day, and why."""

    case: str
    issue: str
    until: date
    reason: str

    @property
    def level(self) -> int:
        return int(self.case[1])

    def matches(self, check_id: str) -> bool:
        return self.case == check_id or fnmatchcase(check_id, self.case)

    def expired(self, today: date) -> bool:
        """Whether the last day is past."""
        return today > self.until


@dataclass(frozen=True)
class Waivers:
    """All entries of one file, in its order; of several that match a check the first unexpired one counts."""

    entries: tuple[Waiver, ...] = ()

    def expired(self, today: date) -> tuple[Waiver, ...]:
        return tuple(waiver for waiver in self.entries if waiver.expired(today))

    def apply(
        self, results: Sequence[Result], today: date, covered: Container[int] | None = None
    ) -> tuple[Result, ...]:
        """The results as waivers leave them, and a failure for every waiver that no check of the run needs.

        A failing check becomes `waived`, or stays a failure if its waiver is expired; a waived check that passes
        becomes a failure. `covered` are the levels that were run whole (None: those of the results): a waiver of
        another level may be left unused. Give () where a run took only some checks of a level.
        """
        levels = {result.level for result in results} if covered is None else covered
        ran = [result.id for result in results if result.status in DECIDED]
        unused = [w for w in self.entries if w.level in levels and not any(map(w.matches, ran))]
        return (*(self._applied(result, today) for result in results), *map(_failure, unused))

    def _applied(self, result: Result, today: date) -> Result:
        found = [waiver for waiver in self.entries if waiver.matches(result.id)]
        if not found or result.status not in (Status.PASS, Status.FAIL):
            return result
        waiver = next((waiver for waiver in found if not waiver.expired(today)), found[0])
        if result.status is Status.PASS:
            reason = f"passes although waived: remove the waiver, or narrow it, {waiver.case!r} ({waiver.issue})"
            return replace(result, status=Status.FAIL, reason=reason)
        if waiver.expired(today):
            return replace(result, reason=f"the waiver expired on {waiver.until} ({waiver.issue}): {result.reason}")
        reason = f"{result.reason} (waived until {waiver.until}: {waiver.reason}; {waiver.issue})"
        return replace(result, status=Status.WAIVED, reason=reason)


def _failure(waiver: Waiver) -> Result:
    """The failure that stands for a waiver which nothing needs."""
    reason = f"the waiver {waiver.case!r} ({waiver.issue}) matches no check that ran: remove it or correct its case"
    return Result(id=f"L0/waivers/{waiver.case}", level=0, status=Status.FAIL, reason=reason)


def load_waivers(path: Path) -> Waivers:
    """The waivers of a TOML file. Raises WaiverError for a file that is missing, not TOML, or wrong in any entry."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WaiverError(f"the waiver file {path} cannot be read: {error}; give a TOML file in UTF-8") from error
    entries = data.pop("waiver", [])
    if data or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        given = ", ".join(map(repr, data)) or "'waiver' as something else"
        raise WaiverError(f"{path} holds {given}; allowed are only tables written as [[waiver]]")
    waivers = tuple(_waiver(f"{path}, waiver {i}", entry) for i, entry in enumerate(entries, 1))
    cases = [waiver.case for waiver in waivers]
    for case in cases:
        if cases.count(case) > 1:
            raise WaiverError(f"{path} waives {case!r} more than once; keep one of these entries")
    return Waivers(waivers)


def _waiver(where: str, entry: Mapping[str, Any]) -> Waiver:
    if set(entry) != set(KEYS):
        missing, unknown = sorted(set(KEYS) - set(entry)), sorted(set(entry) - set(KEYS))
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise WaiverError(f"{where} {' and '.join(wrong)}; give exactly {', '.join(KEYS)}")
    case, issue, until, reason = (entry[key] for key in KEYS)
    if not isinstance(case, str) or not case.startswith(tuple(f"L{level}/" for level in LEVELS)):
        raise WaiverError(f"{where}: case is {case!r}; give an id or a pattern that begins with L0/ to L{LEVELS[-1]}/")
    if not isinstance(issue, str) or not _is_link(issue):
        raise WaiverError(f"{where}: issue is {issue!r}; give the http(s) link of the issue")
    if not isinstance(until, date) or isinstance(until, datetime):
        raise WaiverError(f"{where}: until is {until!r}; give its last day as a date without quotes: 2026-12-31")
    if not isinstance(reason, str) or not reason.strip():
        raise WaiverError(f"{where}: reason is {reason!r}; say in a sentence why the check fails")
    return Waiver(case, issue, until, reason)


def _is_link(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not any(map(str.isspace, text))
