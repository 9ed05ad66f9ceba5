"""Finds plugins by entry point, each in isolation: what one does wrong is recorded and touches no other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, version
from importlib.metadata import entry_points as installed

import pluggy

from lineshaft.errors import PluginError
from lineshaft.registry.admission import check_backend, check_hooks, check_items
from lineshaft.registry.loading import one_line
from lineshaft.registry.registry import Plugin, Registry, Rejected, implementations
from lineshaft_contract.backends import API_VERSION, BackendInfo
from lineshaft_contract.hooks import ENTRY_POINT_GROUP, PROJECT, HookSpecs
from lineshaft_contract.reference import plugin as reference_plugin

CONTRACT = "lineshaft-contract"
"""The distribution of the reference backend, which is always there."""
log = logging.getLogger(__name__)
Backends = dict[Plugin, Sequence[BackendInfo]]


def discover(entry_points: Iterable[EntryPoint] | None = None) -> Registry:
    """The registry of all plugins of the group `lineshaft.backends`, or of exactly these entry points.

    Never raises for a plugin's mistake: it is in `Registry.rejected` with its reason.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    found: Backends = {}
    rejected: list[Rejected] = []
    reference = Plugin("reference", CONTRACT, version(CONTRACT))
    found[reference] = admit(manager, reference, reference_plugin)
    points = installed(group=ENTRY_POINT_GROUP) if entry_points is None else entry_points
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        origin = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
        plugin = Plugin(point.name, *origin)
        try:
            found[plugin] = admit(manager, plugin, load(point))
        except PluginError as error:
            rejected.append(Rejected(plugin.name, plugin.distribution, str(error)))
    drop_clashes(manager, found, rejected, reference)
    backends = {info.name: (info, plugin) for plugin, infos in found.items() for info in infos}
    return Registry(manager, backends, tuple(rejected))


def load(point: EntryPoint) -> object:
    """The plugin object; PluginError for whatever its import does, `sys.exit` too."""
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"import of {point.value!r} failed: {one_line(error)}") from error


def admit(manager: pluggy.PluginManager, plugin: Plugin, implementation: object) -> Sequence[BackendInfo]:
    """Register the plugin's hooks and return its checked backends; or raise PluginError and leave none."""
    registered = None
    try:
        check_hooks(implementation)
        registered = manager.register(implementation, name=plugin.key)
        return backends_of(manager, plugin)
    except (Exception, SystemExit) as error:
        if registered:
            manager.unregister(name=registered)
        if isinstance(error, PluginError):
            raise
        failed = "lineshaft_backends raised" if registered else "its hooks are refused:"
        raise PluginError(f"{failed} {one_line(error)}") from error


def backends_of(manager: pluggy.PluginManager, plugin: Plugin) -> Sequence[BackendInfo]:
    """The backends that one registered plugin names, each checked."""
    infos: list[BackendInfo] = []
    for hook, call in implementations(manager, "lineshaft_backends", {}, plugin.key):
        infos += check_items(hook, call(), BackendInfo)
    for info in infos:
        check_backend(info)
        warn_of_next_api(plugin, info)
    if len({info.name for info in infos}) < len(infos):
        raise PluginError("it registers one backend name twice; give each backend its own")
    return infos


def warn_of_next_api(plugin: Plugin, info: BackendInfo) -> None:
    if info.api == API_VERSION + 1:
        log.warning(
            "backend %r of %s is written for API %d and this lineshaft has %d; accepted for now, update lineshaft",
            info.name,
            plugin.distribution,
            info.api,
            API_VERSION,
        )


def drop_clashes(manager: pluggy.PluginManager, found: Backends, rejected: list[Rejected], reference: Plugin) -> None:
    """Reject all plugins that share a backend name; the reference itself stays."""
    owned = [(info.name, plugin) for plugin, infos in found.items() for info in infos]
    for name, plugin in owned:
        others = ", ".join(f"{p.name} ({p.distribution})" for own, p in owned if own == name and p is not plugin)
        if others and plugin is not reference and found.pop(plugin, None) is not None:
            manager.unregister(name=plugin.key)
            reason = f"backend {name!r} is also registered by {others}; uninstall one"
            rejected.append(Rejected(plugin.name, plugin.distribution, reason))
