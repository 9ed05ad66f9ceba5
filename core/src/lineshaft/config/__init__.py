"""The configuration: what can be set, where it may come from and what each value means.

It knows no backend: a plugin's own options stay an opaque table until the plugin's model checks them.
"""

from lineshaft.config.environment import environment
from lineshaft.config.load import load_config, make_config
from lineshaft.config.models import EngineConfig
from lineshaft.config.options import validate_options

__all__ = ["EngineConfig", "environment", "load_config", "make_config", "validate_options"]
