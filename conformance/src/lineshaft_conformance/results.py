"""What checking a backend gives: the outcome of each check, and all of them together with what they ran on.

Plain data, so that results cross process borders and go into bundles; knows no backend and no array library but NumPy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """The four outcomes of a check."""

    PASS = "pass"
    FAIL = "fail"
    NOT_CLAIMED = "not claimed"  # permanent: the backend declines, with a reason
    WAIVED = "waived"  # temporary: it fails, and the waiver file says why and until when


class Evidence(StrEnum):
    """How far a result was seen to hold, best first; set by the harness alone."""

    EXECUTED = "executed"
    INTERPRETED = "interpreted"
    COMPILED_ONLY = "compiled-only"
    DECLARED = "declared"


@dataclass(frozen=True)
class Deviation:
    """How far one output of one kernel is from the float64 reference, and how far it may be: L2 (RMS) and Linf."""

    kernel: str
    output: str
    l2: float
    l2_allowed: float
    linf: float
    linf_allowed: float

    @property
    def share(self) -> float:
        """The larger error over what is allowed; inf if one is not a number."""
        return max(_share(self.l2, self.l2_allowed), _share(self.linf, self.linf_allowed))


def _share(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    share = error / allowed if allowed > 0 else math.inf
    return math.inf if math.isnan(share) else share


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    `reason` says why for every status but a pass. `shape_class` is the part of the case's id before the first slash
    (decode, prefill, mixed, ...). `digest` is the sha256 of all outputs, in hexadecimal ("" where there are none).
    """

    id: str
    level: int
    status: Status
    reason: str = ""
    op: str = ""
    dtype: str = ""
    shape_class: str = ""
    kernels: tuple[str, ...] = ()
    deviations: tuple[Deviation, ...] = ()
    notes: tuple[str, ...] = ()  # measured figures and other things worth telling, a line each
    digest: str = ""
    evidence: Evidence = Evidence.DECLARED
    seconds: float = 0.0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_json` after a trip through JSON. Raises TypeError, ValueError or KeyError for another."""
        given = dict(data)
        given["status"], given["evidence"] = Status(given["status"]), Evidence(given["evidence"])
        given["deviations"] = tuple(Deviation(**item) for item in given["deviations"])
        given["kernels"], given["notes"] = tuple(given["kernels"]), tuple(given["notes"])
        return cls(**given)


@dataclass(frozen=True)
class Report:
    """One run of the suite. `level` is the highest level asked for; `facts` holds versions, device and machine, and
    under "cases" the patterns of a run of chosen checks."""

    backend: str
    options: Mapping[str, Any]
    level: int
    size: str
    seed: int
    results: tuple[Result, ...]
    started: str  # ISO 8601, UTC
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of_level(self, level: int) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.level == level)

    @property
    def chosen(self) -> bool:
        """Whether only chosen checks ran, and not all of their levels."""
        return bool(self.facts.get("cases"))

    @property
    def certified(self) -> int | None:
        """The highest level up to which nothing fails or is waived; None if not even level 0 is passed.

        A level without a single pass is not passed: supporting nothing is a failure. Chosen checks certify nothing.
        """
        if self.chosen:
            return None
        reached = None
        for level in range(self.level + 1):
            found = [result.status for result in self.of_level(level)]
            if Status.PASS not in found or Status.FAIL in found or Status.WAIVED in found:
                break
            reached = level
        return reached

    def to_json(self) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**given, "results": [result.to_json() for result in self.results]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_json` after a trip through JSON."""
        return cls(**{**data, "results": tuple(map(Result.from_json, data["results"]))})
