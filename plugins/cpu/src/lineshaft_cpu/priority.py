"""What outranks what among this plugin's kernels; the torch kit's portable ones have 0, and anyone's may go above."""

from __future__ import annotations

TORCH = 10
"""Made of torch's operators, and better on a CPU than the portable kernel."""
NATIVE = 15
"""Compiled for this machine, or over weights in the order of a compiled kernel."""
