"""The device "neuron" of the stand-in: PyTorch's PrivateUse1 over memory of the host, strict about what runs on it.

A tensor on it is an ordinary `torch.Tensor` whose storage lies in host memory; `on_device` and `on_host` turn one into
the other without a copy. Owns the device's registration with torch and its few kernels; knows no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._C import _to_dlpack
from torch.utils import dlpack
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lineshaft_contract.errors import BackendUnavailable, ContractViolation

NAME = "neuron"
UNCLAIMED = "privateuseone"
"""What torch calls PrivateUse1 while nothing has claimed it."""

_HOST, _EXTENSION = 1, 12  # kDLCPU, kDLExtDev: the device types of DLPack; torch reads the second as PrivateUse1
_ON_HOST = "_lineshaft_on_host"
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


# ---- one memory, two devices ---------------------------------------------------------------------------------------


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor on the device; `tensor` lies on the host."""
    return _relabelled(tensor, _EXTENSION)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor on the host; a tensor that lies there already is returned itself.

    Asked again for the very same tensor, it gives the same result: caches and weights are turned once.
    """
    if tensor.device.type != NAME:
        return tensor
    found: torch.Tensor | None = getattr(tensor, _ON_HOST, None)
    if found is None:
        # No inference tensor, whichever mode it is made in: it may be written in both.
        with torch.inference_mode(False):
            found = _relabelled(tensor, _HOST)
        setattr(tensor, _ON_HOST, found)
    return found


def _relabelled(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    """The same memory under another device: a DLPack capsule whose one word that says the device is written anew.

    The detached tensor that the capsule holds keeps the memory alive, and is no part of a cycle.
    """
    capsule = _to_dlpack(tensor.detach())
    fields = _capsule_pointer(capsule, b"dltensor")  # a DLTensor: the data pointer, then int32 device type and number
    ctypes.c_int32.from_address(fields + ctypes.sizeof(ctypes.c_void_p)).value = device_type
    return dlpack.from_dlpack(capsule)


# ---- what the device runs by itself --------------------------------------------------------------------------------


def _empty(
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    _require_first(device)
    return on_device(torch.empty(tuple(size), dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> torch.Tensor:
    _require_first(device)
    return on_device(torch.empty_strided(tuple(size), tuple(stride), dtype=dtype))


def _require_first(device: torch.device | None) -> None:
    if device is not None and device.index:
        raise ContractViolation(f"there is one device {NAME!r}, number 0; {device} was asked for")


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if target.device == source.device and target.dtype != source.dtype:
        raise _refusal(f"a conversion from {source.dtype} to {target.dtype}")
    on_host(target).copy_(on_host(source))
    return target


def _fill(target: torch.Tensor, value: Any) -> torch.Tensor:
    on_host(target).fill_(on_host(value) if isinstance(value, torch.Tensor) else value)
    return target


def _zero(target: torch.Tensor) -> torch.Tensor:
    on_host(target).zero_()
    return target


def _view(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A view touches no values: what torch does for tensors of the host holds for any memory."""
    found: torch.Tensor = op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    return found


def _refuse(op: Any, *args: Any, **kwargs: Any) -> Any:
    raise _refusal(f"the operator {op._schema.name.replace('::', '.')}")


def _refusal(what: str) -> ContractViolation:
    return ContractViolation(
        f"{what} was called on the device {NAME!r}, which by itself only allocates, fills, copies and makes views: "
        f'computation belongs in a compiled program, torch.compile(..., backend="{NAME}"); to look at values, copy '
        "the tensor to the host first, .cpu()"
    )


def _kernels() -> dict[str, Callable[..., torch.Tensor]]:
    """By operator of the namespace aten; all others are refused, or made of these by torch."""
    aten = torch.ops.aten
    return {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "copy_": _copy,
        "fill_.Scalar": _fill,
        "fill_.Tensor": _fill,
        "zero_": _zero,
        "view": partial(_view, aten.view.default),
        "as_strided": partial(_view, aten.as_strided.default),
        "_reshape_alias": partial(_view, aten._reshape_alias.default),
    }


# ---- its place in torch --------------------------------------------------------------------------------------------


class NeuronModule:
    """What torch finds as `torch.neuron`: the module of a device of which there is one, always there.

    compiler  what is registered as the Dynamo backend of the device's name
    """

    def __init__(self, compiler: Any) -> None:
        self.compiler = compiler
        self._registered: list[torch.library.Library] = []  # what torch forgets, once these are gone

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs asynchronously."""

    def manual_seed_all(self, seed: int) -> None:
        """The device draws no random numbers by itself."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def register_kernels(self) -> None:
        """Give torch the kernels of the device, and the refusal of everything else."""
        operators, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
        self._registered = [operators, others]
        for name, kernel in _kernels().items():
            operators.impl(name, kernel, "PrivateUse1")
        others.fallback(_refuse, "PrivateUse1")


def registered() -> NeuronModule | None:
    """The stand-in's module of this process, once `register` has been called."""
    found = getattr(torch, NAME, None)
    return found if isinstance(found, NeuronModule) else None


def require_unclaimed() -> None:
    """Raises BackendUnavailable if something else has claimed PrivateUse1, or the name of the device."""
    claimed = torch._C._get_privateuse1_backend_name()
    if claimed == NAME or hasattr(torch, NAME):
        raise BackendUnavailable(
            f"the device {NAME!r} is in this process already, from torch-neuronx: the stand-in cannot take its place; "
            "set stand_in = false under [backend_options] to use the device, or TORCH_DEVICE_BACKEND_AUTOLOAD=0 in "
            "the environment so that torch does not load it"
        )
    if claimed != UNCLAIMED:
        raise BackendUnavailable(
            f"another device, {claimed!r}, has taken torch's place for one outside device (PrivateUse1); the stand-in "
            "needs it: set TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment so that torch does not load that "
            "device, or run the stand-in in a process of its own"
        )


def register(compiler: Any) -> None:
    """Make the device known to torch, for the rest of the process. Call `require_unclaimed` before."""
    module = NeuronModule(compiler)
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    module.register_kernels()
