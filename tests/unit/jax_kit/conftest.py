"""JAX on eight virtual devices of the CPU, whatever else is installed, settled before it starts."""

from __future__ import annotations

import os

import jax

from lineshaft_tpu.devices import HOST

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

for name, value in HOST.items():
    os.environ.setdefault(name, value)
