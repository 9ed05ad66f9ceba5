"""Parallel layouts: degrees validated without a device, and the communication that a forward calls by name."""

from lineshaft.layout.degrees import AXES, Degrees, ModelShape
from lineshaft.layout.forward import Layout, TensorParallel

__all__ = ["AXES", "Degrees", "Layout", "ModelShape", "TensorParallel"]
