"""Descriptions of devices: TOML files of a user, or of the plugins, which say where theirs lie; core holds none."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lineshaft.registry import Registry
from lineshaft_bench.errors import DeviceError

Rate = Annotated[float, Field(gt=0, le=1e21)]
SHARE = Field(default=1.0, gt=0, le=1)
TIME = Field(default=0.0, ge=0, le=60)


class Device(BaseModel):
    """What a step's time depends on. Rates are peaks; the efficiencies say which share of them is reached."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    summary: str = ""
    memory_bytes: Rate
    """Memory of one device, for weights and KV pages."""
    memory_bytes_per_s: Rate
    memory_efficiency: float = SHARE
    flops_per_s: Mapping[str, Rate]
    """By dtype."""
    flops_efficiency: float = SHARE
    launch_s: float = TIME
    """Of a step, before the device is at work."""
    host_s: float = TIME
    """Of a step, on the host: schedule, pack, sample, commit."""
    host_row_s: float = TIME
    """Of each sequence of a step, on the host."""
    overlap: bool = False
    """Whether the host works while the device does."""
    link_bytes_per_s: Rate = 1e12
    """Between the devices of a tensor-parallel group, each way."""
    link_latency_s: float = TIME
    host_link_bytes_per_s: Rate = 16e9
    """Between the device and the host's memory, for pages that are swapped."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a step reads at."""
        return self.memory_bytes_per_s * self.memory_efficiency

    def flops(self, dtype: str) -> float:
        """FLOP/s that a step computes at in that dtype. Raises DeviceError."""
        if dtype not in self.flops_per_s:
            raise DeviceError(f"the device says nothing of {dtype}; it has {', '.join(self.flops_per_s)}")
        return self.flops_per_s[dtype] * self.flops_efficiency


def find_device(name: str, registry: Registry) -> Device:
    """The device of a TOML file, or of that name in an installed plugin. Raises DeviceError."""
    if name.endswith(".toml"):
        return read(name, Path(name))
    known = dict(devices(registry))
    if name not in known:
        raise DeviceError(f"device {name!r}: known are {', '.join(sorted(known)) or 'none'}; or give a TOML file")
    return read(name, known[name])


def devices(registry: Registry) -> Iterator[tuple[str, Traversable]]:
    """The devices that plugins describe, by name."""
    for info in registry.backends.values():
        package, _, folder = info.devices.partition(":")
        if package:
            for file in files(package).joinpath(folder).iterdir():
                if file.name.endswith(".toml"):
                    yield file.name.removesuffix(".toml"), file


def read(name: str, file: Traversable) -> Device:
    """The device that a file describes."""
    try:
        return Device.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise DeviceError(f"{name}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DeviceError(f"{name}: it is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DeviceError(f"{name}: {where} = {first['input']!r:.60}: {first['msg']}") from error
