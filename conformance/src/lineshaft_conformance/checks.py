"""What a check is: a stable id, a level, and a function that tries one thing on a backend and raises if it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from lineshaft_conformance.results import Deviation
from lineshaft_contract.sessions import HostArray

if TYPE_CHECKING:
    from lineshaft_conformance.subject import Subject

LEVELS = range(6)


class Failure(Exception):
    """The backend is wrong; the message says what was seen and what the contract asks."""


class NotClaimed(Exception):
    """The backend declines what this check tries; the message is its own reason."""


def fail(message: str) -> NoReturn:
    """Raises Failure."""
    raise Failure(message)


def require(condition: object, message: str) -> None:
    """Raises Failure unless `condition` holds."""
    if not condition:
        raise Failure(message)


def expect(kind: type[Exception], call: Callable[[], object], what: str) -> None:
    """Raises Failure unless `call` raises that kind of error."""
    try:
        call()
    except kind:
        return
    except Exception as error:
        fail(f"{what} raises {type(error).__name__} ({error}), not {kind.__name__}")
    fail(f"{what} raises nothing; the contract asks for {kind.__name__}")


def require_dtype(subject: Subject, dtype: str) -> None:
    """Raises NotClaimed where the backend does not execute a dtype."""
    dtypes = subject.capabilities.dtypes
    if dtype not in dtypes:
        raise NotClaimed(f"dtype {dtype} is not among Capabilities.dtypes ({', '.join(dtypes)})")


def rule_of(described: object) -> str:
    """The rule that a check is for, where the docstring of its function says it."""
    return " ".join((described.__doc__ or "").split())


@dataclass(frozen=True)
class Found:
    """What a check that passed has seen: the kernels it ran, how far off they were, and the outputs (for a digest)."""

    kernels: tuple[str, ...] = ()
    deviations: tuple[Deviation, ...] = ()
    outputs: Sequence[HostArray] = ()
    notes: tuple[str, ...] = ()  # measured figures, a line each


@dataclass(frozen=True)
class Check:
    """One thing that is tried on a backend.

    id      stable, and the same for every backend: "L1/attend/decode/gqa4-page16-garbage_tail-bf16"
    run     (subject, seed) -> Found; raises Failure, NotClaimed with the backend's reason, or whatever the backend
            raises, which is a failure too
    rule    the contract's rule or the public bug (a link) that the check exists for
    limit   seconds after which the check is a failure and its process is ended
    compiled_only  it compiles for devices that are not here, and runs nothing on one: no better evidence is its own
    """

    id: str
    run: Callable[[Subject, int], Found] = field(repr=False)
    rule: str = ""
    op: str = ""
    dtype: str = ""
    shape_class: str = ""
    limit: float = 60.0
    compiled_only: bool = False

    @property
    def level(self) -> int:
        return int(self.id[1])
