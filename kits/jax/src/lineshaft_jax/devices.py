"""Virtual devices of JAX's CPU platform, as many as a layout has ranks."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import jax

from lineshaft_contract.errors import InvalidValue, LayoutError

VIRTUAL = 8
"""Fewest virtual devices: JAX fixes their number when it starts, and a later engine may want more than the first."""

MODES = ("jax_enable_x64", "jax_disable_jit")
"""What JAX must not be set to: programs are compiled, and no default dtype has 64 bits."""


def require_modes() -> None:
    """Raises InvalidValue where JAX, or a variable that sets it, is in another mode."""
    for name in MODES:
        if getattr(jax.config, name):
            raise InvalidValue(f"{name} is True; unset {name.upper()} in the environment, or set it to False")


def cpu_devices(count: int) -> list[Any]:
    """At least so many virtual devices. Raises LayoutError where JAX was started with fewer, InvalidValue for a mode of
    JAX that programs cannot be made in."""
    require_modes()
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
