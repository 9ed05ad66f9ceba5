"""Runs the suite on one backend: chooses checks and seeds, runs them in a pool, and makes the report."""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from lineshaft.errors import InvalidValue, LineshaftError
from lineshaft_conformance.checks import LEVELS
from lineshaft_conformance.evidence import evidence_of, os_devices
from lineshaft_conformance.results import Evidence, Report, Result, Status
from lineshaft_conformance.runner.pool import LOAD, Listed, LoadFailed, Pool, Task
from lineshaft_conformance.subject import Target
from lineshaft_contract.backends import BackendInfo, BackendKind
from lineshaft_contract.host import usable_cpus
from lineshaft_contract.ops.spec import Size

Progress = Callable[[int, int, Result], None]
"""Told after each try: how many are done, of how many, and the latest result."""

SIZES: tuple[Size, ...] = ("smoke", "full")
PLAN = re.compile(r"^plan ([0-9a-f]{8,64})\b")
"""A note of a check that tells the hash of the plan it ran."""


SHOWN = 200
"""Characters of a pattern that a message quotes; no id is as long."""


class UnknownCase(LineshaftError):
    """No check of the run has this id, or matches this pattern."""


def quiet(done: int, total: int, result: Result) -> None:
    """Shows no progress."""


def run_suite(
    target: Target,
    *,
    level: int = 5,
    size: str = "smoke",
    seed: int = 0,
    jobs: int | None = None,
    only: Sequence[str] = (),
    limit: float | None = None,
    progress: Progress = quiet,
    **pool: Any,
) -> Report:
    """Every check up to `level`, or those of `only` (ids or shell patterns), on the backend.

    size    "smoke", "full" or "fuzz N": the smoke checks with N further seeds, which follow from `seed`
    limit   seconds for each check in place of its own
    pool    further arguments of `Pool`

    Every level runs even if one below it fails. A backend that does not load or start gives a report with one failure.
    Raises InvalidValue, UnknownCase, UnknownBackend, BackendUnavailable, UnknownKey.
    """
    if level not in LEVELS:
        raise InvalidValue(f"level {level}: allowed are {LEVELS[0]} to {LEVELS[-1]}")
    listed_size, seeds = parse_size(size, seed)
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    report = partial(Report, target.backend, dict(target.options), level, size, seed, started=started)
    try:
        with Pool(target, listed_size, level, jobs=jobs, limit=limit, **pool) as running:
            chosen = select(running.checks, only)
            tries = tries_of(running, tasks(chosen, seeds), progress)
            word, why = evidence(running.backend)
            results = tuple(merge(tries[check.id], evidence_for(check, word)) for check in chosen)
            facts = {**machine(), **backend_facts(running, results), "evidence": why}
    except LoadFailed as error:
        results, facts = (Result(LOAD, 0, Status.FAIL, str(error), seed=seed),), machine()
    if only:
        facts["cases"] = list(only)
    return report(results=results, seconds=time.monotonic() - clock, facts=facts)


def parse_size(size: str, seed: int) -> tuple[Size, tuple[int, ...]]:
    """Which checks to list, and the seeds to run each with. Raises InvalidValue."""
    found = re.fullmatch(r"fuzz ([1-9]\d{0,5})", size)
    if found:
        return "smoke", (seed, *further_seeds(seed, int(found[1])))
    if size in SIZES:
        return SIZES[SIZES.index(size)], (seed,)
    raise InvalidValue(f'size {size!r}: allowed are smoke, full and "fuzz N" with N further seeds, 1 to 999999')


def further_seeds(seed: int, count: int) -> Iterator[int]:
    """Seeds that follow from one: 31 bits of a hash of it and their number."""
    return (int.from_bytes(sha256(f"{seed}/{i}".encode()).digest()[:4]) >> 1 for i in range(count))


def select(checks: Sequence[Listed], only: Sequence[str]) -> tuple[Listed, ...]:
    """The checks that `only` names, in the order of `checks`; all if it names none. Raises UnknownCase."""
    ids = [check.id for check in checks]
    for pattern in only:
        if not any(matches(id, pattern) for id in ids):
            near = get_close_matches(pattern[:SHOWN], ids, n=3, cutoff=0.3)
            hint = f"the nearest are {', '.join(near)}" if near else "`lineshaft conformance list` shows all"
            shown = pattern if len(pattern) <= SHOWN else f"{pattern[:SHOWN]}..."
            raise UnknownCase(f"no check of this level and size has the id or pattern {shown!r}; {hint}")
    return tuple(check for check in checks if not only or any(matches(check.id, pattern) for pattern in only))


def matches(id: str, pattern: str) -> bool:
    return id == pattern or fnmatchcase(id, pattern)


def tasks(checks: Sequence[Listed], seeds: Sequence[int]) -> list[Task]:
    """Every check with every seed: theme by theme, and there seed by seed, since checks of a seed share their cases."""
    themes = [list(group) for _, group in groupby(checks, key=lambda check: check.theme)]
    return [Task(check, seed) for theme in themes for seed in seeds for check in theme]


def tries_of(pool: Pool, todo: Sequence[Task], progress: Progress) -> dict[str, list[Result]]:
    """The results of each check, in the order of `todo`."""
    order = {task: number for number, task in enumerate(todo)}
    found: dict[str, list[tuple[int, Result]]] = {}
    for done, (task, result) in enumerate(pool.run(todo), 1):
        found.setdefault(task.check.id, []).append((order[task], result))
        progress(done, len(todo), result)
    return {id: [result for _, result in sorted(tries, key=lambda item: item[0])] for id, tries in found.items()}


def merge(tries: Sequence[Result], word: Evidence) -> Result:
    """One result of a check: the first failure of all its seeds, else that of the first; nothing ran where declined."""
    result = next((found for found in tries if found.status is Status.FAIL), tries[0])
    if len(tries) > 1:
        failed = sum(found.status is Status.FAIL for found in tries)
        seconds = sum(found.seconds for found in tries)
        result = replace(result, notes=(*result.notes, f"{len(tries)} seeds, {failed} failed"), seconds=seconds)
    return replace(result, evidence=Evidence.DECLARED if result.status is Status.NOT_CLAIMED else word)


def evidence_for(check: Listed, word: Evidence) -> Evidence:
    """The word for what a check has seen, where `word` is the one for what runs on the backend."""
    return Evidence.COMPILED_ONLY if check.compiled_only else word


def evidence(backend: Mapping[str, Any]) -> tuple[Evidence, str]:
    """The evidence word and why, from what the child saw of the backend after it had started."""
    info = BackendInfo(**{**backend["info"], "kind": BackendKind(backend["info"]["kind"])})
    return evidence_of(info, backend["options"], backend["environment"], os_devices)


def backend_facts(pool: Pool, results: Sequence[Result]) -> dict[str, Any]:
    """What the run was made of."""
    backend = pool.backend
    plans = {found[1] for result in results for note in result.notes if (found := PLAN.match(note))}
    facts = {
        "plugin": f"{backend['distribution']} {backend['version']}".strip(),
        "requires": backend["requirements"],
        "kind": BackendKind(backend["info"]["kind"]).name.lower(),
        "claims": [name for name, claimed in backend["capabilities"]["determinism"].items() if claimed],
        "jobs": pool.jobs,
        "threads": pool.threads,
    }
    if plans:
        facts["plans"] = f"{len(plans)}, sha256 {sha256(' '.join(sorted(plans)).encode()).hexdigest()}"
    if pool.no_start:
        facts["a further process did not start"] = pool.no_start
    return facts


def machine() -> dict[str, Any]:
    """Versions, and the machine as the operating system shows it."""
    packages = ("lineshaft", "lineshaft-conformance", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "devices": list(os_devices()),
    }


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    if sys.platform == "linux" and info.exists():
        found = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
