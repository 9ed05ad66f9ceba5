"""JAX on eight virtual devices of the CPU, whatever else is installed, settled before it starts."""

from __future__ import annotations

import os

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5e-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""What libtpu wants to know where it only compiles."""
for name, value in COMPILER_ONLY.items():
    os.environ.setdefault(name, value)
