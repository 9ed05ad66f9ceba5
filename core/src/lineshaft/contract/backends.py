"""What a plugin registers: a backend's name, probe, options, factory and, to compile ahead of time, its toolchain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from lineshaft.contract.kernels import Kernel
from lineshaft.contract.problems import Problem
from lineshaft.contract.sessions import CaptureReport, Memory, Session, StepFunction
from lineshaft.contract.steps import StepShape

API_VERSION = 1
"""The version of this contract. A plugin of this or the next version is accepted; another is rejected."""


class BackendKind(IntEnum):
    """What `backend = "auto"` prefers: the largest usable kind; two usable backends of that kind are a tie."""

    REFERENCE = 0  # for checking, never chosen by "auto"
    HOST = 1
    ACCELERATOR = 2


@dataclass(frozen=True)
class Probe:
    """What a probe found: whether the backend can run on this machine and, either way, why."""

    usable: bool
    reason: str
    devices: tuple[str, ...] = ()


class ProbeFunction(Protocol):
    """Look at files, device nodes and `find_spec` only: imports no vendor library and takes under 50 ms."""

    def __call__(self) -> Probe: ...


@dataclass(frozen=True)
class BackendInfo:
    """One backend as a plugin registers it. `options` (a pydantic model), `factory` and `toolchain` are lazy
    "module:attribute" references, so that registering imports nothing."""

    name: str
    probe: str  # "module:attribute" of a ProbeFunction
    factory: str  # "module:attribute" of a BackendFactory
    options: str = ""
    toolchain: str = ""
    kind: BackendKind = BackendKind.ACCELERATOR
    api: int = API_VERSION
    summary: str = ""


@dataclass(frozen=True)
class DeterminismClaims:
    """What stays bit-identical: the same run, another batch, another chunking, another tp degree, another device."""

    run: bool = False
    batch: bool = False
    chunk: bool = False
    tp: bool = False
    device: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; every default means "no restriction, no feature". The scheduler plans within them."""

    dtypes: tuple[str, ...] = ("float32",)  # executed dtypes, preferred first
    kv_dtypes: tuple[str, ...] = ()  # () = the executed dtype
    page_sizes: tuple[int, ...] = ()  # () = any
    default_page_size: int = 16
    token_buckets: tuple[int, ...] | None = None  # None = the core's own table
    row_buckets: tuple[int, ...] | None = None
    max_prefill_rows: int | None = None
    mixed_steps: bool = True
    max_query: int | None = None
    asynchronous: bool = False
    graphs: bool = False
    collectives: bool = False
    determinism: DeterminismClaims = DeterminismClaims()
    fixed_kv_size: bool = False
    weights_fixed: bool = False


class Backend(Protocol):
    """A started backend, made by its factory from validated options and a layout."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def memory(self) -> Memory: ...

    def kernels(self) -> Sequence[Kernel]:
        """The backend's own kernels; those that other plugins contribute come through `lineshaft_kernels`."""
        ...

    def session(self, rank: int) -> Session: ...


class BackendFactory(Protocol):
    """Make a backend. `options` is an instance of the plugin's options model; `world` describes the mesh."""

    def __call__(self, options: Any, world: World) -> Backend: ...


@dataclass(frozen=True)
class World:
    """This worker's place among all workers: mesh axis sizes in the order dp, pp, cp, ep, tp, and how to meet.

    `rendezvous` is a file path that all ranks share until they have captured their programs (empty at world size 1);
    `threads` is the CPU share of this worker (0 = the backend's choice).
    """

    rank: int = 0
    axes: tuple[tuple[str, int], ...] = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 1))
    rendezvous: str = ""
    threads: int = 0

    @property
    def size(self) -> int:
        total = 1
        for _, degree in self.axes:
            total *= degree
        return total

    def degree(self, axis: str) -> int:
        return dict(self.axes)[axis]


class Toolchain(Protocol):
    """Ahead-of-time compilation with abstract weights and caches, on a machine without the device."""

    def targets(self) -> Sequence[str]: ...

    def compile_kernel(self, kernel: Kernel, problem: Problem, target: str) -> Mapping[str, Any]: ...

    def compile_step(self, fn: StepFunction, shape: StepShape, target: str, world: World) -> CaptureReport: ...
