"""What a kernel is: one implementation of an op, the problems it takes, and how it is bound to a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lineshaft_contract.problems import Problem

if TYPE_CHECKING:
    from lineshaft_contract.sessions import Session
    from lineshaft_contract.steps import HostStep, StepShape
    from lineshaft_contract.weights import Local, Param

Bound = Callable[..., Any]
"""A kernel bound to its problem and session: takes the op's arrays, nothing else."""

HostPrepare = Callable[["HostStep"], None]
"""Host planning: run once a step before submission; writes only the kernel's own static workspace."""

Pack = Callable[["Param", "Local"], "dict[str, Any]"]
"""Prepare one coordinate's share of a parameter for a packing: on the host, pure, re-runnable; may dequantize. Leaves
are NumPy arrays, or arrays of the session's own library; their shapes are equal at every coordinate and never depend on
values."""


def always(problem: Problem) -> str | None:
    """The `supports` of a kernel that takes every problem whose features it handles."""
    return None


def no_prepare(problem: Problem, shape: StepShape, session: Session) -> HostPrepare | None:
    """The `prepare` of a kernel that plans nothing on the host."""
    return None


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    `handles` is a closed world: the features (see `Problem.features`) that the kernel knows of. `supports` returns
    None or the reason why it declines; a kernel that computes below the problem's dtype must decline. `layout` names
    the packing of the weight or cache it reads ("" where the op has none): all kernels that share a weight or a cache
    must agree on it. `pack` makes weights of that layout (None: the session's own dense packing).

    `tunable` kernels of equal priority and layout are measured on each problem (`lineshaft_contract.timing`), and the
    fastest is taken; others of equal priority are a tie, and so are all on problems that `unmeasurable` names. A choice
    is kept until a name, `version`, layout or `options` changes.
    """

    name: str
    op: str
    backend: str
    bind: Callable[[Any, Any], Bound]  # (problem, session)
    api: int = 1
    priority: int = 0
    layout: str = ""
    pack: Pack | None = None
    tunable: bool = False
    version: str = "1"
    handles: frozenset[str] = frozenset()
    supports: Callable[[Any], str | None] = always
    prepare: Callable[[Any, StepShape, Any], HostPrepare | None] = no_prepare
    options: Mapping[str, str] = field(default_factory=dict)
