"""What a mutant is, and how one is made of a backend by replacing kernels, its session or its capabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lineshaft.contract.backends import Backend, Capabilities
from lineshaft.contract.kernels import Bound, Kernel


@dataclass(frozen=True)
class Mutant:
    """One broken backend.

    rule    the rule of the contract that it breaks, in a sentence
    level   where the suite must fail it
    checks  shell pattern of the ids of the checks that see it: "L1/attend/*"
    make    breaks a started backend
    """

    name: str
    rule: str
    level: int
    checks: str
    make: Callable[[Backend], Backend]


@dataclass(frozen=True)
class Changed:
    """A backend like `base`, but for what is given here."""

    base: Any
    change_kernels: Callable[[Sequence[Kernel]], Sequence[Kernel]] = lambda kernels: kernels
    change_session: Callable[[Any], Any] = lambda session: session
    capabilities: Capabilities = field(default_factory=Capabilities)

    @property
    def name(self) -> str:
        return str(self.base.name)

    @property
    def memory(self) -> Any:
        return self.base.memory

    def kernels(self) -> Sequence[Kernel]:
        return self.change_kernels(self.base.kernels())

    def session(self, rank: int) -> Any:
        return self.change_session(self.base.session(rank))


def changed(backend: Any, **changes: Any) -> Changed:
    """The backend with other kernels, sessions or capabilities (see `Changed`)."""
    return Changed(backend, **{"capabilities": backend.capabilities, **changes})


def with_kernel(op: str, wrap: Callable[[Any, Bound], Bound], **fields: Any) -> Callable[[Any], Changed]:
    """Makes a mutant whose kernels of `op` are `wrap(problem, bound kernel)`; `fields` replace fields of the Kernel."""

    def broken(kernel: Kernel) -> Kernel:
        def bind(problem: Any, session: Any) -> Bound:
            return wrap(problem, kernel.bind(problem, session))

        return replace(kernel, bind=bind, **fields)

    def make(backend: Any) -> Changed:
        return changed(backend, change_kernels=lambda kernels: [broken(k) if k.op == op else k for k in kernels])

    return make


def with_session(method: str, wrap: Callable[..., Any]) -> Callable[[Any], Changed]:
    """Makes a mutant whose sessions call `wrap(session, original, *args, **kwargs)` for one of their methods."""

    def broken(session: Any) -> Any:
        original = getattr(session, method)
        setattr(session, method, lambda *args, **kwargs: wrap(session, original, *args, **kwargs))
        return session

    return lambda backend: changed(backend, change_session=broken)


def with_capabilities(**fields: Any) -> Callable[[Any], Changed]:
    """Makes a mutant that claims something else."""
    return lambda backend: changed(backend, capabilities=dataclasses.replace(backend.capabilities, **fields))
