"""The Neuron backend: sessions of static programs on Neuron cores, or on the stand-in for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from lineshaft_contract.backends import Capabilities, DeterminismClaims, World
from lineshaft_contract.host import fair_share
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.sessions import Memory
from lineshaft_neuron import stand_in
from lineshaft_neuron.collectives import SharedWorld
from lineshaft_neuron.compile_lane import CompileLane
from lineshaft_neuron.kernels import neuron_kernels
from lineshaft_neuron.lanes import Lane
from lineshaft_neuron.memory import CoreMemory
from lineshaft_neuron.options import NeuronOptions
from lineshaft_neuron.session import NeuronSession
from lineshaft_neuron.starting import Runtime, start_runtime
from lineshaft_neuron.trace_lane import TraceLane
from lineshaft_torch.host_memory import HostMemory
from lineshaft_torch.kernels import portable_kernels

CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float32"),
    default_page_size=32,
    max_prefill_rows=1,
    mixed_steps=False,
    graphs=True,
    collectives=True,
    fixed_kv_size=True,
    determinism=DeterminismClaims(run=True),
)
STAND_IN = "lane compile: stand_in = true, which imitates the device on the CPU and has no other"


@dataclass(frozen=True)
class NeuronBackend:
    """Implements `lineshaft_contract.backends.Backend`.

    lane   makes the lane of a session
    notes  which lane it is and why, and what a reader of the plan should know besides
    """

    options: NeuronOptions
    world: World
    lane: Callable[[], Lane]
    shared: SharedWorld
    memory: Memory
    notes: tuple[str, ...]
    name: str = "neuron"

    @property
    def capabilities(self) -> Capabilities:
        options = self.options
        return replace(
            CAPABILITIES, token_buckets=options.prefill_buckets, row_buckets=options.decode_buckets,
            max_query=options.prefill_buckets[-1], notes=self.notes,
        )  # fmt: skip

    def kernels(self) -> Sequence[Kernel]:
        """This plugin's own, and the portable ones of other ops: those do not compile where it has its own."""
        own = neuron_kernels(self.name, self.options.attention_memory_mib)
        ops = {kernel.op for kernel in own}
        return [*own, *(kernel for kernel in portable_kernels(self.name) if kernel.op not in ops)]

    def session(self, rank: int) -> NeuronSession:
        return NeuronSession(self.lane(), replace(self.world, rank=rank), self.shared, self.memory)


def create(options: NeuronOptions, world: World) -> NeuronBackend:
    """The factory that the plugin registers. Raises BackendUnavailable without a device or the package for it,
    InvalidValue for options and variables that make no sense, LayoutError for more ranks than cores."""
    runtime = start_runtime(options, world)
    if runtime is None:
        torch.set_num_threads(world.threads or fair_share(world.size))  # the device is the CPU
        lane, shared = partial(CompileLane, stand_in.start()), SharedWorld("gloo", own_dtype=False)
        return NeuronBackend(options, world, lane, shared, HostMemory(), (STAND_IN,))
    return NeuronBackend(
        options, world, lane_of(runtime), SharedWorld("neuron", own_dtype=True), CoreMemory(runtime.device),
        (runtime.reason, f"cores: {runtime.cores}", f"compiled programs: {runtime.setup.cache.said}"),
    )  # fmt: skip


def lane_of(runtime: Runtime) -> Callable[[], Lane]:
    """Makes lanes of the kind that the runtime was started for."""
    if runtime.lane == "trace":
        return partial(TraceLane, runtime.package, runtime.device, runtime.setup.flags)
    return partial(CompileLane, runtime.device, runtime.setup.cache)
