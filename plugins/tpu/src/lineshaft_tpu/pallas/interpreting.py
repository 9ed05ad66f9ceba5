"""Running kernels on the host: as they are, or with every copy and access watched for races."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.experimental import io_callback
from jax.experimental.pallas import tpu as pltpu

Mode = Literal["", "interpret", "races"]


def parameter(mode: Mode) -> Any:
    """What `pallas_call` takes as `interpret`: "" compiles for the device.

    Races are found only where copies run when they are started, and where most copies in flight have a clock of their
    own: with fewer clocks two of them share one and look ordered.
    """
    if mode == "races":
        return pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", vector_clock_size=64)
    return mode == "interpret"


def watched(run: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """`run`, whose results under "races" come only if the kernel had none; else the execution fails and says so."""
    if mode != "races":
        return run

    def checked(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        first = jax.tree.leaves(result)[0]
        done = io_callback(_raise_on_races, jax.ShapeDtypeStruct((), bool), first[(0,) * first.ndim])
        return jax.lax.optimization_barrier((result, done))[0]

    return checked


def _raise_on_races(_: Any) -> bool:
    """The interpreter keeps what it found about the last kernel in a module of its own, and prints each race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    if found is None or found.races_found:
        raise RuntimeError("the interpreted kernel has a data race; the lines RACE DETECTED say between what")
    return True
