"""The NVIDIA driver and its GPUs, as the management library (NVML) tells: through ctypes, and without a CUDA context.

Signatures: NVML API Reference, "Initialization and Cleanup", "System Queries" and "Device Queries".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
TEXT = 96
"""Bytes of the longest text that NVML returns (NVML_DEVICE_NAME_V2_BUFFER_SIZE)."""


class NvmlError(Exception):
    """NVML is not there, or does not answer; the message says which."""


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


@dataclass(frozen=True)
class Gpu:
    """One GPU: `arch` is "sm90", `memory` in bytes."""

    name: str
    uuid: str
    arch: str
    memory: int

    @property
    def text(self) -> str:
        return f"{self.name} ({self.arch}, {self.memory / 2**30:.0f} GiB)"


@dataclass(frozen=True)
class Driver:
    """The driver's version, the newest CUDA that it runs, as (12, 8), all GPUs in the order of the PCI bus, and those
    slices of them ("MIG-...") that were asked for and are there."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]
    slices: tuple[Gpu, ...] = ()


def read_driver(library: str = LIBRARY, slices: Sequence[str] = ()) -> Driver:
    """Ask NVML; `slices` are UUIDs. Raises NvmlError."""
    with _session(library) as nvml:
        cuda = nvml.number("nvmlSystemGetCudaDriverVersion_v2", c_int())
        count = nvml.number("nvmlDeviceGetCount_v2", c_uint())
        version = nvml.text("nvmlSystemGetDriverVersion")
        found = [gpu for gpu in map(nvml.slice, slices) if gpu is not None]
        return Driver(version, (cuda // 1000, cuda % 1000 // 10), tuple(map(nvml.gpu, range(count))), tuple(found))


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
        loaded.nvmlShutdown()


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
            explain = self._library.nvmlErrorString
            explain.restype = c_char_p
            raise NvmlError(f"{name} failed: {explain(status).decode(errors='replace')}")

    def number(self, name: str, out: Any, *args: Any) -> int:
        self.call(name, *args, byref(out))
        return int(out.value)

    def text(self, name: str, *args: Any) -> str:
        buffer = ctypes.create_string_buffer(TEXT)
        self.call(name, *args, buffer, c_uint(TEXT))
        return buffer.value.decode(errors="replace")

    def gpu(self, index: int) -> Gpu:
        handle = c_void_p()
        self.call("nvmlDeviceGetHandleByIndex_v2", c_uint(index), byref(handle))
        return self._describe(handle, handle)

    def slice(self, uuid: str) -> Gpu | None:
        """One slice of a GPU, which has the GPU's name and kind and memory of its own; None where there is none."""
        handle, whole = c_void_p(), c_void_p()
        try:
            self.call("nvmlDeviceGetHandleByUUID", c_char_p(uuid.encode()), byref(handle))
        except NvmlError:
            return None
        self.call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, byref(whole))
        return self._describe(handle, whole)

    def _describe(self, own: c_void_p, whole: c_void_p) -> Gpu:
        memory, major, minor = _Memory(), c_int(), c_int()
        self.call("nvmlDeviceGetMemoryInfo", own, byref(memory))
        self.call("nvmlDeviceGetCudaComputeCapability", whole, byref(major), byref(minor))
        name, uuid = self.text("nvmlDeviceGetName", whole), self.text("nvmlDeviceGetUUID", own)
        return Gpu(name, uuid, f"sm{major.value}{minor.value}", int(memory.total))
