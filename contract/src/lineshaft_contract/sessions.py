"""What a plugin supplies at run time: sessions that own weights, caches and programs, and the values they hand out.

Caches never cross this interface, which hides whether a backend updates them in place or donates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lineshaft_contract.errors import ContractViolation, SessionClosed, SessionFrozen, SessionPoisoned
from lineshaft_contract.kernels import HostPrepare, Pack
from lineshaft_contract.problems import KVProblem, StateProblem
from lineshaft_contract.steps import ArraySpec, HostStep, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Array, Checkpoint, Weight

HostArray = np.ndarray[Any, Any]
Tree = Any
"""Nested dicts and lists whose leaves are Params, Weights or arrays."""


@dataclass(frozen=True)
class Cache:
    """One cache: `arrays` is private to the kernels of one layout. Passed to `write_kv`, it is consumed."""

    key: int
    problem: KVProblem | StateProblem
    layout: str
    arrays: dict[str, Array] = field(default_factory=dict)


StepFunction = Callable[[Any, Tree, list[Cache], StepInputs, dict[str, Array]], tuple[dict[str, Array], list[Cache]]]
"""fn(ops, weights, caches, inputs, arrays) -> (outputs, caches); pure in its signature."""


@dataclass(frozen=True)
class Packing:
    """The packing the plan chose for a parameter: its layout's name, and how to make it (None: dense)."""

    layout: str = ""
    pack: Pack | None = None


@dataclass(frozen=True)
class Capture:
    """What `Session.capture` is given, for sessions to pass on."""

    fn: StepFunction
    shape: StepShape
    inputs: InputLayout
    ops: PlannedOps
    arrays: Mapping[str, ArraySpec] = field(default_factory=dict)
    host_outputs: frozenset[str] = frozenset()


DECLARED = "declared: "
"""What begins the name of a collective in a report where a library makes it that was not asked."""


@dataclass(frozen=True)
class CaptureReport:
    """What a capture cost and what a replay will cost, in bytes unless said otherwise; of one rank.

    `flops` and `moved`, the bytes read and written, are a compiler's estimate, `arguments`, `outputs`, `temporaries`,
    `aliased` and `code` its account of memory; 0 where there is none. `cached` tells that nothing had to be compiled.
    `collectives` are as compiled, or after DECLARED where a library that was not asked makes them.
    """

    seconds: float
    ops: int = 0
    arena: int = 0
    temporaries: int = 0
    aliased: int = 0
    packed: int = 0
    cache_copied: int = 0
    collectives: tuple[str, ...] = ()
    arguments: int = 0
    outputs: int = 0
    flops: int = 0
    moved: int = 0
    code: int = 0  # of the program itself, held as long as it is
    cached: bool = False
    details: Mapping[str, str | int] = field(default_factory=dict)  # what else the backend's compiler tells


class Transfer(Protocol):
    """Pages on their way; ordered only with programs and transfers on the same pages."""

    @property
    def error(self) -> BaseException | None: ...

    def done(self) -> bool: ...

    def wait(self) -> None: ...


@dataclass(frozen=True)
class DoneTransfer:
    """A transfer that was complete when it was returned."""

    error: BaseException | None = None

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class Handle(Protocol):
    """A program's output that stays on the device and may be given to another program of the session."""

    @property
    def spec(self) -> ArraySpec: ...


class Pending(Protocol):
    """A submitted step. Several may be outstanding; unread ones pile up no work.

    `kernel_seconds` is the time that the step's kernels took, as far as the backend measures it (else NaN).
    """

    @property
    def kernel_seconds(self) -> float: ...

    def result(self, name: str) -> HostArray: ...  # waits; a private host copy

    def handle(self, name: str) -> Handle: ...


class SharedPending(Pending, Protocol):
    """A step of a session that runs several ranks: `result` is the first rank's, where all have the same."""

    def results(self, name: str) -> list[HostArray]: ...  # waits; a private host copy from each rank, in their order


class Program(Protocol):
    """One captured bucket. When `__call__` returns, the program no longer reads the host buffer."""

    @property
    def shape(self) -> StepShape: ...

    @property
    def report(self) -> CaptureReport: ...

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Handle] = ..., after: Sequence[Transfer] = ...
    ) -> Pending: ...


class PlannedOps(Protocol):
    """What the planner gives a session at capture: the plan's kernels for one bucket, ready to be bound."""

    @property
    def digest(self) -> str:
        """sha256 of what the program computes: its calls in order, what flows where, their problems and kernels (by
        name, version and options). Not of sizes that the program does not fix, such as pages of a cache."""
        ...

    @property
    def outputs(self) -> Mapping[str, ArraySpec]:
        """What the program gives."""
        ...

    def bind(self, session: Session) -> Any:
        """A plain namespace: one callable per name that the forward calls, `ops.<name>(...)`."""
        ...

    def prepares(self, session: Session) -> list[HostPrepare]:
        """Host planning to run, in order, before each submission."""
        ...


class Session(Protocol):
    """One per worker and stage; owns weights, caches and static inputs.

    Between `freeze` and `thaw` nothing traces, compiles or retraces. After `close` every call raises SessionClosed.
    The session of a single-program backend runs `World.ranks` ranks: their inputs are the same, a Param that `varies`
    is loaded for each of them, and its programs return a SharedPending.
    """

    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        """Prepare and place every Param of the tree; `packings` is what the plan chose, by Param name.

        Params of equal `source_id`, packing, shape and dtype share memory, and the estimate counts them once.
        Returns the tree of Weights. Raises MissingTensor, MisshapenTensor, OutOfMemory.
        """
        ...

    def update(self, weights: Mapping[str, HostArray]) -> Pending:
        """Replace values of equal leaf shape, by Param name, between steps, without dropping programs.

        Every loaded Param of the named one's source takes the values, in its own packing; the last name of a source
        counts. A session of several ranks takes [ranks, ...] for a Param that varies. Raises MisshapenTensor for a name
        that is not loaded or another shape; then nothing has changed.
        """
        ...

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        """Allocate and commit one cache per problem; `pages` counts pages (with the null page) per group."""
        ...

    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] = ...,
        host_outputs: frozenset[str] = ...,
    ) -> Program:
        """Compile, record or wrap `fn` for one bucket; runs it on the all-zero step as often as it likes, and at
        least once before it returns. Raises SessionFrozen between `freeze` and `thaw`."""
        ...

    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        """Pages in canonical form: {"k": [n, page, Hkv, D], "v": [n, page, Hkv, Dv]}, with the heads of each of the
        session's ranks, one rank after another."""
        ...

    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> Transfer: ...

    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> Transfer:
        """Copy pages within every cache of a group; `src` and `dst` are int32[n], padded with 0."""
        ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def close(self) -> None:
        """Idempotent: waits or aborts, joins threads, frees memory."""
        ...


class SessionState:
    """Whether a session is closed, frozen or poisoned, for sessions to inherit; `close` sets `closed`."""

    closed = False
    _frozen = False
    _failure: BaseException | None = None

    def freeze(self) -> None:
        self.require_usable()
        self._frozen = True

    def thaw(self) -> None:
        self.require_usable()
        self._frozen = False

    def require_usable(self) -> None:
        """Raises SessionClosed or SessionPoisoned."""
        if self.closed:
            raise SessionClosed("the session is closed; start a new one")
        if self._failure is not None:
            raise SessionPoisoned(f"a program failed over its caches ({self._failure!r}); rebuild the session")

    def require_changeable(self, call: str) -> None:
        """Raises SessionClosed, SessionPoisoned, and SessionFrozen for a call that would trace or compile."""
        self.require_usable()
        if self._frozen:
            raise SessionFrozen(f"{call} on a frozen session; call thaw first")

    @contextmanager
    def poison_on_failure(self) -> Iterator[None]:
        """Whatever escapes makes every later call raise SessionPoisoned."""
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise


def check_handles(wanted: Mapping[str, ArraySpec], given: Mapping[str, Handle]) -> None:
    """Raises ContractViolation unless a program is given exactly the handles that it was captured with."""
    if given.keys() != wanted.keys():
        raise ContractViolation(f"the program takes the arrays {sorted(wanted)}, it was given {sorted(given)}")
    for name, handle in given.items():
        if handle.spec != wanted[name]:
            raise ContractViolation(f"array {name!r} was captured as {wanted[name]}, given is {handle.spec}")


class Memory(Protocol):
    """What a backend knows of its memory, in bytes: of one rank's share, where a session runs several."""

    def total_free(self) -> tuple[int, int] | None: ...

    def page_bytes(self, problem: KVProblem) -> int: ...

    def synchronize(self) -> None: ...


class UncountedMemory:
    """A Memory that nobody counts: the KV pool is sized by what the scheduler can use."""

    def total_free(self) -> tuple[int, int] | None:
        return None

    def page_bytes(self, problem: KVProblem) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        """Everything is done when a call returns."""


def map_tree(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply `fn` to every leaf of nested dicts and lists, in their defined order."""
    if isinstance(tree, dict):
        return {key: map_tree(fn, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_tree(fn, value) for value in tree]
    return fn(tree)


def leaves(tree: Tree) -> list[Any]:
    """All leaves of nested dicts and lists, in their defined order."""
    out: list[Any] = []
    map_tree(out.append, tree)
    return out


__all__ = [
    "Array", "Cache", "Capture", "CaptureReport", "DoneTransfer", "Handle", "HostArray", "Memory", "Packing", "Pending",
    "PlannedOps", "Program", "Session", "SessionState", "SharedPending", "StepFunction", "Transfer", "Tree",
    "UncountedMemory", "Weight", "check_handles", "leaves", "map_tree",
]  # fmt: skip
