"""The evidence word: how far results hold, from what the harness did and what the operating system shows.

Of the plugin's word it takes only the kind: "host" earns no more than "on the host's processor", and an accelerator
needs a device node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lineshaft_conformance.results import Evidence
from lineshaft_contract.backends import BackendInfo, BackendKind, Probe, switched_on

NODES = ("nvidia[0-9]*", "accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*", "neuron[0-9]*")
"""Device nodes of accelerators under /dev. A render node counts only beside kfd: displays have render nodes too."""

Devices = Callable[[], Sequence[str]]


def os_devices(root: Path = Path("/dev"), is_node: Callable[[Path], bool] = Path.is_char_device) -> tuple[str, ...]:
    """The device nodes of accelerators that the operating system shows, sorted; none where it has no such nodes."""
    patterns = (*NODES, "dri/renderD*") if is_node(root / "kfd") else NODES
    found = (path for pattern in patterns for path in root.glob(pattern))
    return tuple(sorted(str(path) for path in found if is_node(path)))


def evidence_of(
    info: BackendInfo, options: Mapping[str, Any], environment: Mapping[str, str], devices: Devices
) -> tuple[Evidence, str]:
    """The word for what runs on this backend in this process, and why.

    `options` are the backend's own, as validated; `devices` lists device nodes (see `os_devices`).
    """
    switches = list(interpreting(info, options, environment))
    if switches:
        return Evidence.INTERPRETED, f"{switches[0]} is set"
    if info.kind is not BackendKind.ACCELERATOR:
        return Evidence.EXECUTED, "on the host's processor"
    nodes = devices()
    if not nodes:
        return Evidence.INTERPRETED, "the operating system shows no device node of an accelerator"
    return Evidence.EXECUTED, f"the operating system shows {', '.join(nodes)}"


def boasts(
    info: BackendInfo, probe: Probe, options: Mapping[str, Any], environment: Mapping[str, str], devices: Devices
) -> str | None:
    """Why a probe claims more than the machine has: devices of an accelerator of which there is no node. Else None."""
    claims = info.kind is BackendKind.ACCELERATOR and probe.usable and probe.devices
    if not claims or devices() or any(interpreting(info, options, environment)):
        return None
    return (
        f"the probe of {info.name!r} names {', '.join(probe.devices)}, but the operating system shows no device node "
        "of an accelerator; name no device that is not there, or make code interpreted by an option"
    )


def interpreting(info: BackendInfo, options: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[str]:
    """The switches that are on and make code interpreted, as a user would write them."""
    accelerator = info.kind is BackendKind.ACCELERATOR
    yield from _variable("TRITON_INTERPRET", environment)
    if accelerator and environment.get("JAX_PLATFORMS", "").strip().lower().startswith("cpu"):
        yield f"JAX_PLATFORMS={environment['JAX_PLATFORMS']}"
    if accelerator and str(options.get("platform", "")).strip().lower() == "cpu":
        yield f"the option platform = {options['platform']!r}"
    yield from _option("interpret", options)
    yield from _option("stand_in", options)
    yield from _emulated(options)


def interpreters(options: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[str]:
    """Those of them by which an interpreter runs kernels."""
    yield from _variable("TRITON_INTERPRET", environment)
    yield from _option("interpret", options)
    yield from _emulated(options)


def _variable(name: str, environment: Mapping[str, str]) -> Iterator[str]:
    if switched_on(environment.get(name, "")):
        yield f"{name}={environment[name]}"


def _option(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    if switched_on(options.get(name)):
        yield f"the option {name} = {options[name]!r}"


def _emulated(options: Mapping[str, Any]) -> Iterator[str]:
    """Options that name code whose instructions are emulated, such as a level `amx_emulated`."""
    for name, value in options.items():
        if isinstance(value, str) and value.strip().lower().endswith("emulated"):
            yield f"the option {name} = {value!r}"
