"""What a mutant is, and how one is made of a backend by replacing kernels, session, capabilities or entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lineshaft_contract.backends import Backend, BackendInfo, Capabilities
from lineshaft_contract.kernels import Bound, Kernel
from lineshaft_contract.ops.spec import Size
from lineshaft_torch.bound import BoundKernel

Make = Callable[[Any], "Changed"]
"""Breaks a started backend."""

PAGED = frozenset(
    {"attend", "latent_attend", "rope_write_kv", "write_kv", "read_pages", "write_pages", "copy_pages", "copy_slots"}
)
"""Ops over the paged cache, whose cases are of level 2."""


@dataclass(frozen=True)
class Mutant:
    """One broken backend.

    rule      the rule of the contract that it breaks, in a sentence
    level     where the suite must fail it
    checks    shell pattern of the ids of the checks that see it: "L1/attend/*"
    make      breaks a started backend
    size      the smallest size of the suite that has such a check
    fatal     it ends or hangs its process, so that a check of it needs one of its own
    anywhere  it fails below its level too; what counts is that the level asked alone fails it
    info      what it registers instead of the backend's own entry
    """

    name: str
    rule: str
    level: int
    checks: str
    make: Callable[[Backend], Backend]
    size: Size = "smoke"
    fatal: bool = False
    anywhere: bool = False
    info: Callable[[BackendInfo], BackendInfo] = lambda info: info


def mutant(name: str, rule: str, cases: str, make: Make, **fields: Any) -> Mutant:
    """A mutant of the op that `cases`, the ids of its checks without the level, begin with."""
    op = cases.partition("/")[0]
    level = 2 if op in PAGED else 1
    return Mutant(f"{op}-{name}".replace("_", "-"), rule, level, f"L{level}/{cases}", make, **fields)


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


def with_kernels(change: Callable[[Kernel], Kernel], op: str = "") -> Make:
    """Makes a mutant with `change(kernel)` for each kernel of `op`, or of all ops."""

    def change_all(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
        return [change(kernel) if op in ("", kernel.op) else kernel for kernel in kernels]

    return lambda backend: changed(backend, change_kernels=change_all)


def with_kernel(op: str, wrap: Callable[[Any, Bound], Bound], **fields: Any) -> Make:
    """Makes a mutant whose kernels of `op` are `wrap(problem, bound kernel)`; `fields` replace fields of the Kernel.

    The wrapped function allocates its results, and is recorded as one call: a replay runs all of it.
    """

    def broken(kernel: Kernel) -> Kernel:
        def bind(problem: Any, session: Any) -> Bound:
            return BoundKernel(wrap(problem, plain(kernel.bind(problem, session))), session, out=False)

        return replace(kernel, bind=bind, **fields)

    return with_kernels(broken, op)


def portable(op: str) -> Make:
    """Makes a backend whose only kernels of `op` are the torch kit's: those that plan nothing on the host."""

    def kept(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
        return [kernel for kernel in kernels if kernel.op != op or kernel.name.startswith("torch_")]

    return lambda backend: changed(backend, change_kernels=kept)


def plain(bound: Any) -> Bound:
    """A bound kernel as a function that no session records."""
    run: Bound = bound.run if isinstance(bound, BoundKernel) else bound
    return run


def with_call(op: str, call: Callable[..., Any], **fields: Any) -> Make:
    """Makes a mutant whose kernels of `op` are `call(problem, run, *args, **kwargs)`; `run` is the right kernel."""
    return with_kernel(op, lambda problem, run: partial(call, problem, run), **fields)


def with_result(op: str, change: Callable[[Any, Any], Any]) -> Make:
    """Makes a mutant whose kernels of `op` return `change(problem, result)`."""
    return with_call(op, lambda problem, run, *args, **kwargs: change(problem, run(*args, **kwargs)))


def with_problem(op: str, change: Callable[[Any], dict[str, Any]]) -> Make:
    """Makes a mutant whose kernels of `op` solve the problem with `change(problem)` as other fields."""

    def broken(kernel: Kernel) -> Kernel:
        return replace(kernel, bind=lambda problem, session: kernel.bind(replace(problem, **change(problem)), session))

    return with_kernels(broken, op)


def with_added(kernel: Callable[[str], Kernel]) -> Make:
    """Makes a mutant with one more kernel, given the backend's name."""
    return lambda backend: changed(backend, change_kernels=lambda kernels: [*kernels, kernel(backend.name)])


def with_session(method: str, wrap: Callable[..., Any]) -> Make:
    """Makes a mutant whose sessions call `wrap(session, original, *args, **kwargs)` for one of their methods."""

    def broken(session: Any) -> Any:
        original = getattr(session, method)
        setattr(session, method, lambda *args, **kwargs: wrap(session, original, *args, **kwargs))
        return session

    return lambda backend: changed(backend, change_session=broken)


class Program:
    """A program whose calls go through `call(program, host, arrays, after)`."""

    def __init__(self, program: Any, call: Callable[..., Any]) -> None:
        self._program, self._call = program, call
        self.shape, self.report = program.shape, program.report

    def __call__(self, host: Any, arrays: Mapping[str, Any] | None = None, after: Iterable[Any] = ()) -> Any:
        return self._call(self._program, host, arrays or {}, after)


def with_program(make_call: Callable[[Any], Callable[..., Any]], which: Callable[[Any], bool] = lambda _: True) -> Make:
    """Makes a mutant whose programs are called through `make_call(session)`, which is made anew for each program; or
    only those of which `which` says so, by their InputLayout."""

    def capture(session: Any, original: Any, fn: Any, shape: Any, inputs: Any, *given: Any) -> Any:
        program = original(fn, shape, inputs, *given)
        return Program(program, make_call(session)) if which(inputs) else program

    return with_session("capture", capture)


def with_capabilities(**fields: Any) -> Make:
    """Makes a mutant that claims something else."""
    return lambda backend: changed(backend, capabilities=dataclasses.replace(backend.capabilities, **fields))


def all_of(*makes: Make) -> Make:
    """Makes a mutant that is broken in several ways at once."""

    def make(backend: Any) -> Any:
        for each in makes:
            backend = each(backend)
        return backend

    return make
