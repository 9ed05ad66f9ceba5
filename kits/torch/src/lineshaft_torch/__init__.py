"""Portable torch building blocks for backends: kernels, sessions, recorded programs and collectives.

Nothing here assumes a device; the plugin that builds on it names one. PyTorch is imported with what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineshaft_torch.session import TorchSession

__all__ = ["TorchSession"]


def __getattr__(name: str) -> Any:
    if name != "TorchSession":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lineshaft_torch.session import TorchSession

    return TorchSession
