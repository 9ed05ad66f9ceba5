"""Bundles and keys: what is written verifies, and nothing that was touched does."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from lineshaft_conformance.report.bundle import FILES, BundleError, load_bundle, verify_bundle, write_bundle
from lineshaft_conformance.report.canonical import canonical
from lineshaft_conformance.report.compare import compare_rerun, diff_bundles, diff_reports, sample_ids
from lineshaft_conformance.report.keys import KeyFileError, keygen, load_private, public_path
from lineshaft_conformance.results import Deviation, Evidence, Report, Result, Status


def result(name: str, **fields: Any) -> Result:
    given = {"status": Status.PASS, "digest": "ab" * 32, "evidence": Evidence.EXECUTED, "seconds": 0.25, "seed": 3}
    return Result(name, int(name[1]), **{**given, **fields})


RESULTS = (
    result("L0/loads/probe"),
    result("L1/attend/decode/a", op="attend", deviations=(Deviation("k", "0", 0.5, 1.0, 0.1, 1.0),), kernels=("k",)),
    result("L1/rope/b", status=Status.NOT_CLAIMED, reason="no rope", digest=""),
    result("L1/linear/c", status=Status.WAIVED, reason="known"),
)
REPORT = Report("cpu", {"program": "tape"}, 1, "smoke", 7, RESULTS, "2026-01-02T03:04:05Z", 1.5, {"plan": "3f"})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    private = tmp_path_factory.mktemp("keys") / "signer.pem"
    keygen(private)
    return private, public_path(private)


@pytest.fixture
def bundle(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    write_bundle(REPORT, tmp_path / "bundle", keys[0])
    return tmp_path / "bundle"


def edited(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file of a bundle, and spell it as the suite does."""
    data = json.loads(path.read_bytes())
    change(data)
    path.write_bytes(canonical(data))


def problems(bundle: Path) -> str:
    verdict = verify_bundle(bundle)
    assert verdict.status == "invalid"
    return "\n".join(verdict.problems)


def test_an_untouched_bundle_verifies_with_its_key(bundle: Path, keys: tuple[Path, Path]) -> None:
    verdict = verify_bundle(bundle, keys[1])
    assert (verdict.status, verdict.problems, verdict.report) == ("verified", (), REPORT)
    assert sorted(path.name for path in bundle.iterdir()) == sorted(FILES)


def test_without_a_key_it_is_consistent_and_another_key_does_not_verify(bundle: Path, tmp_path: Path) -> None:
    verdict = verify_bundle(bundle)
    assert verdict.status == "consistent"
    other = keygen(tmp_path / "other.pem")
    refused = verify_bundle(bundle, public_path(tmp_path / "other.pem"))
    assert refused.status == "invalid"
    assert other in refused.problems[0] and verdict.fingerprint in refused.problems[0]


def test_a_bundle_without_a_key_names_a_signer_of_its_own(tmp_path: Path) -> None:
    names = {write_bundle(REPORT, tmp_path / name) for name in ("a", "b")}
    assert names == {verify_bundle(tmp_path / name).fingerprint for name in ("a", "b")}
    assert len(names) == 2


@pytest.mark.parametrize("name", FILES)
def test_no_byte_of_a_file_can_change(bundle: Path, keys: tuple[Path, Path], name: str) -> None:
    whole = (bundle / name).read_bytes()
    for place in [*range(0, len(whole), 1 + len(whole) // 60), len(whole) - 1]:
        flipped = bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]])
        for content in (flipped, whole[:place] + whole[place + 1 :], whole[:place] + b" " + whole[place:]):
            (bundle / name).write_bytes(content)
            verdict = verify_bundle(bundle, keys[1])
            assert verdict.status == "invalid" and verdict.problems, (place, content[max(place - 20, 0) : place + 20])


def test_upper_case_hexadecimal_is_an_edit(bundle: Path) -> None:
    edited(bundle / "bundle.sig.json", lambda data: data.update(signature=data["signature"].upper()))
    assert "lower-case" in problems(bundle)


def test_a_signature_of_the_same_text_for_another_purpose_is_none(bundle: Path, keys: tuple[Path, Path]) -> None:
    def sign(data: Any) -> None:
        data["signature"] = load_private(keys[0]).sign(canonical(data["seal"])).hex()

    edited(bundle / "bundle.sig.json", sign)
    assert "the signature does not fit" in problems(bundle)


def test_an_edited_a_removed_and_an_added_case_are_named(bundle: Path) -> None:
    def change(data: Any) -> None:
        del data["results"][0]
        data["results"][0]["seed"] = 4
        data["results"].append({**data["results"][0], "id": "L1/new/d"})

    edited(bundle / "report.json", change)
    said = problems(bundle)
    assert "the result of L0/loads/probe is missing" in said
    assert "the result of L1/attend/decode/a was edited" in said
    assert "the result of L1/new/d was added" in said
    assert "L1/linear/c" not in said


def test_a_case_removed_from_the_signed_list_too_breaks_the_signature(bundle: Path) -> None:
    edited(bundle / "report.json", lambda data: data["results"].pop(0))
    edited(bundle / "bundle.sig.json", lambda data: data["seal"]["cases"].pop("L0/loads/probe"))
    assert "the signature does not fit" in problems(bundle)


def test_another_backends_name_is_named(bundle: Path) -> None:
    edited(bundle / "report.json", lambda data: data.update(backend="gpu"))
    assert "backend was 'cpu' when it was signed and is 'gpu'" in problems(bundle)
    edited(bundle / "bundle.sig.json", lambda data: data["seal"]["run"].update(backend="gpu"))
    assert "the signature does not fit" in problems(bundle)


def test_of_changed_facts_each_is_named_alone(bundle: Path) -> None:
    def change(data: Any) -> None:
        data["options"]["program"] = "loop"
        data["facts"] |= {"device": {"name": "b"}, "none": None}
        del data["facts"]["plan"]

    edited(bundle / "report.json", change)
    assert [said for said in verify_bundle(bundle).problems if "when it was signed" in said] == [
        "facts.device was absent when it was signed and is {'name': 'b'}",
        "facts.none was absent when it was signed and is None",
        "facts.plan was '3f' when it was signed and is absent",
        "options.program was 'tape' when it was signed and is 'loop'",
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_bundle_does_not_fit(
    bundle: Path, tmp_path: Path, keys: tuple[Path, Path], name: str
) -> None:
    write_bundle(replace(REPORT, backend="numpy"), tmp_path / "other", keys[0])
    shutil.copy(tmp_path / "other" / name, bundle / name)
    assert problems(bundle)


def test_what_was_planned_and_has_no_result_is_missing(tmp_path: Path) -> None:
    write_bundle(REPORT, tmp_path / "b", planned=["L0/loads/probe", "L1/attend/decode/z"])
    assert problems(tmp_path / "b") == "the run was to cover L1/attend/decode/z and has no result"


@pytest.mark.parametrize("name", FILES)
def test_missing_and_further_files_are_named(bundle: Path, name: str) -> None:
    (bundle / name).rename(bundle / "other.txt")
    said = problems(bundle)
    assert f"the file {name} is missing" in said
    assert "the file 'other.txt' is not part of the bundle" in said


@pytest.mark.parametrize("name", ["report.json", "bundle.sig.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'{"seal": 1}', b"NaN"],
    ids=lambda content: repr(content[:12]),
)
def test_corrupt_json_is_a_verdict(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    assert name in problems(bundle)


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, [[]], True, 1e400, -(2**70)], ids=repr)
def test_wrong_types_anywhere_are_a_verdict(bundle: Path, value: Any) -> None:
    for name in ("report.json", "bundle.sig.json"):
        whole = json.loads((bundle / name).read_bytes())
        for path in places(whole):
            data = json.loads((bundle / name).read_bytes())
            *outer, last = path
            holder = data
            for step in outer:
                holder = holder[step]
            if canonical(holder[last]) == canonical(value):
                continue
            holder[last] = value
            kept = (bundle / name).read_bytes()
            (bundle / name).write_bytes(canonical(data))
            assert verify_bundle(bundle).status == "invalid", path
            (bundle / name).write_bytes(kept)


def places(value: Any) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value, but for the value itself; of a list, to its first two items."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(key, *rest) for key, item in items[:20] for rest in [(), *places(item)]]


def test_a_folder_in_place_of_a_file_and_a_nested_value_are_verdicts(bundle: Path) -> None:
    nested = (bundle / "report.json").read_bytes().replace(b'"3f"', b"[" * 700 + b"]" * 700)
    (bundle / "report.json").write_bytes(nested)
    assert problems(bundle)
    (bundle / "junit.xml").unlink()
    (bundle / "junit.xml").mkdir()
    assert "junit.xml is not a file" in problems(bundle)


def test_what_is_no_bundle_at_all_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match="give the folder"):
            verify_bundle(path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be read"):
        verify_bundle(tmp_path / "file")
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(REPORT, tmp_path / "file")


def test_a_bundle_is_replaced_and_nothing_else_is(bundle: Path, tmp_path: Path) -> None:
    write_bundle(replace(REPORT, seed=8), bundle)
    assert load_bundle(bundle).seed == 8
    (tmp_path / "used").mkdir()
    for held in ("notes.txt", "report.html"):
        (tmp_path / "used" / held).write_text("mine")
        with pytest.raises(BundleError, match="in use and not a bundle"):
            write_bundle(REPORT, tmp_path / "used")
        assert (tmp_path / "used" / held).read_text() == "mine"
        (tmp_path / "used" / held).unlink()
    assert write_bundle(REPORT, tmp_path / "used").startswith("sha256:")


def test_values_that_json_lacks_survive(tmp_path: Path) -> None:
    deviations = (Deviation("k", "0", math.nan, 1.0, math.inf, 0.0),)
    odd = result("L1/attend/x", reason="\x1b[31m\udcff\x00", seconds=np.float32(2), deviations=deviations)
    facts = {"path": Path("/tmp"), "count": np.int64(3), "worst": -math.inf, 5: (1, None)}
    write_bundle(replace(REPORT, results=(odd,), facts=facts, seconds=2), tmp_path / "b")
    read = load_bundle(tmp_path / "b")
    assert read.facts == {"path": "/tmp", "count": 3, "worst": "-inf", "5": [1, None]}
    assert read.results[0].reason == "\\x1b[31m\\udcff\\x00"
    assert math.isnan(read.results[0].deviations[0].l2) and read.results[0].deviations[0].linf == math.inf


def test_a_report_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'L0/loads/probe'; ids are unique"):
        write_bundle(replace(REPORT, results=(RESULTS[0], RESULTS[0])), tmp_path / "b")
    with pytest.raises(BundleError, match=r"results\.0\.level"):
        write_bundle(replace(REPORT, results=(replace(RESULTS[0], level="one"),)), tmp_path / "b")  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_a_result_filed_under_another_level_is_named(tmp_path: Path) -> None:
    write_bundle(replace(REPORT, results=(replace(RESULTS[0], level=1),)), tmp_path / "b")
    assert problems(tmp_path / "b") == "L0/loads/probe is filed under level 1"


def test_a_private_key_is_its_owners_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "signer.pem"
    old = os.umask(0)
    try:
        name = keygen(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert name == write_bundle(REPORT, tmp_path / "b", path)
    held = path.read_bytes()
    with pytest.raises(KeyFileError, match="exists, and no key is overwritten"):
        keygen(path)
    assert path.read_bytes() == held
    path.unlink()
    with pytest.raises(KeyFileError, match=r"signer\.pem\.pub exists"):
        keygen(path)
    assert not path.exists()
    with pytest.raises(KeyFileError, match="cannot be written"):
        keygen(tmp_path / "absent" / "signer.pem")


def test_a_key_of_another_kind_is_refused(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    rsa = tmp_path / "rsa.pem"
    rsa.write_bytes(generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(KeyFileError, match="of another kind"):
        write_bundle(REPORT, tmp_path / "b", rsa)
    os.mkfifo(tmp_path / "fifo")
    for wrong in (keys[0], tmp_path / "absent", tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(KeyFileError, match="give a public Ed25519 key"):
            verify_bundle(bundle, wrong)
    with pytest.raises(KeyFileError, match="give a private Ed25519 key"):
        write_bundle(REPORT, tmp_path / "b", keys[1])


def test_a_diff_names_what_changed(bundle: Path, tmp_path: Path) -> None:
    worse = (replace(RESULTS[1].deviations[0], l2=1.01),)
    results = (
        replace(RESULTS[1], deviations=worse, kernels=("k2",), evidence=Evidence.INTERPRETED),
        replace(RESULTS[2], status=Status.FAIL),
        RESULTS[3],
        result("L1/new/d"),
    )
    write_bundle(replace(REPORT, results=results, seed=8, facts={"plan": "40"}), tmp_path / "other")
    diff = diff_bundles(bundle, tmp_path / "other")
    assert (diff.only_a, diff.only_b) == (("L0/loads/probe",), ("L1/new/d",))
    assert {(change.id, change.what, change.before, change.after) for change in diff.changes} == {
        ("", "seed", "7", "8"),
        ("", "plan", "3f", "40"),
        ("L1/attend/decode/a", "kernels", "k", "k2"),
        ("L1/attend/decode/a", "evidence", "executed", "interpreted"),
        ("L1/attend/decode/a", "error", "0.5", "1.01"),
        ("L1/rope/b", "status", "not claimed", "fail"),
    }
    assert (diff.shared, diff.absent_a, diff.absent_b) == (3, (), ("L0",))
    assert diff.counts == {"status": 1, "error": 1, "kernels": 1, "evidence": 1}
    assert not diff_bundles(bundle, bundle)


def test_errors_within_a_factor_of_two_are_no_difference() -> None:
    near = replace(RESULTS[1], deviations=(replace(RESULTS[1].deviations[0], l2=1.0),))
    assert not diff_reports(REPORT, replace(REPORT, results=(RESULTS[0], near, *RESULTS[2:]), seconds=9.0))


def test_a_bundle_that_is_not_whole_is_not_compared(bundle: Path, tmp_path: Path) -> None:
    write_bundle(REPORT, tmp_path / "other")
    (bundle / "junit.xml").write_bytes(b"")
    with pytest.raises(BundleError, match=r"junit\.xml was edited"):
        diff_bundles(tmp_path / "other", bundle)


def test_a_sample_is_drawn_from_what_holds() -> None:
    held = {"L0/loads/probe", "L1/attend/decode/a", "L1/rope/b"}
    assert set(sample_ids(REPORT, 10, seed=1)) == held
    many = replace(REPORT, results=tuple(result(f"L1/op/{i}") for i in range(100)))
    drawn = sample_ids(many, 10, seed=1)
    assert len(set(drawn)) == 10
    assert drawn == sample_ids(many, 10, seed=1) != sample_ids(many, 10, seed=2)


def test_a_second_try_must_agree() -> None:
    assert compare_rerun(REPORT, [*RESULTS[:3], replace(RESULTS[3], status=Status.FAIL)], True) == ()
    (said,) = compare_rerun(REPORT, [replace(RESULTS[0], status=Status.FAIL, reason="off by 3")], True)
    assert "L0/loads/probe is fail now, the report says pass: off by 3" in said
    assert "not in the report" in compare_rerun(REPORT, [result("L1/new/d")], True)[0]


def test_outputs_must_be_equal_only_where_that_is_claimed() -> None:
    other = replace(RESULTS[0], digest="cd" * 32)
    assert compare_rerun(REPORT, [other], run_determinism=False) == ()
    assert "other outputs" in compare_rerun(REPORT, [other], run_determinism=True)[0]
