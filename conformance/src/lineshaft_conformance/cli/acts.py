"""What each command of `lineshaft conformance` does; prints, and returns or raises what becomes the exit status."""

from __future__ import annotations

import secrets
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime

from rich.console import Console

from lineshaft.cli.options import pairs
from lineshaft.errors import (
    AmbiguousBackend,
    BackendError,
    BackendUnavailable,
    InvalidValue,
    LineshaftError,
    UnknownBackend,
)
from lineshaft_conformance.cli.bar import Bar
from lineshaft_conformance.report.bundle import BundleError, Verdict, verify_bundle, write_bundle
from lineshaft_conformance.report.canonical import canonical
from lineshaft_conformance.report.compare import compare_rerun, diff_bundles, sample_ids
from lineshaft_conformance.report.console import WIDE, diff_lines, final_table, show, verdict_lines
from lineshaft_conformance.report.keys import keygen, load_private, public_path
from lineshaft_conformance.results import Report, Result, Status
from lineshaft_conformance.runner.pool import LOAD, LoadFailed, Pool
from lineshaft_conformance.runner.run import UnknownCase, parse_size, run_suite, select
from lineshaft_conformance.runner.soak import Soaked, soak
from lineshaft_conformance.subject import Target
from lineshaft_conformance.waivers import WaiverError, Waivers, load_waivers

PASSED, FAILED, USAGE, UNKNOWN_BACKEND, UNKNOWN_CASE, UNUSABLE, WAIVER, INVALID, UNSIGNED, SURVIVED = range(10)
"""Exit statuses, as `EPILOG` of the command explains them."""
ERRORS: Mapping[type[LineshaftError], int] = {
    AmbiguousBackend: USAGE,
    UnknownBackend: UNKNOWN_BACKEND,
    BackendError: UNUSABLE,
    UnknownCase: UNKNOWN_CASE,
    WaiverError: WAIVER,
    BundleError: INVALID,
}
"""Exit statuses of errors, the first that fits; USAGE for any other."""


SAMPLE = 5
"""Checks of a bundle that are tried again where nobody says how many."""
SAME_BITS = ("cpu", "devices", "numpy", "platform", "plugin", "python", "requires", "threads")
"""Facts that are equal where a claim of `run` determinism promises equal digests."""


def status_of(error: LineshaftError) -> int:
    return next((status for kind, status in ERRORS.items() if isinstance(error, kind)), USAGE)


def target(args: Namespace) -> Target:
    return Target(args.backend, dict(pairs("--backend-option", args.backend_option)))


def act_run(args: Namespace) -> int:
    waivers = load_waivers(args.waivers) if args.waivers else Waivers()
    if args.key:
        if not args.out:
            raise InvalidValue("--key signs a bundle; give --out DIR as well")
        load_private(args.key)  # a wrong key is told before the run, not after it
    with Bar() as bar:
        report = run_suite(
            target(args), level=args.level, size=args.size, seed=args.seed, jobs=args.jobs, only=args.case,
            limit=args.limit, progress=bar,
        )  # fmt: skip
    today = datetime.now(UTC).date()
    report = waived(report, waivers, today, whole=not args.case)
    if args.json:
        print(canonical(report.to_json()).decode(), end="")
    else:
        show(final_table(report))
    if args.out:  # last: a folder that cannot be written does not cost the results
        print(f"bundle in {args.out}, signed by {write_bundle(report, args.out, args.key)}", file=sys.stderr)
    expired = [waiver for waiver in waivers.expired(today) if waiver.level <= report.level]
    for waiver in expired:
        print(f"the waiver {waiver.case!r} expired on {waiver.until} ({waiver.issue}): remove it", file=sys.stderr)
    return WAIVER if expired else verdict(report, whole=not args.case)


def waived(report: Report, waivers: Waivers, today: date, *, whole: bool) -> Report:
    """The report as the waivers leave it; in one of single checks, or of none, no waiver counts as unused."""
    covered = None if whole and not unloaded(report) else ()
    return replace(report, results=waivers.apply(report.results, today, covered))


def unloaded(report: Report) -> bool:
    """Whether the backend did not even start."""
    return any(result.id == LOAD for result in report.results)


def verdict(report: Report, *, whole: bool) -> int:
    """The exit status of a run; a run of the whole suite needs a pass in every level."""
    if unloaded(report):
        return UNUSABLE
    failed = any(result.status is Status.FAIL for result in report.results)
    passed = {result.level for result in report.results if result.status is Status.PASS}
    return FAILED if failed or (whole and passed < set(range(report.level + 1))) else PASSED


def act_list(args: Namespace) -> int:
    size, _ = parse_size(args.size, 0)
    with loaded(args.backend), Pool(target(args), size, args.level, jobs=1) as pool:
        for check in select(pool.checks, args.case):
            print(f"{check.id}  {check.rule}".rstrip())
    return PASSED


@contextmanager
def loaded(backend: str) -> Iterator[None]:
    """Turns a backend that does not start into an error for the user."""
    try:
        yield
    except LoadFailed as error:
        raise BackendUnavailable(f"the backend {backend!r} does not load: {error}; mend its plugin") from error


def act_verify(args: Namespace) -> int:
    found = verify_bundle(args.bundle, args.key)
    if args.rerun != 0 and found.report and not found.problems:
        try:
            found = rerun(found, found.report, args.rerun or SAMPLE, args.jobs)
        except (UnknownBackend, BackendUnavailable) as error:
            if args.rerun:
                raise
            print(f"nothing was tried again, the backend is not usable here: {error}", file=sys.stderr)
    show(verdict_lines(found))
    if found.contradicted:
        return INVALID
    return {"verified": PASSED, "consistent": UNSIGNED, "invalid": INVALID}[found.status]


def rerun(found: Verdict, report: Report, count: int, jobs: int | None) -> Verdict:
    """Try a random sample of a report's checks again; the verdict with what is otherwise now."""
    seed = secrets.randbelow(1 << 31)
    ids = sample_ids(report, count, seed)
    print(f"trying {len(ids)} of {len(report.results)} checks again (sample seed {seed})", file=sys.stderr)
    with loaded(report.backend), Bar() as bar:
        again = run_suite(
            Target(report.backend, report.options), level=report.level, size=report.size, seed=report.seed, jobs=jobs,
            only=ids, progress=bar,
        )  # fmt: skip
        if unloaded(again):
            raise LoadFailed(again.results[0].reason)
    same = all(report.facts.get(name) == again.facts.get(name) for name in SAME_BITS)
    contradicted = compare_rerun(report, again.results, same and "run" in again.facts.get("claims", ()))
    return replace(found, tried=len(ids), contradicted=contradicted)


def act_diff(args: Namespace) -> int:
    found = diff_bundles(args.a, args.b)
    if args.json:
        print(canonical(found.to_json()).decode(), end="")
    else:
        show(diff_lines(found, args.all))
    return FAILED if found else PASSED


def act_keygen(args: Namespace) -> int:
    print(f"{args.file} (keep it secret) and {public_path(args.file)}: {keygen(args.file)}")
    return PASSED


def act_soak(args: Namespace) -> int:
    with loaded(args.backend):
        failures = repeat(args) if args.repeat else soak_seeds(args)
    for result in failures:
        print(f"{result.id} seed {result.seed}: {result.reason}")
    return FAILED if failures else PASSED


def soak_seeds(args: Namespace) -> list[Result]:
    def told(soaked: Soaked) -> None:
        print(f"seeds {soaked.seeds}, tries {soaked.tries}, failures {len(soaked.failures)}", file=sys.stderr)

    found = soak(target(args), args.minutes, args.least, seed=args.seed, jobs=args.jobs, only=args.case, told=told)
    print(
        f"{found.checks} checks ({found.not_claimed} not claimed), {found.seeds} seeds each, {found.tries} tries, "
        f"{len(found.failures)} failures"
    )
    return found.failures


def repeat(args: Namespace) -> list[Result]:
    """The whole smoke set several times with one seed: what failed, and what once ended otherwise than at first."""
    first: dict[str, Result] = {}
    odd: list[Result] = []
    for number in range(1, args.repeat + 1):
        report = run_suite(target(args), seed=args.seed, jobs=args.jobs, only=args.case)
        if unloaded(report):
            raise LoadFailed(report.results[0].reason)
        odd += [
            r for r in report.results if r.status is Status.FAIL or r.status is not first.setdefault(r.id, r).status
        ]
        print(f"run {number} of {args.repeat}: {dict(Counter(map(str, (r.status for r in report.results))))}")
    return odd


def act_mutants(args: Namespace) -> int:
    from lineshaft_conformance.mutants import gallery
    from lineshaft_conformance.mutants.kill import kill_all, kill_table

    try:
        if args.list:
            for mutant in gallery().values():
                print(f"L{mutant.level}  {mutant.name}  {mutant.rule}")
            return PASSED
        with loaded("cpu"), Bar() as bar:
            kills = kill_all(args.names, args.jobs, bar, thorough=args.thorough)
    except ImportError as error:
        raise BackendUnavailable(f"mutants are made of the CPU backend ({error}); install lineshaft-cpu") from error
    Console(width=None if sys.stdout.isatty() else WIDE).print(kill_table(kills))
    return PASSED if all(kill.killed for kill in kills) else SURVIVED


ACTS: Mapping[str, Callable[[Namespace], int]] = {
    "run": act_run,
    "list": act_list,
    "verify": act_verify,
    "diff": act_diff,
    "keygen": act_keygen,
    "mutants": act_mutants,
    "soak": act_soak,
}
"""The commands by name."""
