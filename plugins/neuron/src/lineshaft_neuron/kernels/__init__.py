"""Kernels for programs of one static shape: no float64, no arithmetic in int64, no sort, nothing that depends on data.

They stand in for the portable ones of the torch kit that break these rules; the others serve the device as they are.
"""

from __future__ import annotations

from lineshaft_contract.kernels import Kernel
from lineshaft_neuron.kernels import attend, experts, logits
from lineshaft_neuron.kernels.bound import NEURON
from lineshaft_torch.kernels.attend import MEMORY_MIB


def neuron_kernels(backend: str, attention_memory_mib: int = MEMORY_MIB) -> list[Kernel]:
    """The kernels of priority NEURON, registered for `backend`; `attention_memory_mib` bounds the temporaries of an
    attend, which works in blocks to stay within it and declines what does not."""
    recipes = [*attend.recipes(attention_memory_mib), *experts.recipes(), *logits.recipes()]
    return [recipe(backend) for recipe in recipes]


__all__ = ["NEURON", "neuron_kernels"]
