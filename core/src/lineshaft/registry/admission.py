"""What a plugin must keep to: correctly named hooks, lists of the right type, an API version that is accepted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from inspect import getmembers, isroutine
from typing import Any

from lineshaft.errors import PluginError
from lineshaft_contract.backends import API_VERSION, BackendInfo, BackendKind
from lineshaft_contract.hooks import PROJECT, HookSpecs

MARK = f"{PROJECT}_impl"
HOOKS = tuple(name for name in vars(HookSpecs) if name.startswith(f"{PROJECT}_"))
ACCEPTED = (API_VERSION, API_VERSION + 1)
NAME = re.compile(r"[a-z][a-z0-9_-]*")


def check_hooks(plugin: object) -> None:
    """Raise PluginError for a function named like a hook that is none, or that lacks the decorator."""
    for attribute, function in getmembers(plugin, isroutine):
        mark = getattr(function, MARK, None)
        name = (mark or {}).get("specname") or attribute
        if mark is None and attribute in HOOKS:
            raise PluginError(f"{attribute} lacks its decorator; put @hookimpl above it")
        if name not in HOOKS and (mark is not None or name.startswith(f"{PROJECT}_")):
            near = get_close_matches(name, HOOKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(HOOKS)}"
            raise PluginError(f"unknown hook {name}; {hint}")


def check_items(hook: str, value: object, kind: type) -> Sequence[Any]:
    """The hook's return value if it is a list or tuple of `kind`, else PluginError."""
    if not isinstance(value, (list, tuple)):
        raise PluginError(f"{hook} returned {type(value).__name__}; allowed is a list or tuple")
    for item in value:
        if not isinstance(item, kind):
            raise PluginError(f"{hook} returned a {type(item).__name__}; allowed are {kind.__name__}")
    return value


def check_backend(info: BackendInfo) -> None:
    """Raise PluginError for a name that cannot be configured, a wrong kind, or an API version not accepted."""
    if not isinstance(info.name, str) or not NAME.fullmatch(info.name) or info.name == "auto":
        raise PluginError(f"backend name {info.name!r}; allowed are a-z, 0-9, _ and -, and not 'auto'")
    if not isinstance(info.kind, BackendKind):
        raise PluginError(f"backend {info.name!r} has kind {info.kind!r}; allowed is a BackendKind")
    if info.api not in ACCEPTED:
        allowed = " or ".join(map(str, ACCEPTED))
        raise PluginError(f"backend {info.name!r} is for API {info.api}; allowed is {allowed}; update the plugin")
