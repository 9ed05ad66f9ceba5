"""What a plugin registers: a backend's name, probe, options, factory and, to compile ahead of time, its toolchain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import Problem
from lineshaft_contract.sessions import Memory, Session

API_VERSION = 1
"""The version of this contract. A plugin of this or the next version is accepted; another is rejected."""


OFF = frozenset({"", "0", "f", "false", "n", "no", "none", "off"})
"""What a switch may be set to and still be off, in lower case."""


def switched_on(value: object) -> bool:
    """Whether a switch is on: anything but a word of OFF, False and None among them."""
    return bool(value) and str(value).strip().lower() not in OFF


class BackendKind(IntEnum):
    """What `backend = "auto"` prefers: the largest usable kind; two usable backends of that kind are a tie."""

    REFERENCE = 0  # for checking, never chosen by "auto"
    HOST = 1
    ACCELERATOR = 2


@dataclass(frozen=True)
class Probe:
    """What a probe found: whether the backend can run on this machine and, either way, why.

    `unless` names options, with a value each, under which it runs here all the same, in place of a device that is not
    there. A user has to write one of them; "auto" never does. Where the value is "true", all but a word of `OFF` counts
    as such: the backend's options say what else they refuse.
    """

    usable: bool
    reason: str
    devices: tuple[str, ...] = ()
    unless: Mapping[str, str] = field(default_factory=dict)

    def runs_with(self, options: Mapping[str, Any]) -> bool:
        """Whether the backend runs on this machine under the options that a user wrote."""
        return self.usable or any(
            switched_on(options.get(name)) if value == "true" else str(options.get(name)).strip().lower() == value
            for name, value in self.unless.items()
        )


class ProbeFunction(Protocol):
    """Look at files, device nodes and `find_spec` only: imports no vendor library and takes under 50 ms."""

    def __call__(self) -> Probe: ...


@dataclass(frozen=True)
class BackendInfo:
    """One backend as a plugin registers it. `options` (a pydantic model), `factory` and `toolchain` are lazy
    "module:attribute" references, so that registering imports nothing. `devices` is the "package:folder" of TOML files
    that describe the backend's devices, for simulation.

    The sessions of a `single_program` backend run all ranks of a dp replica at once (see `World.ranks`); those of any
    other run one rank each.
    """

    name: str
    probe: str  # "module:attribute" of a ProbeFunction
    factory: str  # "module:attribute" of a BackendFactory
    options: str = ""
    toolchain: str = ""  # of a ToolchainFactory
    devices: str = ""
    single_program: bool = False
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
    notes: tuple[str, ...] = ()  # what a reader of the plan should know of how the backend runs, a line each


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

    def session(self, rank: int) -> Session:
        """A session of its own for a worker. It meets other ranks in its collectives alone: on one rank a session
        without any can be made, used and closed while the others wait."""
        ...


class BackendFactory(Protocol):
    """Make a backend. `options` is an instance of the plugin's options model; `world` describes the mesh."""

    def __call__(self, options: Any, world: World) -> Backend: ...


@dataclass(frozen=True)
class World:
    """This worker's place among all ranks: mesh axis sizes in the order dp, pp, cp, ep, tp, and how to meet.

    The worker runs `ranks` ranks, from `rank` on: one, or all of a replica where the backend is a single program.
    `rendezvous` is a file path that all workers share until they have captured their programs (empty for one worker);
    `threads` is the CPU share of this worker (0 = the backend's choice).
    """

    rank: int = 0
    axes: tuple[tuple[str, int], ...] = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 1))
    rendezvous: str = ""
    threads: int = 0
    ranks: int = 1

    @property
    def size(self) -> int:
        total = 1
        for _, degree in self.axes:
            total *= degree
        return total

    def degree(self, axis: str) -> int:
        return dict(self.axes)[axis]


class Toolchain(Protocol):
    """Compiles ahead of time, for devices that are not here. What it has compiled is *compiled-only*, never more."""

    def targets(self) -> Sequence[str]:
        """The kinds of device that kernels can be compiled for."""
        ...

    def columns(self) -> Sequence[str]:
        """The keys of `CaptureReport.details`, in the order in which to show them.

        Some mean the same on every backend. `expected` and `found` are classes of matrix instructions, joined by "+" or
        "none": those stated before compiling, and those in the code, which have to be among them. `spills` (registers)
        and `stack_bytes` are 0 unless `default` is "no": the program has a configuration that no plan takes unasked.
        """
        ...

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        """Problems of real models that the kernel must compile for, besides those of its op's cases."""
        ...

    def start(self, target: str, world: World) -> Backend:
        """The backend on a target: a kind of device, or several of them in a topology, as the backend spells it.

        Its sessions keep shapes in the place of values: `load` reads no tensor, `alloc_caches` allocates nothing,
        `capture` compiles, and a program that is called raises Unsupported. Raises InvalidValue for an unknown target,
        LayoutError for a layout that the target cannot hold.
        """
        ...


@dataclass(frozen=True)
class Offered:
    """A kernel that a backend can register. `note` says what it needs beside the device, or what of that is not there;
    "" where nothing has to be said."""

    kernel: Kernel
    note: str = ""


@runtime_checkable
class Catalogue(Protocol):
    """What a toolchain has besides whose backends ahead of time register fewer kernels than those on a device do."""

    def catalogue(self, target: str) -> Sequence[Offered]:
        """Every kernel that the backend can register on a target ("": the one that the options name), in the order of
        the ops or of their modules. Raises InvalidValue for an unknown target."""
        ...


class ToolchainFactory(Protocol):
    """Make a toolchain from validated options."""

    def __call__(self, options: Any) -> Toolchain: ...
