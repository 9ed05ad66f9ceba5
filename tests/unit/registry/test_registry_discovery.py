"""Fake plugins, each with one mistake: it is recorded with its reason and touches no other plugin."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from pydantic import BaseModel

from lineshaft.errors import AmbiguousBackend, BackendUnavailable, PluginError, UnknownBackend
from lineshaft.registry import Registry, discover, load_attribute
from lineshaft_contract.backends import API_VERSION, BackendInfo, BackendKind, Probe
from lineshaft_contract.hooks import ENTRY_POINT_GROUP, hookimpl
from lineshaft_contract.kernels import Kernel

Install = Callable[..., EntryPoint]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a module with these functions in place and returns an entry point that names it."""

    def put(name: str, **functions: Any) -> EntryPoint:
        module = types.ModuleType(f"fake_{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return EntryPoint(name=name, value=module.__name__, group=ENTRY_POINT_GROUP)

    return put


def info(name: str, module: str = "", usable: str = "yes", **more: Any) -> BackendInfo:
    return BackendInfo(name=name, probe=f"fake_{module or name}:{usable}", factory="x:y", **more)


def backends(*infos: object) -> Callable[[], list[object]]:
    @hookimpl
    def lineshaft_backends() -> list[object]:
        return list(infos)

    return lineshaft_backends


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


PROBES = {
    "yes": lambda: Probe(True, "there", ("device 0",)),
    "no": lambda: Probe(False, "no device node"),
    "broken": raising(RuntimeError("two\nlines")),
    "strange": lambda: True,
}


def good(install: Install, name: str, usable: str = "yes", **more: Any) -> EntryPoint:
    return install(name, lineshaft_backends=backends(info(name, usable=usable, **more)), **PROBES)


def reason(registry: Registry, plugin: str) -> str:
    (found,) = [item.reason for item in registry.rejected if item.plugin == plugin]
    assert "\n" not in found
    return found


def bad_plugins(install: Install) -> dict[str, tuple[EntryPoint, str]]:
    @hookimpl
    def lineshaft_backend() -> list[BackendInfo]:
        return []

    @hookimpl
    def lineshaft_kernels(backnd: str) -> list[Kernel]:
        return []

    def undecorated() -> list[BackendInfo]:
        return []

    @hookimpl
    def not_a_list() -> Any:
        return info("a")

    text = "is for API"
    return {
        "absent": (EntryPoint("absent", "no_such_module", ENTRY_POINT_GROUP), "ModuleNotFoundError"),
        "raises": (install("raises", lineshaft_backends=hookimpl(raising(OSError("x\ny")))), "raised OSError: x y"),
        "exits": (install("exits", lineshaft_backends=hookimpl(raising(SystemExit(3)))), "raised SystemExit: 3"),
        "items": (install("items", lineshaft_backends=backends(3)), "returned a int; allowed are BackendInfo"),
        "old": (install("old", lineshaft_backends=backends(info("old", api=API_VERSION - 1))), text),
        "new": (install("new", lineshaft_backends=backends(info("new", api=API_VERSION + 2))), text),
        "misspelt": (install("misspelt", lineshaft_backend=lineshaft_backend), "did you mean lineshaft_backends?"),
        "bare": (install("bare", lineshaft_backends=undecorated), "lacks its decorator"),
        "signature": (install("signature", lineshaft_kernels=lineshaft_kernels), "PluginValidationError"),
        "scalar": (install("scalar", lineshaft_backends=not_a_list), "allowed is a list or tuple"),
        "twice": (install("twice", lineshaft_backends=backends(info("t"), info("t"))), "one backend name twice"),
        "auto": (install("auto", lineshaft_backends=backends(info("auto"))), "backend name 'auto'"),
        "name": (install("name", lineshaft_backends=backends(info("A b"))), "backend name 'A b'"),
        "kind": (install("kind", lineshaft_backends=backends(info("k", kind=2))), "allowed is a BackendKind"),
    }


def test_each_mistake_is_recorded_and_breaks_no_other(install: Install) -> None:
    bad = bad_plugins(install)
    registry = discover([*(point for point, _ in bad.values()), good(install, "fine")])
    assert set(registry.backends) == {"numpy", "fine"}
    assert {item.plugin for item in registry.rejected} == set(bad)
    for name, (_, expected) in bad.items():
        assert expected in reason(registry, name), name
    assert registry.select("fine").name == "fine"


def test_a_module_that_fails_at_import_is_rejected(install: Install, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exploding_plugin.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("exploding", "exploding_plugin", ENTRY_POINT_GROUP)
    assert "RuntimeError: boom" in reason(discover([point]), "exploding")


def test_two_plugins_of_one_backend_name_are_both_rejected(install: Install) -> None:
    first = install("first", lineshaft_backends=backends(info("same", "first")))
    second = install("second", lineshaft_backends=backends(info("same", "second")))
    registry = discover([first, second])
    assert set(registry.backends) == {"numpy"}
    assert "also registered by second" in reason(registry, "first")
    assert "also registered by first" in reason(registry, "second")


def test_no_plugin_can_take_the_references_name(install: Install) -> None:
    registry = discover([install("thief", lineshaft_backends=backends(info("numpy", "thief")))])
    assert registry.backends["numpy"].kind is BackendKind.REFERENCE
    assert "also registered by reference (lineshaft-contract)" in reason(registry, "thief")


def test_the_next_api_version_is_accepted_with_a_warning(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        registry = discover([good(install, "next", api=API_VERSION + 1)])
    assert "next" in registry.backends
    assert f"API {API_VERSION + 1}" in caplog.text


def test_a_named_backend_is_returned_or_raises_its_reason(install: Install) -> None:
    registry = discover([good(install, name, usable=name) for name in PROBES])
    assert registry.select("yes").name == "yes"
    for name, expected in {"no": "no device node", "broken": "RuntimeError: two lines", "strange": "bool"}.items():
        with pytest.raises(BackendUnavailable) as caught:
            registry.select(name)
        assert expected in str(caught.value)
    states = {status.name: status for status in registry.status()}
    assert [states[name].usable for name in PROBES] == [True, False, False, False]
    assert states["yes"].devices == ("device 0",)


class Needy(BaseModel):
    device: int


class Unfinished(BaseModel):
    device: Absent  # type: ignore[name-defined]  # noqa: F821


OPTIONS = {
    "absent": "no module named 'no_such_module'", "number": "not a pydantic model", "unfinished": "cannot be made",
    "needy": "",
}  # fmt: skip


def test_a_backend_whose_options_cannot_be_had_is_not_usable(install: Install) -> None:
    references = dict.fromkeys(OPTIONS, "") | {"absent": "no_such_module:Options", "number": "fake_number:OPTIONS"}
    references |= {"unfinished": "fake_unfinished:Unfinished", "needy": "fake_needy:Needy"}
    more = {"OPTIONS": 3, "Unfinished": Unfinished, "Needy": Needy}
    registry = discover(
        install(name, lineshaft_backends=backends(info(name, options=references[name])), **PROBES, **more)
        for name in OPTIONS
    )
    states = {status.name: status for status in registry.status()}
    for name, expected in OPTIONS.items():
        assert states[name].usable == (not expected), name
        assert expected in states[name].reason.lower(), name
    assert registry.select("auto").name == "needy"  # an option without a default is the user's to give
    with pytest.raises(BackendUnavailable, match=r"'number' is not usable here: .* not a pydantic model"):
        registry.select("number")


def test_an_unknown_name_lists_the_nearest_and_all(install: Install) -> None:
    absent = EntryPoint("absent", "no_such_module", ENTRY_POINT_GROUP)
    registry = discover([good(install, "alpha"), absent])
    with pytest.raises(UnknownBackend, match=r"did you mean 'alpha'\? registered: alpha, numpy; rejected: absent"):
        registry.select("alpa")
    with pytest.raises(BackendUnavailable, match="rejected: import of 'no_such_module' failed: ModuleNotFoundError"):
        registry.select("absent")


def test_auto_takes_the_largest_usable_kind_and_never_the_reference(install: Install) -> None:
    host = good(install, "host", kind=BackendKind.HOST)
    fast = good(install, "fast", kind=BackendKind.ACCELERATOR)
    dead = good(install, "dead", usable="no", kind=BackendKind.ACCELERATOR)
    assert discover([host, fast, dead]).select("auto").name == "fast"
    assert discover([host, dead]).select("auto").name == "host"
    with pytest.raises(BackendUnavailable, match="dead: no device node"):
        discover([dead]).select("auto")
    with pytest.raises(BackendUnavailable, match="no plugin is installed"):
        discover([]).select("auto")


def test_a_tie_is_an_error_that_prints_the_line_that_settles_it(install: Install) -> None:
    registry = discover([good(install, "one"), good(install, "two")])
    with pytest.raises(AmbiguousBackend, match='write backend = "one" or backend = "two"'):
        registry.select("auto")


def kernel(name: str, backend: str) -> Kernel:
    return Kernel(name=name, op="add", backend=backend, bind=lambda problem, session: None)


def test_other_hooks_are_gathered_from_all_plugins(install: Install) -> None:
    @hookimpl
    def lineshaft_kernels(backend: str) -> list[Kernel]:
        return [kernel("extra", backend)]

    @hookimpl
    def lineshaft_models() -> tuple[str, ...]:
        return ("family",)

    plan: list[object] = []

    @hookimpl
    def lineshaft_plan_frozen(plan: Any) -> None:
        plan.append("seen")

    hooks = (lineshaft_kernels, lineshaft_models, lineshaft_plan_frozen)
    registry = discover([install("more", **{hook.__name__: hook for hook in hooks})])
    assert [(found.name, found.backend) for found in registry.kernels("numpy")] == [("extra", "numpy")]
    assert registry.models() == ["family"]
    assert registry.ops() == registry.schemes() == registry.checkpoints() == registry.executors() == []
    registry.plan_frozen(plan)
    assert plan == ["seen"]


def test_a_contribution_that_fails_names_its_plugin(install: Install) -> None:
    @hookimpl
    def lineshaft_kernels(backend: str) -> Any:
        return ["not a kernel"] if backend == "x" else 1 / 0

    @hookimpl
    def lineshaft_plan_frozen() -> None:
        raise ValueError

    functions = {"lineshaft_kernels": lineshaft_kernels, "lineshaft_plan_frozen": lineshaft_plan_frozen}
    registry = discover([install("culprit", **functions)])
    with pytest.raises(PluginError, match="culprit returned a str; allowed are Kernel"):
        registry.kernels("x")
    with pytest.raises(PluginError, match="culprit raised ZeroDivisionError"):
        registry.kernels("y")
    registry.plan_frozen(None)


@pytest.mark.parametrize("reference", ["", "json", "json:", ":loads", "no_such_module:x", "json:absent"])
def test_a_reference_that_leads_nowhere_is_a_plugin_error(reference: str) -> None:
    with pytest.raises(PluginError):
        load_attribute(reference)


def test_a_reference_may_name_an_inner_attribute() -> None:
    assert load_attribute("json:JSONDecoder.decode").__name__ == "decode"
