"""Whether this process interprets Triton kernels on the host. It has to be settled before Triton is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lineshaft_contract.errors import InvalidValue

VARIABLE = "TRITON_INTERPRET"
ON = frozenset({"1", "true", "on", "y", "yes"})
"""What Triton takes as yes."""


_COMPILING: ContextVar[bool] = ContextVar("_COMPILING", default=False)


def interpreting() -> bool:
    """Whether kernels that are imported or bound now are interpreted."""
    return os.environ.get(VARIABLE, "").strip().lower() in ON and not _COMPILING.get()


@contextmanager
def compiling() -> Iterator[None]:
    """What is bound inside is for a compiler, whatever this process does with kernels."""
    token = _COMPILING.set(True)
    try:
        yield
    finally:
        _COMPILING.reset(token)


def require_mode(interpret: bool) -> None:
    """Let kernels that this process imports from now on be interpreted, or compiled.

    Raises InvalidValue where that was settled otherwise already, since one process does the one or the other.
    """
    if interpreting() == interpret:
        return
    if not interpret:
        raise InvalidValue(f"{VARIABLE} is set: kernels would be interpreted; unset it, or set interpret = true")
    if "triton" in sys.modules:
        raise InvalidValue(f"Triton is imported already, and not to interpret; set {VARIABLE}=1 when Python starts")
    os.environ[VARIABLE] = "1"
