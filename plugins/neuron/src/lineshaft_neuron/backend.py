"""The Neuron backend: sessions of static programs on Neuron cores, or on the stand-in for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lineshaft_contract.backends import Capabilities, DeterminismClaims, World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.sessions import Memory
from lineshaft_neuron.collectives import SharedWorld
from lineshaft_neuron.compile_lane import CompileLane
from lineshaft_neuron.options import NeuronOptions
from lineshaft_neuron.session import NeuronSession
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


@dataclass(frozen=True)
class NeuronBackend:
    """Implements `lineshaft_contract.backends.Backend`."""

    options: NeuronOptions
    world: World
    shared: SharedWorld
    memory: Memory
    name: str = "neuron"

    @property
    def capabilities(self) -> Capabilities:
        options = self.options
        return replace(
            CAPABILITIES, token_buckets=options.prefill_buckets, row_buckets=options.decode_buckets,
            max_query=options.prefill_buckets[-1],
        )  # fmt: skip

    def kernels(self) -> Sequence[Kernel]:
        return portable_kernels(self.name)

    def session(self, rank: int) -> NeuronSession:
        return NeuronSession(CompileLane(torch.device("cpu"), "eager"), replace(self.world, rank=rank), self.shared)


def create(options: NeuronOptions, world: World) -> NeuronBackend:
    return NeuronBackend(options, world, SharedWorld("gloo", False), HostMemory())
