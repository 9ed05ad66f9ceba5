"""JAX on eight virtual devices of the CPU, whatever else is installed, settled before it starts."""

from __future__ import annotations

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
