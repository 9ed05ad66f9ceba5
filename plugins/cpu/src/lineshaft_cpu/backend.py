"""The CPU backend: sessions of its own engine, or of the torch kit with kernels made for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakSet

from lineshaft_contract.backends import Backend, Capabilities, DeterminismClaims, World
from lineshaft_contract.errors import Unsupported
from lineshaft_contract.host import fair_share
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.sessions import Session
from lineshaft_cpu import native
from lineshaft_cpu.options import CpuOptions
from lineshaft_torch.host_memory import HostMemory

if TYPE_CHECKING:
    from lineshaft_cpu.engine.session import NativeSession

CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float32", "float64"),
    collectives=True,
    determinism=DeterminismClaims(run=True),
)

PAGE_SIZE = 32
"""Of the native engine: keys of a page make a panel."""
NATIVE = replace(CAPABILITIES, default_page_size=PAGE_SIZE, collectives=False, asynchronous=True)


class NativeMemory(HostMemory):
    """The host's memory, beside sessions whose steps run while their caller goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: WeakSet[NativeSession] = WeakSet()

    def synchronize(self) -> None:
        """Wait for the step of every session."""
        for session in list(self.sessions):
            session.finish()


@dataclass(frozen=True)
class NativeBackend:
    """Implements `lineshaft_contract.backends.Backend` by the native engine, for a worker that is alone."""

    options: CpuOptions
    world: World
    library: native.Native
    name: str = "cpu"
    capabilities: Capabilities = NATIVE
    memory: NativeMemory = field(default_factory=NativeMemory)

    def kernels(self) -> Sequence[Kernel]:
        from lineshaft_cpu.engine.kernels import engine_kernels

        return engine_kernels(self.name, self.library)

    def session(self, rank: int) -> Session:
        from lineshaft_cpu.engine.session import NativeSession
        from lineshaft_cpu.engine.team import team_size

        session = NativeSession(self.library, team_size(self.world.threads))
        self.memory.sessions.add(session)
        return session


@dataclass(frozen=True)
class TorchBackend:
    """Implements `lineshaft_contract.backends.Backend` by the torch kit."""

    options: CpuOptions
    world: World
    name: str = "cpu"
    capabilities: Capabilities = CAPABILITIES
    memory: HostMemory = field(default_factory=HostMemory)

    def kernels(self) -> Sequence[Kernel]:
        from lineshaft_cpu.kernels import cpu_kernels
        from lineshaft_torch.kernels import portable_kernels

        return [
            *portable_kernels(self.name, self.options.attention_memory_mib),
            *cpu_kernels(self.name, self.options.native),
        ]

    def session(self, rank: int) -> Session:
        """A session for `rank`; sets the threads of this process's torch."""
        import torch

        from lineshaft_torch.session import SessionOptions, TorchSession

        torch.set_num_threads(self.world.threads or fair_share(self.world.size))
        options = SessionOptions(program=self.options.program, functional=self.options.functional)
        return TorchSession("cpu", replace(self.world, rank=rank), options)


def create(options: CpuOptions, world: World) -> Backend:
    """The factory that the plugin registers. Raises Unsupported for a level of native kernels that cannot run here, and
    for the native engine where it cannot: what was named is never replaced by another."""
    if options.engine == "native" or options.native not in ("auto", "off"):
        native.load(options.native)
    declined = reason(options, world)
    if declined and options.engine == "native":
        raise Unsupported(f'backend_options engine = "native": {declined}; use engine = "torch" or "auto"')
    if declined or options.engine == "torch":
        notes = (f"engine torch: {declined}",) if declined else ()
        return TorchBackend(options, world, capabilities=replace(CAPABILITIES, notes=notes))
    library = native.load(options.native)
    return NativeBackend(
        options, world, library, capabilities=replace(NATIVE, notes=(note(library.level, native.idle()),))
    )


def note(level: str, idle: Sequence[str]) -> str:
    """What a plan says of the level that runs, and of those that only another processor would."""
    rest = f"; compiled, not executed here: {', '.join(idle)}" if idle else ""
    return f"engine native, level {level}{rest}"


def reason(options: CpuOptions, world: World) -> str | None:
    """Why the native engine does not run under these options, or None."""
    if world.size > 1:
        return f"the native engine runs one worker, not {world.size} that share work"
    for name in ("program", "functional", "attention_memory_mib"):
        if getattr(options, name) != CpuOptions.model_fields[name].default:
            return f"{name} = {getattr(options, name)!r} is of the torch engine"
    return native.reason(options.native)
