"""Runs one check on a started backend, in this process, and makes a Result of whatever comes out."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lineshaft.registry.loading import one_line
from lineshaft_conformance.checks import Check, Failure, Found, NotClaimed
from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.subject import Subject
from lineshaft_contract.sessions import HostArray

SUITE = Path(__file__).parents[1]


def attempt(check: Check, subject: Subject, seed: int) -> tuple[Result, BaseException | None]:
    """The check's Result, with the exception that a failure came from. Its evidence is left to the harness.

    Whatever is raised is caught, SystemExit too: only `Failure` and `NotClaimed` with a reason are the check's words.
    """
    started = time.perf_counter()
    found, status, reason = Found(), Status.PASS, ""
    error: BaseException | None = None
    try:
        found = check.run(subject, seed)
    except NotClaimed as declined:
        status, reason = Status.NOT_CLAIMED, " ".join(str(declined).split())
        if not reason:
            status, reason, error = Status.FAIL, "declined without a reason", declined
    except Failure as failure:
        status, reason, error = Status.FAIL, " ".join(str(failure).split()) or "failed", failure
    except BaseException as raised:
        status, reason, error = Status.FAIL, f"raised {one_line(raised)} ({where(raised)})", raised
    result = Result(
        check.id, check.level, status, reason, check.op, check.dtype, check.shape_class,
        kernels=tuple(found.kernels), deviations=tuple(found.deviations), notes=tuple(found.notes),
        digest=digest(found.outputs), seconds=time.perf_counter() - started, seed=seed,
    )  # fmt: skip
    return result, error


def digest(outputs: Sequence[HostArray]) -> str:
    """sha256 over dtype, shape and bytes of each output, in hexadecimal; "" for none."""
    if not outputs:
        return ""
    total = hashlib.sha256()
    for output in outputs:
        total.update(f"{output.dtype.name} {output.shape} ".encode())
        total.update(np.ascontiguousarray(output).tobytes())
    return total.hexdigest()


def where(error: BaseException) -> str:
    """`folder/file.py:line in function` of the innermost frame outside the suite, or of the innermost one."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if SUITE not in Path(frame.filename).parents]
    frame = (outside or frames)[-1]
    return place(frame.filename, frame.lineno or 0, frame.name)


def place(file: str, line: int, function: str) -> str:
    """A place in the source, without the machine's folders."""
    path = Path(file)
    return f"{path.parent.name}/{path.name}:{line} in {function}"
