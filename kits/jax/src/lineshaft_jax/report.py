"""What a compiled program says of itself: memory, work, and the collectives that are really in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
from jaxlib import _jax

from lineshaft_contract.sessions import Cache, CaptureReport

if TYPE_CHECKING:
    from lineshaft_jax.session import JaxSession

COLLECTIVES = re.compile(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def make_report(
    compiled: Any, session: JaxSession, changed: Sequence[Cache], seconds: float, *, cached: bool
) -> CaptureReport:
    """The report of a program of the session that changes these caches, per rank."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, cache(compiled.as_text)
    arrays = [array for cache in changed for array in cache.arrays.values()]
    held = sum(array.size * array.dtype.itemsize for array in arrays) // session.ranks
    return CaptureReport(
        seconds,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        cache_copied=max(0, held - memory.alias_size_in_bytes),
        collectives=collectives(text()) if session.ranks > 1 else (),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        flops=int(cost.get("flops", 0)),
        moved=int(cost.get("bytes accessed", 0)),
        code=memory.generated_code_size_in_bytes,
        cached=cached,
        details=session.inspect(text),
    )


def collectives(text: str) -> tuple[str, ...]:
    """The collectives that the compiler kept, with how often each is there: "all-reduce x 4"."""
    found = Counter(COLLECTIVES.findall(text))
    return tuple(f"{name} x {count}" for name, count in sorted(found.items()))


def device_facts(devices: list[Any]) -> dict[str, str]:
    """What a compiled program depends on besides its own making: versions, and the devices with their features."""
    return {
        "jax": version("jax"), "jaxlib": version("jaxlib"), "runtime": str(devices[0].client.platform_version),
        "device": str(devices[0].device_kind), "topology": topology(devices),
    }  # fmt: skip


def topology(devices: list[Any]) -> str:
    """What tells devices apart that programs are compiled for, such as the instructions of a CPU; "" where the runtime
    does not tell."""
    try:
        return str(_jax.get_topology_for_devices(devices).fingerprint())
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return ""
