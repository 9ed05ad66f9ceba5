"""The registered backends and contributions, and the choice of one backend: by name, or the best usable one.

It never falls back: a named backend is returned or the reason why not is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import pluggy
from pydantic import BaseModel, ValidationError

from lineshaft.errors import AmbiguousBackend, BackendUnavailable, PluginError, UnknownBackend
from lineshaft.registry.admission import check_items
from lineshaft.registry.loading import load_attribute, one_line
from lineshaft_contract.backends import BackendInfo, BackendKind, Probe
from lineshaft_contract.kernels import Kernel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """An entry point: its name, and the distribution and version that brought it ("" for the core itself)."""

    name: str
    distribution: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True)
class Rejected:
    """A plugin that is installed and not used, and why."""

    plugin: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class BackendStatus:
    """A registered backend and what its probe says of this machine."""

    name: str
    kind: BackendKind
    usable: bool
    reason: str
    devices: tuple[str, ...]
    distribution: str
    version: str


def implementations(
    manager: pluggy.PluginManager, hook: str, given: Mapping[str, Any], key: str | None = None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Who implements a hook ("hook of plugin") and a call with those of the arguments that it takes; `key`: of one
    plugin."""
    for impl in getattr(manager.hook, hook).get_hookimpls():
        if key is None or impl.plugin_name == key:
            yield f"{hook} of {impl.plugin_name}", partial(impl.function, *(given[name] for name in impl.argnames))


class Registry:
    """What `discover` found. `backends` maps names to what was registered, `rejected` lists what was refused."""

    def __init__(
        self,
        manager: pluggy.PluginManager,
        backends: Mapping[str, tuple[BackendInfo, Plugin]],
        rejected: Sequence[Rejected],
    ) -> None:
        self.backends: dict[str, BackendInfo] = {name: info for name, (info, _) in sorted(backends.items())}
        self.rejected = tuple(rejected)
        self._manager = manager
        self._plugins = {name: plugin for name, (_, plugin) in backends.items()}

    def status(self) -> list[BackendStatus]:
        """Every registered backend, probed, in the order of names."""
        return [self._status(info) for info in self.backends.values()]

    def select(self, name: str, options: Mapping[str, Any] | None = None) -> BackendInfo:
        """The backend of that name, or for "auto" the usable one of the largest kind above the reference.

        `options` are what a user wrote for it: some make it run without its device (`Probe.unless`).

        Raises UnknownBackend, BackendUnavailable with each reason, and AmbiguousBackend for a tie.
        """
        if name == "auto":
            return self._best()
        info = self.named(name)
        found = probe(info)
        if not found.runs_with(options or {}):
            usable = ", ".join(other.name for other in self.status() if other.usable)
            raise BackendUnavailable(f"backend {name!r} is not usable here: {found.reason}; usable here: {usable}")
        return info

    def kernels(self, backend: str) -> list[Kernel]:
        """Kernels that plugins contribute to the backend, besides its own. Raises PluginError naming the culprit."""
        return self._collect("lineshaft_kernels", Kernel, backend=backend)

    def ops(self) -> list[Any]:
        """Further ops (`OpSpec`)."""
        return self._collect("lineshaft_ops")

    def models(self) -> list[Any]:
        """Further model families."""
        return self._collect("lineshaft_models")

    def schemes(self) -> list[Any]:
        """Further quantization schemes."""
        return self._collect("lineshaft_quant_schemes")

    def checkpoints(self) -> list[Any]:
        """Further checkpoint formats."""
        return self._collect("lineshaft_checkpoints")

    def executors(self) -> list[Any]:
        """Further executors."""
        return self._collect("lineshaft_executors")

    def plan_frozen(self, plan: Any) -> None:
        """Show a frozen plan to the plugins that observe it; an observer that raises is logged and changes nothing."""
        for hook, call in implementations(self._manager, "lineshaft_plan_frozen", {"plan": plan}):
            try:
                call()
            except Exception as error:
                log.warning("%s raised %s; the plan stands", hook, one_line(error))

    def _collect(self, hook: str, kind: type = object, **given: Any) -> list[Any]:
        items: list[Any] = []
        for name, call in implementations(self._manager, hook, given):
            try:
                items += check_items(name, call(), kind)
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(f"{name} raised {one_line(error)}; update or uninstall that plugin") from error
        return items

    def _status(self, info: BackendInfo) -> BackendStatus:
        plugin, found = self._plugins[info.name], probe(info)
        return BackendStatus(
            info.name, info.kind, found.usable, found.reason, found.devices, plugin.distribution, plugin.version
        )

    def named(self, name: str) -> BackendInfo:
        """The backend of that name, whether it can run here or not. Raises UnknownBackend, BackendUnavailable."""
        if name not in self.backends:
            raise self._absent(name)
        return self.backends[name]

    def _absent(self, name: str) -> BackendUnavailable | UnknownBackend:
        """Why there is no such backend: its plugin was rejected, or nobody registers it."""
        for rejected in self.rejected:
            if rejected.plugin == name:
                origin = f"its plugin ({rejected.distribution}) is installed but rejected"
                return BackendUnavailable(f"backend {name!r}: {origin}: {rejected.reason}")
        near = get_close_matches(name, self.backends, n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else "no plugin here registers it; "
        others = "".join(f"; rejected: {item.plugin} ({item.reason})" for item in self.rejected)
        return UnknownBackend(f"unknown backend {name!r}; {hint}registered: {', '.join(self.backends)}{others}")

    def _best(self) -> BackendInfo:
        candidates = [status for status in self.status() if status.kind > BackendKind.REFERENCE]
        usable = [status for status in candidates if status.usable]
        if not usable:
            reasons = [f"{status.name}: {status.reason}" for status in candidates]
            reasons += [f"{item.plugin}: rejected, {item.reason}" for item in self.rejected]
            raise BackendUnavailable(
                f'backend = "auto" finds no usable backend ({"; ".join(reasons) or "no plugin is installed"}); '
                'install one, or write backend = "numpy" to check only'
            )
        best = max(status.kind for status in usable)
        names = [status.name for status in usable if status.kind == best]
        if len(names) > 1:
            lines = " or ".join(f'backend = "{name}"' for name in names)
            raise AmbiguousBackend(f'backend = "auto" fits {", ".join(names)} equally well; write {lines}')
        return self.backends[names[0]]


def probe(info: BackendInfo) -> Probe:
    """What the backend's probe finds; one that fails, and options that cannot be had, mean "not usable" with that
    failure as the reason."""
    try:
        found = load_attribute(info.probe)()
        if not isinstance(found, Probe):
            return Probe(False, f"its probe returned {type(found).__name__}; allowed is a Probe")
        if found.usable or found.unless:
            options_model(info)
        return found
    except PluginError as error:
        return Probe(False, str(error))
    except (Exception, SystemExit) as error:
        return Probe(False, f"its probe raised {one_line(error)}")


def options_model(info: BackendInfo) -> type[BaseModel] | None:
    """The imported options model of a backend, or None. Raises PluginError for one that cannot be imported, is not a
    pydantic model or cannot be made; an option without a default is no mistake."""
    if not info.options:
        return None
    model = load_attribute(info.options)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginError(
            f"the backend {info.name!r} registers options {info.options!r}, which is not a pydantic model"
        )
    try:
        model()
    except ValidationError:
        pass
    except Exception as error:
        raise PluginError(
            f"its options {info.options!r} cannot be made: {one_line(error)}; update the plugin"
        ) from error
    return model
