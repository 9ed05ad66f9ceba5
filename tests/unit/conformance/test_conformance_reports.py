"""JUnit XML, the HTML page and the console: what they hold, and that no text of a run is taken for markup."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console, RenderableType

from lineshaft_conformance.report.bundle import Verdict
from lineshaft_conformance.report.compare import Change, Diff
from lineshaft_conformance.report.console import diff_lines, final_table, show, verdict_lines
from lineshaft_conformance.report.junit import junit_xml
from lineshaft_conformance.report.page import BINS, html_page
from lineshaft_conformance.report.summary import headline, worst_error
from lineshaft_conformance.results import Deviation, Evidence, Report, Result, Status

EVIL = "<script>alert('x')</script> & [bold]markup[/bold]\n\x1b[31m\x00 ]]> \udcff second line"


def result(name: str, status: Status = Status.PASS, **fields: object) -> Result:
    given = {"evidence": Evidence.EXECUTED, "seconds": 0.5, **fields}
    return Result(name, int(name[1]), status, **given)  # type: ignore[arg-type]


def deviation(share: float) -> tuple[Deviation, ...]:
    return (Deviation("k", "0", share * 1e-6, 1e-6, 0.0, 1e-5),)


REPORT = Report(
    "cpu",
    {"program": "tape"},
    2,
    "smoke",
    7,
    (
        result("L0/loads/probe"),
        result("L1/attend/decode/a", op="attend", dtype="float32", shape_class="decode", deviations=deviation(0.5)),
        result("L1/attend/mixed/b", Status.FAIL, op="attend", dtype="float32", shape_class="mixed", reason=EVIL),
        result("L1/rope/c", Status.NOT_CLAIMED, op="rope", dtype="float32", reason="does not handle scaling"),
        result("L2/share/d", Status.WAIVED, reason=f"known {EVIL}", notes=("1.5 GB/s",)),
    ),
    "2026-01-02T03:04:05Z",
    3.0,
    {"versions": {"python": "3.11.9"}, "plan": EVIL},
)


def shown(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_junit_parses_and_counts() -> None:
    suites = ElementTree.fromstring(junit_xml(REPORT))
    found = [{key: suite.get(key) for key in ("name", "tests", "failures", "skipped")} for suite in suites]
    assert found == [
        {"name": "L0 loads and tells the truth", "tests": "1", "failures": "0", "skipped": "0"},
        {"name": "L1 ops", "tests": "3", "failures": "1", "skipped": "1"},
        {"name": "L2 paged attention and caches", "tests": "1", "failures": "0", "skipped": "1"},
    ]
    skipped = [case.get("message") or "" for case in suites.iter("skipped")]
    assert skipped[0] == "not claimed: does not handle scaling"
    assert skipped[1].startswith("waived: known")
    (failure,) = suites.iter("failure")
    assert failure.text == "<script>alert('x')</script> & [bold]markup[/bold]\n\\x1b[31m\\x00 ]]> \\udcff second line"
    assert failure.get("message") == "<script>alert('x')</script> & [bold]markup[/bold]"
    assert [text.text for text in suites.iter("system-out")] == ["1.5 GB/s"]


def test_junit_names_cases_and_properties() -> None:
    suites = ElementTree.fromstring(junit_xml(REPORT))
    case = suites[1].findall("testcase")[0]
    assert (case.get("classname"), case.get("name"), case.get("time")) == ("L1.attend.decode", "a", "0.500")
    properties = {item.get("name"): item.get("value") for item in suites[0].iter("property")}
    assert properties["backend"] == "cpu"
    assert properties["versions.python"] == "3.11.9"
    assert properties["option.program"] == "tape"
    assert properties["evidence"] == "executed"


class Page(HTMLParser):
    """Collects tags, attributes that could fetch something, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_escapes_all_text_and_needs_nothing_else() -> None:
    written = html_page(REPORT)
    page = Page(written)
    assert page.open == [], "every tag is closed"
    assert page.links == []
    assert page.tags.isdisjoint({"script", "b", "link", "img", "iframe", "object", "base"})
    assert "<script>alert('x')</script>" in "".join(page.words)
    assert not re.search(r"url\(|@import|https?://", written)
    assert "\x1b" not in written and "\x00" not in written
    written.encode("utf-8")


@pytest.mark.parametrize("field", ["id", "reason", "op", "dtype", "shape_class", "digest"])
def test_the_page_escapes_every_field_of_a_result(field: str) -> None:
    evil = replace(REPORT.results[1], kernels=(EVIL,), notes=(EVIL,), **{field: f'"><script>{EVIL}'})  # type: ignore[arg-type]
    page = Page(html_page(replace(REPORT, backend=EVIL, options={EVIL: EVIL}, results=(evil,))))
    assert "script" not in page.tags
    assert page.open == []


def test_the_page_tells_failures_first_and_evidence_by_row() -> None:
    words = " ".join("".join(Page(html_page(REPORT)).words).split())
    assert words.index("L1/attend/mixed/b") < words.index("Levels") < words.index("L1/attend/decode/a")
    assert "decode 1/1" in words and "mixed 0/1" in words and "all 0/1" in words
    assert "executed 4" in words, "a check that is not claimed shows nothing"
    assert "1 pass" not in words and "2 pass, 1 fail, 1 not claimed, 1 waived" in words


def test_the_page_sums_up_what_is_not_claimed_and_says_how_to_verify() -> None:
    declined = [result(f"L1/rope/{name}", Status.NOT_CLAIMED, op="rope", reason="no scaling") for name in "de"]
    passed = result("L1/rope/f", op="rope")
    page = html_page(replace(REPORT, results=(*REPORT.results, *declined, passed)))
    words = " ".join(" ".join(Page(page).words).split())
    assert "reason checks ops no scaling 2 rope does not handle scaling 1 rope All checks" in words
    assert '<span class="chip partly">all 1/3</span>' in page, "not the colour of a pass"
    assert '<span class="chip pass">decode 1/1</span>' in page
    assert words.endswith("lineshaft conformance verify . --key SIGNER.pub --rerun 20")
    assert "<h2>Not claimed" in page and "<h2>Not claimed" not in html_page(replace(REPORT, results=(passed,)))


def test_an_error_is_drawn_on_its_side_of_the_line() -> None:
    def colours(share: float) -> list[tuple[int, str]]:
        results = (result("L1/attend/a", op="attend", deviations=deviation(share)),)
        found = re.findall(
            r'<rect x="(\d+)".*?fill="var\(--(\w+)\)"', html_page(replace(REPORT, results=results)), re.DOTALL
        )
        return [((int(x) - 20) // 8, colour) for x, colour in found]

    assert colours(1.0)[0][1] == "mark"
    assert colours(1.01)[0] == (colours(1.0)[0][0] + 1, "fail")
    assert colours(0.0) == [(0, "mark")]
    assert colours(math.nan) == colours(math.inf) == [(BINS - 1, "fail")]
    assert colours(1e-30) == [(0, "mark")] and colours(1e30) == [(BINS - 1, "fail")]


def test_the_worst_error_is_over_what_is_allowed() -> None:
    assert worst_error(result("L1/a/b")) is None
    assert worst_error(result("L1/a/b", deviations=(Deviation("k", "0", 1, 2, 6, 3),))) == 2
    assert worst_error(result("L1/a/b", deviations=(Deviation("k", "0", 0, 0, 0, 0),))) == 0
    assert worst_error(result("L1/a/b", deviations=(Deviation("k", "0", 1e-9, 0, 0, 0),))) == math.inf


def test_the_headline_names_level_and_evidence() -> None:
    told = "cpu is certified at L0 loads and tells the truth (executed)"
    assert headline(replace(REPORT, level=0)) == told
    assert headline(REPORT) == f"{told}; L1 fails (1), L2 is waived (1)"
    assert headline(replace(REPORT, results=REPORT.results[:1])) == f"{told}; L1 has no pass"
    interpreted = replace(REPORT.results[0], id="L0/b", evidence=Evidence.INTERPRETED)
    mixed = replace(REPORT, results=(interpreted, *REPORT.results))
    assert headline(mixed).startswith("cpu is certified at L0 loads and tells the truth (executed, interpreted); ")
    assert headline(replace(REPORT, results=())) == "cpu is not certified at any level; L0 has no pass"
    broken = replace(REPORT.results[0], status=Status.FAIL)
    assert headline(replace(REPORT, results=(broken,))) == "cpu is not certified at any level; L0 fails (1)"


def test_chosen_checks_certify_nothing() -> None:
    chosen = replace(REPORT, facts={**REPORT.facts, "cases": ["L0/load/*"]})
    assert (chosen.certified, headline(chosen)) == (None, "cpu is not certified: only chosen checks ran")


def test_an_empty_run_has_every_report() -> None:
    empty = replace(REPORT, results=())
    assert "not certified" in html_page(empty) and "not certified" in shown(final_table(empty))
    assert len(ElementTree.fromstring(junit_xml(empty))) == 3


def test_the_console_shows_levels_failures_and_the_certificate() -> None:
    text = shown(final_table(REPORT))
    (row,) = (line for line in text.splitlines() if "L1 ops" in line)
    assert re.findall(r"[\d.]+", row)[1:] == ["1", "1", "1", "0", "1.5"]
    assert "[bold]markup[/bold]" in text, "text of the run is not markup"
    assert "\x1b" not in text
    assert text.index("fail L1/attend/mixed/b") < text.index("waived L2/share/d") < text.index("cpu is certified")


def test_the_console_shows_verdicts_and_differences() -> None:
    consistent = shown(verdict_lines(Verdict("consistent", "sha256:ab", (), REPORT)))
    assert "internally consistent, signer unknown (fingerprint sha256:ab)" in consistent
    assert "certified at L0" in consistent
    assert "verified: signed by sha256:ab" in shown(verdict_lines(Verdict("verified", "sha256:ab")))
    invalid = shown(verdict_lines(Verdict("invalid", "", ("[bold] was edited",), REPORT)))
    assert "[bold] was edited" in invalid and "certified" not in invalid
    assert "no differences" in shown(diff_lines(Diff((), (), ())))


def test_a_second_try_that_contradicts_is_not_told_as_an_edit() -> None:
    agreed = shown(verdict_lines(Verdict("verified", "sha256:ab", (), REPORT, tried=20)))
    assert "20 of 20 checks tried again agree\ncpu is certified" in agreed
    text = shown(verdict_lines(Verdict("verified", "sha256:ab", (), REPORT, 200, ("L1/a is fail now", "L1/b [x]"))))
    assert "verified: signed by sha256:ab" in text and "invalid" not in text
    assert "as signed, but 2 of 200 checks tried again do not hold here\n  L1/a is fail now\n  L1/b [x]\n" in text


DIFF = Diff(
    ("L0/a", "L1/a"),
    ("L3/x", "L3/y"),
    (
        Change("", "seed", "1", "2"),
        Change("L1/c", "kernels", "k", "[x]"),
        Change("L1/c", "error", "0.1", "0.3"),
        Change("L1/d", "status", "pass", "fail"),
        Change("L1/e", "kernels", "", "k"),
    ),
    7,
    absent_a=("L3",),
)


def test_differences_are_totals_then_statuses_then_errors() -> None:
    assert shown(diff_lines(DIFF)).splitlines() == [
        "7 checks in both, 2 only in A, 2 only in B",
        "1 differ in status, 1 in error by more than 2 times, 2 in kernels, 0 in evidence",
        "  --all lists those that differ in kernels and evidence",
        "all of L3 is only in B: 2 checks",
        "status",
        "  L1/d: pass -> fail",
        "error, as a share of what is allowed",
        "  L1/c: 0.1 -> 0.3",
        "only in A: 2 checks",
        "  L0/a",
        "  L1/a",
        "the run",
        "  seed: 1 -> 2",
    ]
    assert shown(diff_lines(DIFF, everything=True)).splitlines()[-3:] == [
        "kernels", "  L1/c: k -> [x]", "  L1/e: none -> k",
    ]  # fmt: skip


def test_off_a_terminal_no_line_is_broken_or_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name, why = "L1/" + "long-name-" * 30, "why " * 100
    show(diff_lines(Diff((), (), (Change(name, "status", "pass", "fail"),))))
    show(final_table(replace(REPORT, results=(result(name, Status.FAIL, reason=why),))))
    show(verdict_lines(Verdict("verified", "ab", (), None, 1, (f"{name} is fail now: {why}",))))
    lines = capsys.readouterr().out.splitlines()
    for line in (f"  {name}: pass -> fail", f"fail {name}", f"  {why}", f"  {name} is fail now: {why}"):
        assert line in lines
