"""Portable torch building blocks for backends: kernels, sessions, recorded programs and collectives.

Nothing here assumes a device; the plugin that builds on it names one.
"""

from lineshaft_torch.session import TorchSession

__all__ = ["TorchSession"]
