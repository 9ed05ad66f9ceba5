"""Virtual devices of JAX's CPU platform, as many as a layout has ranks."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import jax

from lineshaft.errors import LayoutError

VIRTUAL = 8
"""Fewest virtual devices: JAX fixes their number when it starts, and a later engine may want more than the first."""


def cpu_devices(count: int) -> list[Any]:
    """At least so many virtual devices. Raises LayoutError where JAX was started with fewer."""
    jax.config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):  # JAX has started: what it has must do
        jax.config.update("jax_num_cpu_devices", max(count, VIRTUAL))
    found = jax.devices("cpu")
    if len(found) < count:
        raise LayoutError(
            f"the layout has {count} ranks, and JAX started with {len(found)} virtual devices in this process; "
            "use a process of its own for the larger layout"
        )
    return list(found)
