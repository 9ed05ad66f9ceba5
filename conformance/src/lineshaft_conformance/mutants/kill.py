"""The kill run: every mutant against the checks that it names, in processes that a mutant may crash or hang.

A mutant is killed when such a check fails on it that the backend itself passes. To the runner's pool each mutant is
one check, of a suite that has nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from rich.table import Table
from rich.text import Text

from lineshaft.errors import InvalidValue
from lineshaft_conformance.checks import Check, Found
from lineshaft_conformance.levels import collect as collect_checks
from lineshaft_conformance.mutants import gallery
from lineshaft_conformance.mutants.mutant import Mutant
from lineshaft_conformance.report.canonical import visible
from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.runner.attempt import attempt
from lineshaft_conformance.runner.pool import Pool, Task
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.ops.spec import Size

COLLECT = "lineshaft_conformance.mutants.kill:collect"
COLLECT_THOROUGH = "lineshaft_conformance.mutants.kill:collect_thorough"
TARGET = Target("cpu", {"engine": "torch"})
"""What mutants are made of: they wrap kernels and sessions of PyTorch."""
LIMIT = 120.0
FATAL_LIMIT = 8.0
"""Seconds for a mutant, and for one that is expected to crash or to hang."""


@dataclass(frozen=True)
class Kill:
    """What became of a mutant.

    by      id of the check that failed it, "" for a survivor; the pattern of ids for one that ended its process
    reason  that check's failure, or why the mutant counts as a survivor
    """

    name: str
    rule: str
    level: int
    by: str
    reason: str
    seconds: float

    @property
    def killed(self) -> bool:
        return bool(self.by)


Progress = Callable[[int, int, Result], None]
"""Called with how many are done, how many there are, and the latest: a pass if it is killed."""


def kill_all(
    names: Sequence[str] = (),
    jobs: int | None = None,
    progress: Progress = lambda done, total, result: None,
    *,
    seed: int = 0,
    thorough: bool = False,
) -> list[Kill]:
    """Try to kill the mutants of these names (or shell patterns of names), or the whole gallery; in its order.

    `thorough` also demands that a mutant passes everything below its level. Raises InvalidValue for a name or pattern
    that no mutant has, ImportError where `lineshaft-cpu` is not installed.
    """
    wanted, kills = chosen(names), {}
    with Pool(TARGET, jobs=jobs, collect=COLLECT_THOROUGH if thorough else COLLECT) as pool:
        listed = {check.id: check for check in pool.checks}
        for task, result in pool.run([Task(listed[id], seed) for id in wanted]):
            kill = _outcome(wanted[task.check.id], result)
            kills[task.check.id] = kill
            progress(len(kills), len(wanted), replace(result, status=Status.PASS if kill.killed else Status.FAIL))
    return [kills[id] for id in wanted]


def chosen(names: Sequence[str]) -> dict[str, Mutant]:
    """The mutants of these names or patterns, by their id as a check."""
    for name in names:
        if not any(fnmatchcase(known, name) for known in gallery()):
            raise InvalidValue(f"no mutant is called {name!r}; the table of all is `lineshaft conformance mutants`")
    found = [m for m in gallery().values() if not names or any(fnmatchcase(m.name, name) for name in names)]
    return {check_id(mutant): mutant for mutant in found}


def check_id(mutant: Mutant) -> str:
    """A mutant's id as a check: those seen by checks of speed run alone, as such checks do."""
    return f"L{mutant.level}/{'speed/' if mutant.checks.startswith('L5/speed') else ''}{mutant.name}"


def _outcome(mutant: Mutant, result: Result) -> Kill:
    by, reason = "", result.reason
    if result.status is Status.PASS:
        by, reason = json.loads(result.notes[0])
    elif mutant.fatal and not reason.startswith("raised "):  # its process is gone
        by = mutant.checks
    return Kill(mutant.name, mutant.rule, mutant.level, by, reason, result.seconds)


def collect(subject: Subject, size: Size, level: int, thorough: bool = False) -> Iterator[Check]:
    """One check per mutant, which tells as a note what killed it, or why nothing did; for the pool."""
    suite = Suite(subject)

    def trial(mutant: Mutant) -> Callable[[Subject, int], Found]:
        return lambda subject, seed: suite.kill(mutant, seed, thorough)

    for mutant in gallery().values():
        limit = FATAL_LIMIT if mutant.fatal else LIMIT * (10 if thorough else 1)
        yield Check(check_id(mutant), trial(mutant), rule=mutant.rule, limit=limit)


def collect_thorough(subject: Subject, size: Size, level: int) -> Iterator[Check]:
    """As `collect`; a mutant also has to pass everything below its level."""
    return collect(subject, size, level, thorough=True)


class Suite:
    """The suite's checks for the unmutated backend, and which of them it fails itself."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._checks: dict[tuple[Size, int], list[Check]] = {}
        self._wrong: dict[tuple[str, int], str] = {}

    def kill(self, mutant: Mutant, seed: int, thorough: bool = False) -> Found:
        """[id of the check that fails the mutant, its reason] as JSON in a note; ["", why not] for a survivor."""
        subject = Subject(Target(self.subject.target.backend, self.subject.target.options, mutant.name))
        try:
            misnamed = self._fails_below(subject, mutant, seed) if thorough and not mutant.anywhere else ""
            verdict = ("", misnamed) if misnamed else self._verdict(subject, mutant, seed)
        finally:
            subject.close()
        return Found(notes=(json.dumps(verdict),))

    def _verdict(self, subject: Subject, mutant: Mutant, seed: int) -> tuple[str, str]:
        """(id, reason) of the first check that fails the mutant and not the backend itself."""
        matching, void = self.matching(mutant, subject), ""
        for check in matching:
            if mutant.fatal and self.wrong(check, seed):
                continue
            result, _ = attempt(check, subject, seed)
            if result.status is Status.FAIL:
                void = self.wrong(check, seed)
                if not void:
                    return check.id, result.reason
        return "", void or f"it survives {len(matching)} checks of {mutant.checks}"

    def _fails_below(self, subject: Subject, mutant: Mutant, seed: int) -> str:
        for check in self.checks("smoke", mutant.level - 1, subject):
            result, _ = attempt(check, subject, seed)
            if result.status is Status.FAIL and not self.wrong(check, seed):
                return f"named level {mutant.level}, but {check.id} fails it: {result.reason}"
        return ""

    def wrong(self, check: Check, seed: int) -> str:
        """Why the backend itself fails a check, so that a kill by it says nothing; "" if it does not."""
        if (check.id, seed) not in self._wrong:
            result, _ = attempt(check, self.subject, seed)
            reason = f"{check.id} fails the backend itself: {result.reason}"
            self._wrong[check.id, seed] = reason if result.status is Status.FAIL else ""
        return self._wrong[check.id, seed]

    def matching(self, mutant: Mutant, subject: Subject) -> list[Check]:
        """The checks that a mutant names."""
        return [c for c in self.checks(mutant.size, mutant.level, subject) if fnmatchcase(c.id, mutant.checks)]

    def checks(self, size: Size, level: int, subject: Subject) -> list[Check]:
        """Every check up to a level. Those of the backend itself serve a mutant that claims the same."""
        claims = (subject.capabilities, subject.info.toolchain)
        if claims != (self.subject.capabilities, self.subject.info.toolchain):
            return list(collect_checks(subject, size, level))
        if (size, level) not in self._checks:
            self._checks[size, level] = list(collect_checks(self.subject, size, level))
        return self._checks[size, level]


def kill_table(kills: Sequence[Kill]) -> Table:
    """A line each: mutant, level, the check that killed it and what it said; survivors come last, with their rule."""
    killed = sum(kill.killed for kill in kills)
    table = Table(title=f"{killed} of {len(kills)} mutants killed", box=None)
    for column, least in (("mutant", 22), ("level", 5), ("killed by", 28), ("because", None)):
        table.add_column(column, no_wrap=True, overflow="ellipsis", min_width=least)
    for kill in sorted(kills, key=lambda kill: not kill.killed):
        cells = kill.name, f"L{kill.level}", kill.by or "SURVIVED", kill.reason if kill.killed else kill.rule
        table.add_row(*(Text(visible(cell)) for cell in cells), style="" if kill.killed else "bold red")
    return table
