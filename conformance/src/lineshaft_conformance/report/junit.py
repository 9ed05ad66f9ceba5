"""A run as JUnit XML: a test suite per level, a test case per check, in the dialect that CI servers read."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lineshaft_conformance.report.canonical import visible
from lineshaft_conformance.report.summary import counts, facts, headline, level_title, levels
from lineshaft_conformance.results import Report, Result, Status


def junit_xml(report: Report) -> bytes:
    """The document in UTF-8; `not claimed` and `waived` are skipped test cases with their reason."""
    root = Element("testsuites", name=visible(f"lineshaft conformance of {report.backend}"))
    for level in levels(report):
        _suite(root, report, level)
    indent(root)
    return bytes(tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _suite(root: Element, report: Report, level: int) -> None:
    results = report.of_level(level)
    found = counts(results)
    suite = SubElement(
        root, "testsuite", name=level_title(level), timestamp=report.started, tests=str(len(results)),
        failures=str(found[Status.FAIL]), skipped=str(found[Status.NOT_CLAIMED] + found[Status.WAIVED]), errors="0",
        time=f"{sum(result.seconds for result in results):.3f}",
    )  # fmt: skip
    _properties(suite, [("backend", report.backend), ("certified", headline(report)), *facts(report)])
    for result in results:
        _case(suite, result)


def _properties(parent: Element, pairs: list[tuple[str, str]]) -> None:
    properties = SubElement(parent, "properties")
    for name, value in pairs:
        SubElement(properties, "property", name=visible(name), value=visible(value))


def _case(suite: Element, result: Result) -> None:
    theme, _, name = result.id.rpartition("/")
    case = SubElement(
        suite, "testcase", classname=visible(theme.replace("/", ".")), name=visible(name), time=f"{result.seconds:.3f}"
    )
    _properties(case, [("evidence", result.evidence), ("seed", str(result.seed)), ("digest", result.digest)])
    reason = visible(result.reason)
    if result.status is Status.FAIL:
        SubElement(case, "failure", message=reason.partition("\n")[0]).text = reason
    elif result.status is not Status.PASS:
        SubElement(case, "skipped", message=f"{result.status}: {reason}")
    if result.notes:
        SubElement(case, "system-out").text = visible("\n".join(result.notes))
