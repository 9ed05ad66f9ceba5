"""A stand-in for AWS Neuron on any machine: the device "neuron" and its compiler on CPU torch, strict about both.

It is a utility for tests: it holds a program to the contract of the device, and says nothing of speed. Evidence that
is gathered on it is *interpreted*.

    from lineshaft_neuron import stand_in

    device = stand_in.start()                                   # once or more often; for the rest of the process
    cache = torch.zeros(16, 8, device=device)
    program = torch.compile(fn, fullgraph=True, dynamic=False, backend="neuron")
    program(cache, x.to(device)).cpu()                          # written in place: the cache is, where it lies
    stand_in.compiler().seal()                                  # from now on a new shape raises Rejected
    stand_in.compiler().counts                                  # compiled, recompiled, graph_breaks

The device by itself allocates, fills, copies and makes views; any other operator that is called on it outside of a
compiled program raises ContractViolation. The compiler refuses, with Rejected: symbolic shapes; float64, complex
numbers, arithmetic in int64 or in unsigned integers of more than 8 bits; shapes, bounds and branches that depend on
values; sorts and searches; modules and regions; tensors that are not on the device; anything once it is sealed. Where
Dynamo itself gives up, as on a branch on a value, fullgraph=True raises torch._dynamo.exc.Unsupported.
"""

from __future__ import annotations

import torch
from torch._dynamo import register_backend

from lineshaft_contract.errors import BackendUnavailable
from lineshaft_neuron.stand_in import device
from lineshaft_neuron.stand_in.compiler import StandInCompiler
from lineshaft_neuron.stand_in.device import NAME, on_device, on_host
from lineshaft_neuron.stand_in.rules import Rejected

__all__ = ["Rejected", "StandInCompiler", "compiler", "on_device", "on_host", "start"]


def start() -> torch.device:
    """Register the device "neuron" and the backend of torch.compile of that name, unless this process has them already.

    Raises BackendUnavailable where the real ones, or another device of torch's kind PrivateUse1, are there.
    """
    if device.registered() is None:
        device.require_unclaimed()
        made = StandInCompiler()
        try:
            register_backend(made, name=NAME)
        except AssertionError:
            raise BackendUnavailable(
                f"torch.compile has a backend {NAME!r} already: the stand-in cannot take its place; set stand_in = "
                "false under [backend_options] to use it, or run the stand-in in a process of its own"
            ) from None
        device.register(made)
    return torch.device(NAME, 0)


def compiler() -> StandInCompiler:
    """The compiler that `start` has registered under the name "neuron"; there is one in a process.

    Raises BackendUnavailable before `start`.
    """
    module = device.registered()
    if module is None:
        raise BackendUnavailable("the stand-in has not been started in this process; call stand_in.start() first")
    assert isinstance(module.compiler, StandInCompiler)
    return module.compiler
