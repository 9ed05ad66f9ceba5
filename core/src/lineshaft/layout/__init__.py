"""Parallel layouts: degrees validated without a device, and the communication that a forward calls by name."""

from lineshaft.layout.degrees import AXES, Degrees, HeadShare, ModelShape
from lineshaft.layout.forward import Layout, TensorParallel, choose_layout

__all__ = ["AXES", "Degrees", "HeadShare", "Layout", "ModelShape", "TensorParallel", "choose_layout"]
