"""The configuration: what can be set, where it may come from and what each value means.

It knows no backend: a plugin's own options stay an opaque table until the plugin's model checks them.
"""

from lineshaft.config.environment import environment
from lineshaft.config.load import Setting, gather, load_config, make_config, settings
from lineshaft.config.models import (
    CacheConfig,
    EngineConfig,
    LayoutConfig,
    SamplingConfig,
    SchedulerConfig,
)
from lineshaft.config.options import validate_options
from lineshaft.config.profiles import PROFILES

__all__ = [
    "PROFILES",
    "CacheConfig",
    "EngineConfig",
    "LayoutConfig",
    "SamplingConfig",
    "SchedulerConfig",
    "Setting",
    "environment",
    "gather",
    "load_config",
    "make_config",
    "settings",
    "validate_options",
]
