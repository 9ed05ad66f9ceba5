"""Runs, differences and verdicts as rich shows them on a terminal. Text of the run is never read as markup."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lineshaft_conformance.report.bundle import Verdict
from lineshaft_conformance.report.canonical import visible
from lineshaft_conformance.report.compare import ERROR_FACTOR, Diff
from lineshaft_conformance.report.summary import counts, headline, level_title, levels, not_passed
from lineshaft_conformance.results import Report, Result, Status

STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.NOT_CLAIMED: "dim", Status.WAIVED: "yellow"}
WIDE = 160
"""Columns of a table where no terminal says how many there are."""
VERDICTS = {"verified": "bold green", "consistent": "yellow", "invalid": "bold red"}


def show(renderable: RenderableType) -> None:
    """Print; in a pipe or a file no line of text is broken."""
    terminal = sys.stdout.isatty()
    Console(width=None if terminal else WIDE, soft_wrap=not terminal).print(renderable)


def final_table(report: Report) -> RenderableType:
    """A row per level, then what failed or is waived with its reason, then what the run certifies."""
    table = Table("level")
    for name in (*map(str, Status), "seconds"):
        table.add_column(name, justify="right")
    for level in levels(report):
        found, results = counts(report.of_level(level)), report.of_level(level)
        cells = (Text(str(found[status]), style=STYLES[status] if found[status] else "dim") for status in Status)
        table.add_row(level_title(level), *cells, f"{sum(result.seconds for result in results):.1f}")
    certified = Text(headline(report), style="bold red" if report.certified is None else "bold green")
    return Group(table, *map(_outcome, not_passed(report)), certified)


def _outcome(result: Result) -> Text:
    return Text.assemble(
        (f"{result.status} ", STYLES[result.status]), (visible(result.id), "bold"), f"\n  {_indented(result.reason)}"
    )


def _indented(text: str) -> str:
    return visible(text).replace("\n", "\n  ")


def diff_lines(diff: Diff, everything: bool = False) -> RenderableType:
    """Totals, what differs in status, then in error, checks of one alone, the run's facts; kernels if asked for."""
    if not diff:
        return Text("no differences")
    lines = [*_totals(diff, everything), *_changes(diff, "status"), *_changes(diff, "error"), *_only(diff)]
    for what in ("", *(("kernels", "evidence") if everything else ())):
        lines += _changes(diff, what)
    return Group(*(Text(visible(line), style="" if line.startswith(" ") else "bold") for line in lines))


def _totals(diff: Diff, everything: bool) -> Iterator[str]:
    found = diff.counts
    yield f"{diff.shared} checks in both, {len(diff.only_a)} only in A, {len(diff.only_b)} only in B"
    yield (
        f"{found['status']} differ in status, {found['error']} in error by more than "
        f"{ERROR_FACTOR:g} times, {found['kernels']} in kernels, {found['evidence']} in evidence"
    )
    if not everything and (found["kernels"] or found["evidence"]):
        yield "  --all lists those that differ in kernels and evidence"
    for ids, absent, where in _sides(diff):
        levels = Counter(case.partition("/")[0] for case in ids)
        yield from (f"all of {level} is only in {where}: {levels[level]} checks" for level in absent)


def _only(diff: Diff) -> Iterator[str]:
    """A title and a line for each check that the other lacks, but for those of levels that it lacks wholly."""
    for ids, absent, where in _sides(diff):
        rest = [case for case in ids if case.partition("/")[0] not in absent]
        if rest:
            yield f"only in {where}: {len(rest)} checks"
            yield from (f"  {case}" for case in rest)


def _sides(diff: Diff) -> tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...]:
    """Of A and of B: the checks that only it has, the levels that the other lacks wholly, and its name."""
    return (diff.only_a, diff.absent_b, "A"), (diff.only_b, diff.absent_a, "B")


def _changes(diff: Diff, what: str) -> Iterator[str]:
    """A title and a line for each check that differs in this; of "" those of the run itself."""
    found = [change for change in diff.changes if (change.what == what if change.id else not what)]
    if found:
        yield {"": "the run", "error": "error, as a share of what is allowed"}.get(what, what)
    for change in found:
        yield f"  {change.id or change.what}: {change.before or 'none'} -> {change.after or 'none'}"


def verdict_lines(verdict: Verdict) -> RenderableType:
    """The verdict in a line, then each problem, or what was tried again and what the bundle certifies."""
    said = {
        "verified": f"verified: signed by {verdict.fingerprint}",
        "consistent": f"internally consistent, signer unknown (fingerprint {verdict.fingerprint})",
        "invalid": "invalid: this bundle is not as it was signed, or not by whom you think",
    }[verdict.status]
    lines = [Text(said, style=VERDICTS[verdict.status]), *(Text(f"  {_indented(p)}") for p in verdict.problems)]
    if verdict.tried:
        lines += _tried(verdict)
    if verdict.report and not verdict.problems:
        lines.append(Text(visible(headline(verdict.report))))
    return Group(*lines)


def _tried(verdict: Verdict) -> Iterator[Text]:
    count, bad = verdict.tried, len(verdict.contradicted)
    if bad:
        yield Text(f"as signed, but {bad} of {count} checks tried again do not hold here", style="bold red")
        yield from (Text(f"  {_indented(said)}") for said in verdict.contradicted)
    else:
        yield Text(f"{count} of {count} checks tried again agree", style="bold green")
