"""Waivers: what a file may say, and what waivers make of results."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.waivers import Waiver, WaiverError, Waivers, load_waivers

ENTRY = {
    "case": '"L1/attend/decode/*"',
    "issue": '"https://example.org/issues/7"',
    "until": "2026-12-31",
    "reason": '"the compiler drops the last page"',
}
LAST, AFTER = date(2026, 12, 31), date(2027, 1, 1)
FAILED = Result("L1/attend/decode/a", 1, Status.FAIL, reason="output 0 is off by 3.2")


def write(tmp_path: Path, *entries: dict[str, str]) -> Path:
    path = tmp_path / "waivers.toml"
    tables = ["\n".join(["[[waiver]]", *(f"{key} = {value}" for key, value in entry.items())]) for entry in entries]
    path.write_text("\n".join(tables), encoding="utf-8")
    return path


def waivers(case: str = "L1/attend/decode/*") -> Waivers:
    return Waivers((Waiver(case, "https://example.org/issues/7", LAST, "the compiler drops the last page"),))


def test_a_file_is_read(tmp_path: Path) -> None:
    assert load_waivers(write(tmp_path, ENTRY)) == waivers()
    assert load_waivers(write(tmp_path)) == Waivers()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("case", '"attend/decode"', "begins with L0/ to L5/"),
        ("case", '"L6/attend"', "begins with L0/ to L5/"),
        ("case", "7", "case is 7"),
        ("issue", '"issues/7"', r"http\(s\) link"),
        ("issue", '"ftp://example.org/7"', r"http\(s\) link"),
        ("issue", '"https://"', r"http\(s\) link"),
        ("issue", '"https://["', r"http\(s\) link"),
        ("issue", "7", r"http\(s\) link"),
        ("until", '"2026-12-31"', "without quotes"),
        ("until", "2026-12-31T10:00:00", "without quotes"),
        ("until", "2026-13-31", "cannot be read"),
        ("reason", '" "', "say in a sentence"),
        ("owner", '"me"', "unknown owner; give exactly case, issue, until, reason"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path: Path, key: str, value: str, said: str) -> None:
    with pytest.raises(WaiverError, match=said):
        load_waivers(write(tmp_path, {**ENTRY, key: value}))


@pytest.mark.parametrize("key", list(ENTRY))
def test_an_entry_lacks_nothing(tmp_path: Path, key: str) -> None:
    entry = {name: value for name, value in ENTRY.items() if name != key}
    with pytest.raises(WaiverError, match=f"waiver 2 lacks {key}"):
        load_waivers(write(tmp_path, {**ENTRY, "case": '"L1/rope/*"'}, entry))


@pytest.mark.parametrize("text", ["waivers = 1", "[waiver]\ncase = 1", "waiver = [1]", "waiver = [", 'x = "\xff"'])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(WaiverError, match=r"waivers\.toml"):
        load_waivers(path)


def test_a_missing_file_and_a_case_waived_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WaiverError, match="cannot be read"):
        load_waivers(tmp_path / "absent.toml")
    with pytest.raises(WaiverError, match="more than once"):
        load_waivers(write(tmp_path, ENTRY, ENTRY))


def test_a_failure_is_waived_up_to_the_last_day() -> None:
    (result,) = waivers().apply([FAILED], LAST)
    assert result.status is Status.WAIVED
    assert all(text in result.reason for text in (FAILED.reason, "2026-12-31", "https://example.org/issues/7"))
    assert waivers().expired(LAST) == ()


def test_an_expired_waiver_waives_nothing_and_says_so() -> None:
    (result,) = waivers().apply([FAILED], AFTER)
    assert result.status is Status.FAIL
    assert result.reason.startswith("the waiver expired on 2026-12-31 (https://example.org/issues/7)")
    assert FAILED.reason in result.reason
    assert waivers().expired(AFTER) == waivers().entries


def test_an_unexpired_waiver_counts_before_an_expired_one() -> None:
    both = Waivers((replace(waivers().entries[0], until=date(2020, 1, 1)), *waivers("L1/attend/decode/a").entries))
    assert both.apply([FAILED], LAST)[0].status is Status.WAIVED


@pytest.mark.parametrize("today", [LAST, AFTER])
def test_a_waived_check_that_passes_is_a_failure(today: date) -> None:
    (result,) = waivers().apply([replace(FAILED, status=Status.PASS, reason="")], today)
    assert result.status is Status.FAIL
    assert "passes although waived: remove the waiver" in result.reason


@pytest.mark.parametrize("seen", [Result("L1/rope/a", 1, Status.FAIL, "r"), replace(FAILED, status=Status.NOT_CLAIMED)])
def test_a_waiver_that_no_check_needs_is_a_failure_of_its_own(seen: Result) -> None:
    kept, added = waivers().apply([seen], LAST)
    assert kept == seen
    assert (added.id, added.level, added.status) == ("L0/waivers/L1/attend/decode/*", 0, Status.FAIL)
    assert "matches no check" in added.reason


def test_a_waiver_of_a_level_that_did_not_run_may_wait() -> None:
    seen = Result("L0/loads/probe", 0, Status.PASS)
    assert waivers().apply([seen], LAST) == (seen,)
    assert waivers().apply([FAILED], LAST, covered=())[0].status is Status.WAIVED
    assert waivers().apply([seen], LAST, covered=range(2))[1].status is Status.FAIL


def test_checks_that_no_waiver_names_stay_as_they_are() -> None:
    other = Result("L1/attend/decode2/a", 1, Status.FAIL, "r")
    assert waivers().apply([FAILED, other], LAST)[1] == other
