"""What is installed: the backends and other contributions of plugins, found once, before the first step.

It knows no plugin by name; only the contract's reference backend is registered here.
"""

from lineshaft.registry.discovery import discover
from lineshaft.registry.loading import load_attribute
from lineshaft.registry.registry import BackendStatus, Plugin, Registry, Rejected, options_model

__all__ = ["BackendStatus", "Plugin", "Registry", "Rejected", "discover", "load_attribute", "options_model"]
