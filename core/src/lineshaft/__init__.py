"""lineshaft: one inference engine that drives any accelerator through plugins.

The exported names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineshaft.async_llm import AsyncLLM
    from lineshaft.config import EngineConfig
    from lineshaft.llm import LLM
    from lineshaft.outputs import CompletionOutput, RequestOutput
    from lineshaft.sampling.params import SamplingParams
    from lineshaft.sampling.structured import Structured

    __version__: str

__all__ = [
    "LLM", "AsyncLLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams", "Structured",
    "__version__",
]  # fmt: skip

_HOMES = {
    "LLM": "lineshaft.llm",
    "AsyncLLM": "lineshaft.async_llm",
    "CompletionOutput": "lineshaft.outputs",
    "EngineConfig": "lineshaft.config",
    "RequestOutput": "lineshaft.outputs",
    "SamplingParams": "lineshaft.sampling.params",
    "Structured": "lineshaft.sampling.structured",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lineshaft")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lineshaft' has no attribute {name!r}; exported are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
