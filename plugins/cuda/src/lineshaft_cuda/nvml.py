"""The NVIDIA driver and its GPUs, as the management library (NVML) tells: through ctypes, and without a CUDA context.

Signatures: NVML API Reference, "Initialization and Cleanup", "System Queries" and "Device Queries".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from lineshaft_triton.probing import described

LIBRARY = "libnvidia-ml.so.1"
TEXT = 96
"""Bytes of the longest text that NVML returns (NVML_DEVICE_NAME_V2_BUFFER_SIZE)."""
NO_FUNCTION = 0
NOT_THERE = (2, 6)
"""What NVML returns for the UUID of no device (INVALID_ARGUMENT, NOT_FOUND)."""
WITHOUT_CUDA = (NO_FUNCTION, 12, 13)
"""What it returns for the version of a CUDA library that is not there, or older than its question
(LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND)."""


class NvmlError(Exception):
    """NVML is not there, or does not answer; the message says which, and `status` is what the function returned, or
    NO_FUNCTION."""

    def __init__(self, message: str, status: int = NO_FUNCTION) -> None:
        super().__init__(message)
        self.status = status


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


@dataclass(frozen=True)
class Gpu:
    """One GPU: `arch` is "sm90", `memory` in bytes, 0 where it is unknown. `fault` is what NVML says in place of the
    kind of one that it cannot ask."""

    name: str
    uuid: str
    arch: str = ""
    memory: int = 0
    fault: str = ""

    @property
    def text(self) -> str:
        return f"{self.name} ({self.fault})" if self.fault else described(self.name, self.arch, self.memory)


@dataclass(frozen=True)
class Driver:
    """The driver's version, the newest CUDA that it runs, as (12, 8), or () where NVML does not tell, all GPUs in the
    order of the PCI bus, and those slices of them ("MIG-...") that were asked for and are there. `fault` is what NVML
    says where there is no library of CUDA."""

    version: str
    cuda: tuple[int, ...]
    gpus: tuple[Gpu, ...]
    slices: tuple[Gpu, ...] = ()
    fault: str = ""


def read_driver(library: str = LIBRARY, slices: Sequence[str] = ()) -> Driver:
    """Ask NVML; `slices` are UUIDs. Raises NvmlError where it cannot even list GPUs."""
    with _session(library) as nvml:
        count = nvml.number("nvmlDeviceGetCount_v2", c_uint())
        version = nvml.text("nvmlSystemGetDriverVersion", otherwise="unknown")
        found = [gpu for gpu in map(nvml.slice, slices) if gpu is not None]
        cuda, fault = nvml.cuda()
        return Driver(version, cuda, tuple(map(nvml.gpu, range(count))), tuple(found), fault)


@contextmanager
def _session(library: str) -> Iterator[_Nvml]:
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise NvmlError(f"cannot be loaded ({error})") from error
    nvml = _Nvml(loaded)
    nvml.call("nvmlInit_v2")
    try:
        yield nvml
    finally:
        with suppress(NvmlError):
            nvml.call("nvmlShutdown")


class _Nvml:
    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the library. Raises NvmlError with its own words if it fails."""
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise NvmlError(f"NVML has no {name}: the driver is too old") from error
        status = function(*args)
        if status:
            raise NvmlError(f"{name} failed: {self._words(status)}", status)

    def _words(self, status: int) -> str:
        explain = getattr(self._library, "nvmlErrorString", None)
        if explain is not None:
            explain.restype = c_char_p
        words = explain(status) if explain is not None else None
        return words.decode(errors="replace") if words else f"status {status}"

    def number(self, name: str, out: Any, *args: Any) -> int:
        self.call(name, *args, byref(out))
        return int(out.value)

    def text(self, name: str, *args: Any, otherwise: str) -> str:
        """What the function tells; `otherwise` where it tells nothing."""
        buffer = ctypes.create_string_buffer(TEXT)
        try:
            self.call(name, *args, buffer, c_uint(TEXT))
        except NvmlError:
            return otherwise
        return buffer.value.decode(errors="replace") or otherwise

    def cuda(self) -> tuple[tuple[int, ...], str]:
        """`cuda` and `fault` of the Driver."""
        try:
            version = self.number("nvmlSystemGetCudaDriverVersion_v2", c_int())
        except NvmlError as error:
            return (), str(error) if error.status in WITHOUT_CUDA else ""
        return (version // 1000, version % 1000 // 10) if version >= 1000 else (), ""

    def gpu(self, index: int) -> Gpu:
        handle, called = c_void_p(), f"GPU {index}"
        try:
            self.call("nvmlDeviceGetHandleByIndex_v2", c_uint(index), byref(handle))
        except NvmlError as error:
            return Gpu(called, "", fault=str(error))
        return self._describe(handle, handle, called, "")

    def slice(self, uuid: str) -> Gpu | None:
        """One slice of a GPU, which has the GPU's name and kind and memory of its own; None where there is none."""
        handle, whole, written = c_void_p(), c_void_p(), uuid.encode(errors="replace")
        try:
            self.call("nvmlDeviceGetHandleByUUID", c_char_p(written), byref(handle))
            self.call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, byref(whole))
        except NvmlError as error:
            return None if error.status in NOT_THERE else Gpu(written.decode(), uuid, fault=str(error))
        return self._describe(handle, whole, written.decode(), uuid)

    def _describe(self, own: c_void_p, whole: c_void_p, called: str, uuid: str) -> Gpu:
        """`called` and `uuid`: what stands for a name and a UUID that NVML does not tell."""
        major, minor = c_int(), c_int()
        name = self.text("nvmlDeviceGetName", whole, otherwise=called)
        uuid = self.text("nvmlDeviceGetUUID", own, otherwise=uuid)
        try:
            self.call("nvmlDeviceGetCudaComputeCapability", whole, byref(major), byref(minor))
        except NvmlError as error:
            return Gpu(name, uuid, fault=str(error))
        return Gpu(name, uuid, f"sm{major.value}{minor.value}", self._memory(own))

    def _memory(self, own: c_void_p) -> int:
        """Bytes; 0 where NVML tells none, as of a GPU that has the host's memory for its own."""
        memory = _Memory()
        try:
            self.call("nvmlDeviceGetMemoryInfo", own, byref(memory))
        except NvmlError:
            return 0
        return int(memory.total)
