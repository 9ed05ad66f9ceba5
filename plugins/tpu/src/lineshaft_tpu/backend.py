"""The TPU backend: sessions of the JAX kit on TPUs, on virtual CPU devices, or on a topology that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lineshaft_contract.backends import Capabilities, DeterminismClaims, World
from lineshaft_contract.kernels import Kernel
from lineshaft_jax.devices import cpu_devices
from lineshaft_jax.kernels import xla_kernels
from lineshaft_jax.memory import RankMemory, device_memory
from lineshaft_jax.program import InFlight
from lineshaft_jax.session import JaxSession, SessionOptions
from lineshaft_jax.store import ProgramStore, find_store
from lineshaft_tpu.chips import CHIPS, Chip, chip_of_kind
from lineshaft_tpu.devices import tpu_devices
from lineshaft_tpu.options import TpuOptions
from lineshaft_tpu.pallas.interpreting import Mode
from lineshaft_tpu.pallas.recipes import pallas_kernels
from lineshaft_tpu.tiling import LANES

PACKAGES = ("lineshaft", "lineshaft_contract", "lineshaft_jax", "lineshaft_tpu")
"""Whose source a compiled program depends on."""

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that a compiled program depends on."""

CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float32"),
    default_page_size=32,
    token_buckets=(16, 64, 256, 512, 1024, 2048, 4096, 8192),
    row_buckets=(8, 16, 32, 64, 128, 256, 512),
    asynchronous=True,
    graphs=True,
    collectives=True,
    determinism=DeterminismClaims(run=True),
)


@dataclass(frozen=True)
class TpuBackend:
    """Implements `lineshaft_contract.backends.Backend`. `chip` is None where kernels for a TPU have no place."""

    options: TpuOptions
    world: World
    devices: list[Any]
    chip: Chip | None
    memory: RankMemory
    store: ProgramStore | None
    name: str = "tpu"
    capabilities: Capabilities = CAPABILITIES
    flight: InFlight = field(default_factory=InFlight)

    @property
    def lanes(self) -> int:
        return 1 if self.chip is None else LANES

    @property
    def mode(self) -> Mode:
        """How Pallas kernels run: compiled where there is a TPU, or one is compiled for."""
        if not self.options.interpret:
            return ""
        return "races" if self.options.detect_races else "interpret"

    def kernels(self) -> Sequence[Kernel]:
        kernels = xla_kernels(self.name, self.options.attention_memory_mib)
        return kernels if self.chip is None else [*kernels, *pallas_kernels(self.name, self.chip, self.mode)]

    def session(self, rank: int) -> JaxSession:
        return JaxSession(self.world, self.devices, SessionOptions(self.lanes, self.store, self.flight))


def create(options: TpuOptions, world: World) -> TpuBackend:
    """The factory that the plugin registers. Raises BackendUnavailable without a TPU, LayoutError for too few devices,
    InvalidValue for a folder of compiled programs that cannot be used."""
    flight = InFlight()
    if options.platform == "cpu":
        devices = cpu_devices(world.size)
        chip = CHIPS[options.chip] if options.interpret else None
        memory = RankMemory(lambda: None, LANES if chip else 1, flight)
    else:
        devices = tpu_devices(world.size)
        chip = chip_of_kind(devices[0].device_kind)
        own = devices[world.rank : world.rank + world.ranks]
        memory = RankMemory(partial(device_memory, own), LANES, flight)
    cache_dir = "off" if options.detect_races else options.cache_dir  # such programs call Python: no file holds them
    store = find_store(cache_dir, devices, PACKAGES, FLAGS)
    return TpuBackend(options, world, devices, chip, memory, store, flight=flight)
