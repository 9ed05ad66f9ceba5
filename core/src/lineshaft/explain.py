"""Resolving a plan to look at it: no weights are loaded, no cache is allocated, nothing is captured."""

from __future__ import annotations

from lineshaft.config import EngineConfig
from lineshaft.plan import Plan
from lineshaft.registry import Registry, discover
from lineshaft.runner.setup import make_planned, make_setup


def explain(config: EngineConfig, registry: Registry | None = None) -> Plan:
    """The plan of rank 0 under this configuration. Raises what starting the engine would raise up to here."""
    registry = registry or discover()
    return make_planned(config, make_setup(config, registry), registry).plan
