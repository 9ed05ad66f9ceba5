"""Runs, differences and verdicts as rich shows them on a terminal. Text of the run is never read as markup."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lineshaft_conformance.report.bundle import Verdict
from lineshaft_conformance.report.canonical import visible
from lineshaft_conformance.report.compare import Diff
from lineshaft_conformance.report.summary import counts, headline, level_title, levels, not_passed
from lineshaft_conformance.results import Report, Result, Status

STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.NOT_CLAIMED: "dim", Status.WAIVED: "yellow"}
VERDICTS = {"verified": "bold green", "consistent": "yellow", "invalid": "bold red"}


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


def diff_table(diff: Diff) -> RenderableType:
    """A row per difference; the run's own facts first."""
    if not diff:
        return Text("no differences")
    table = Table("check", "what", "A", "B")
    for change in diff.changes:
        table.add_row(
            *(Text(visible(text)) for text in (change.id or "(the run)", change.what, change.before, change.after))
        )
    for ids, where in ((diff.only_a, ("there", "missing")), (diff.only_b, ("missing", "there"))):
        for case in ids:
            table.add_row(Text(visible(case)), "check", *where)
    return table


def verdict_lines(verdict: Verdict) -> RenderableType:
    """The verdict in a line, then each problem, or what an untouched bundle certifies."""
    said = {
        "verified": f"verified: signed by {verdict.fingerprint}",
        "consistent": f"internally consistent, signer unknown (fingerprint {verdict.fingerprint})",
        "invalid": "invalid: this bundle is not as it was signed, or not by whom you think",
    }[verdict.status]
    lines = [Text(said, style=VERDICTS[verdict.status]), *(Text(f"  {_indented(p)}") for p in verdict.problems)]
    if verdict.report and not verdict.problems:
        lines.append(Text(visible(headline(verdict.report))))
    return Group(*lines)
