"""The bundle: a folder with the report as JSON, JUnit XML and HTML, and a signature over all of them.

What is signed names every check of the run with a digest of its result, so that an edited, missing or added one is
named. A valid signature says who signed, not that the run took place: `compare.sample_ids` is for trying again.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from lineshaft.errors import LineshaftError
from lineshaft_conformance.report.canonical import canonical, plain, sha256
from lineshaft_conformance.report.junit import junit_xml
from lineshaft_conformance.report.keys import fingerprint, load_private, load_public, raw
from lineshaft_conformance.report.page import html_page
from lineshaft_conformance.results import Report

SCHEMA = 1
REPORT, JUNIT, PAGE, SIGNATURE = "report.json", "junit.xml", "report.html", "bundle.sig.json"
FILES = (REPORT, JUNIT, PAGE, SIGNATURE)
LARGEST = 256 << 20
"""Bytes of one file of a bundle; more is not read. A full run is some megabytes."""
PURPOSE = b"lineshaft conformance bundle\n"
"""Signed before the content, so that a signature made for something else is no signature of a bundle."""

ABSENT: Final = object()
"""Stands for a fact that is not there; None is a value."""

Content = TypeVar("Content", Report, "Signature")


class BundleError(LineshaftError):
    """A bundle cannot be written or read at all. What is wrong inside one is told by its Verdict."""


@dataclass(frozen=True)
class Seal:
    """What is signed: the run, the sha256 of each result by check id ("" = planned, no result), and of each file."""

    schema: int
    run: Mapping[str, Any]
    cases: Mapping[str, str]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Signature:
    """The signature file; key and signature are lower-case hexadecimal."""

    seal: Seal
    public_key: str
    signature: str


REPORTS, SIGNATURES = TypeAdapter(Report), TypeAdapter(Signature)


@dataclass(frozen=True)
class Verdict:
    """What verifying found.

    verified    whole, and signed with the key that was given
    consistent  whole, but nothing says who the signer is: no key was given
    invalid     `problems` says why; `report` is what is still readable, if anything, and must not be relied on

    `tried` checks of a whole bundle were run again here, and `contradicted` says which of them end otherwise.
    """

    status: Literal["verified", "consistent", "invalid"]
    fingerprint: str
    problems: tuple[str, ...] = ()
    report: Report | None = None
    tried: int = 0
    contradicted: tuple[str, ...] = ()


def write_bundle(report: Report, out: Path, key: Path | None = None, planned: Iterable[str] = ()) -> str:
    """Write the bundle into the folder `out` and return the signer's fingerprint.

    `planned` are the ids that the run was to cover, where they may be more than the results'. Without a key the
    bundle is signed with a new one that is thrown away. A bundle that is there is replaced.
    Raises BundleError (two results of one id, values that are no report, `out` is something else) and KeyFileError.
    """
    signer = load_private(key) if key else Ed25519PrivateKey.generate()
    report = _checked(report)
    contents = {REPORT: canonical(report.to_json()), JUNIT: junit_xml(report), PAGE: html_page(report).encode()}
    seal = Seal(
        schema=SCHEMA, run=_run(report), cases={**dict.fromkeys(planned, ""), **_digests(report)},
        files={name: sha256(content) for name, content in contents.items()},
    )  # fmt: skip
    signature = Signature(seal, raw(signer.public_key()).hex(), signer.sign(_signed(seal)).hex())
    _write(out, {SIGNATURE: canonical(_json(signature)), **contents})
    return fingerprint(signer.public_key())


def verify_bundle(path: Path, public_key: Path | None = None) -> Verdict:
    """Check signature, completeness and every byte; see Verdict.

    Raises BundleError if `path` is not a folder with a bundle's files, and KeyFileError for a wrong key file.
    """
    trusted = load_public(public_key) if public_key else None
    contents, problems = _read(path)
    report = _parsed(REPORTS, REPORT, contents, problems)
    signature = _parsed(SIGNATURES, SIGNATURE, contents, problems)
    signer = _signer(signature, problems) if signature else None
    if signature:
        problems += _file_problems(signature.seal, contents)
        if report:
            problems += _report_problems(signature.seal, report)
    if signer and trusted and raw(signer) != raw(trusted):
        problems.append(f"signed with {fingerprint(signer)}, not with the key given, {fingerprint(trusted)}")
    name = fingerprint(signer) if signer else ""
    if problems:
        return Verdict("invalid", name, tuple(problems), report)
    return Verdict("verified" if trusted else "consistent", name, (), report)


def load_bundle(path: Path) -> Report:
    """The report of a bundle that is whole, whoever signed it. Raises BundleError."""
    verdict = verify_bundle(path)
    if verdict.report is None or verdict.problems:
        raise BundleError(f"the bundle {path} is invalid: {'; '.join(verdict.problems[:3])}; give one that verifies")
    return verdict.report


def _checked(report: Report) -> Report:
    """The report as its JSON gives it back: plain types, no second result of an id."""
    try:
        checked = REPORTS.validate_python(plain(report.to_json()))
    except ValidationError as error:
        raise BundleError(f"the report is not of the declared types: {_shown(error)}; correct the run") from error
    twice = list(_twice(checked))
    if twice:
        raise BundleError(f"two results are called {twice[0]!r}; ids are unique in a run: rename one check")
    return checked


def _twice(report: Report) -> Iterator[str]:
    seen = set[str]()
    for result in report.results:
        if result.id in seen:
            yield result.id
        seen.add(result.id)


def _run(report: Report) -> dict[str, Any]:
    return {name: value for name, value in report.to_json().items() if name != "results"}


def _digests(report: Report) -> dict[str, str]:
    return {result.id: sha256(canonical(result.to_json())) for result in report.results}


def _json(value: Report | Signature | Seal) -> Any:
    if isinstance(value, Report):
        return value.to_json()
    return {name: _json(part) if isinstance(part, Seal) else part for name, part in vars(value).items()}


def _signed(seal: Seal) -> bytes:
    return PURPOSE + canonical(_json(seal))


def _write(out: Path, contents: Mapping[str, bytes]) -> None:
    """Each file is replaced at once, the signature first: a bundle that is half new does not verify."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = {path.name for path in out.iterdir()}
        if held and (SIGNATURE not in held or held - set(FILES)):
            other = ", ".join(sorted(held - set(FILES))[:3]) or f"no {SIGNATURE}"
            raise BundleError(f"{out} is in use and not a bundle (it holds {other}); give a new or an empty folder")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out) as folder:
            for name, content in contents.items():
                Path(folder, name).write_bytes(content)
            for name in contents:
                os.replace(Path(folder, name), out / name)
    except OSError as error:
        raise BundleError(
            f"the bundle cannot be written to {out}: {error}; give a folder that you may write"
        ) from error


def _read(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a bundle, and what is wrong with the set of them."""
    try:
        held = {item.name: item for item in path.iterdir()}
        if not set(held) & set(FILES):
            raise BundleError(f"{path} holds no bundle; give the folder that `--out` named")
        problems = [f"the file {name} is missing" for name in FILES if name not in held]
        problems += [f"the file {name!r} is not part of the bundle" for name in sorted(set(held) - set(FILES))]
        contents = {}
        for name in FILES:
            if name in held and (not held[name].is_file() or held[name].stat().st_size > LARGEST):
                problems.append(f"{name} is not a file of at most {LARGEST >> 20} MiB")
            elif name in held:
                contents[name] = held[name].read_bytes()
    except OSError as error:
        raise BundleError(f"the bundle {path} cannot be read: {error}; give the folder of a bundle") from error
    return contents, problems


def _parsed(
    kind: TypeAdapter[Content], name: str, contents: Mapping[str, bytes], problems: list[str]
) -> Content | None:
    """The file as what it must be, or None and a problem more. Only the canonical spelling is accepted."""
    if name not in contents:
        return None
    try:
        data = json.loads(contents[name].decode("ascii"))
        value = kind.validate_python(data)
        if canonical(_json(value)) == contents[name]:
            return value
        problems.append(f"{name} is not spelled as the suite writes it")
    except ValidationError as error:
        problems.append(f"{name} is not what the suite writes: {_shown(error)}")
    except (ValueError, RecursionError) as error:
        problems.append(f"{name} is not JSON: {error}")
    return None


def _shown(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _signer(signature: Signature, problems: list[str]) -> Ed25519PublicKey | None:
    """The key that the bundle names, if the signature is made with it; else None and a problem more."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
        key.verify(bytes.fromhex(signature.signature), _signed(signature.seal))
        if re.fullmatch("[0-9a-f]*", signature.public_key + signature.signature):
            return key
        problems.append("key and signature are not lower-case hexadecimal")
    except ValueError as error:
        problems.append(f"the public key in {SIGNATURE} is none: {error}")
    except InvalidSignature:
        problems.append(f"the signature does not fit what {SIGNATURE} says")
    return None


def _file_problems(seal: Seal, contents: Mapping[str, bytes]) -> Iterator[str]:
    if seal.schema != SCHEMA:
        yield f"the bundle has schema {seal.schema}, this version reads {SCHEMA}; take the version that wrote it"
    if set(seal.files) != set(FILES) - {SIGNATURE}:
        yield f"the signature is for the files {', '.join(sorted(seal.files))}"
    for name, digest in sorted(seal.files.items()):
        if name in contents and sha256(contents[name]) != digest:
            yield f"{name} was edited after it was signed"


def _changed_facts(before: Any, now: Any) -> Iterator[str]:
    """Each value inside that is not the same, by its path."""
    left = [("", before, now)]
    while left:
        path, old, new = left.pop()
        if isinstance(old, dict) and isinstance(new, dict):
            names = sorted({*old, *new}, reverse=True)
            left += [
                (f"{path}.{name}" if path else name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in names
            ]
        elif old != new:
            yield f"{path} was {_told(old)} when it was signed and is {_told(new)}"


def _told(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)


def _report_problems(seal: Seal, report: Report) -> Iterator[str]:
    digests = _digests(report)
    yield from _changed_facts(seal.run, plain(_run(report)))
    for case, digest in sorted(seal.cases.items()):
        if case not in digests:
            yield f"the result of {case} is missing" if digest else f"the run was to cover {case} and has no result"
        elif digest != digests[case]:
            yield f"the result of {case} was edited"
    yield from (f"the result of {case} was added" for case in sorted(set(digests) - set(seal.cases)))
    yield from (f"there are two results of {case}" for case in _twice(report))
    yield from (f"{r.id} is filed under level {r.level}" for r in report.results if not r.id.startswith(f"L{r.level}/"))
