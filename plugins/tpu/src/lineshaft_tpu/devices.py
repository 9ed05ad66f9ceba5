"""The devices that JAX gives this process: real TPUs, or those of a topology that is not here."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from lineshaft_contract.errors import BackendUnavailable, InvalidValue, LayoutError
from lineshaft_jax.devices import cpu_devices, require_modes
from lineshaft_tpu.chips import SLICES, Topology
from lineshaft_tpu.probe import NO_LIBTPU

HOST = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5e-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
"""What libtpu must be told where there is no TPU, or it looks for a machine that it cannot find; and that it logs
errors alone, or each process leaves a temporary file of some 50 KB behind."""


def tpu_devices(count: int) -> list[Any]:
    """All TPUs of this host. Raises BackendUnavailable where they cannot be had, with who has them if that is said, and
    LayoutError where they are fewer than `count`."""
    require_modes()
    try:
        found = list(jax.devices("tpu"))
    except RuntimeError as error:
        raise BackendUnavailable(refusal(str(error))) from error
    if len(found) < count:
        raise LayoutError(f"the layout has {count} ranks, and this host {len(found)} TPU devices; lower a degree")
    return found


def refusal(text: str) -> str:
    """What to tell a user of a TPU that does not start, from the words of JAX."""
    said = " ".join(text.split())
    if "already in use" in said or "libtpu_lockfile" in said:
        return f"the TPU is in use by another process; end that one first ({said:.300})"
    if find_spec("libtpu") is None:
        return NO_LIBTPU
    return f'JAX finds no TPU ({said:.300}); for its CPU platform set platform = "cpu" under [backend_options]'


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a topology that is not here, to compile for.

    Raises BackendUnavailable without libtpu, InvalidValue for a shape that its compiler refuses.
    """
    if find_spec("libtpu") is None:
        raise BackendUnavailable(f"compiling for a TPU needs its compiler: {NO_LIBTPU}")
    cpu_devices(1)
    for name, value in HOST.items():
        os.environ.setdefault(name, value)
    one = {"chips_per_host_bounds": (1, 1, 1)} if set(topology.shape) == {1} else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **one).devices)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        known = ", ".join("x".join(map(str, shape)) for shape in SLICES[topology.chip.dims])
        raise InvalidValue(
            f"topology {topology.name!r} is refused by the compiler ({said:.300}); shapes that it takes: {known}"
        ) from error
