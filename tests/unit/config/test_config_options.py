"""A backend's own options: checked by its plugin's model, imported only here, with errors like the core's."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lineshaft.config import validate_options
from lineshaft.errors import InvalidValue, PluginError, UnknownKey
from lineshaft_contract.backends import BackendInfo


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    depth: int = Field(default=1, ge=0)
    fast: bool = False

    @model_validator(mode="after")
    def _fit(self) -> Options:
        if self.fast and self.depth > 5:
            raise ValueError("fast = true needs depth <= 5")
        return self


INFO = BackendInfo(name="fake", probe="x:y", factory="x:z", options="fake_options_module:Options")


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_options_module")
    module.Options, module.NotAModel = Options, int  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_options_module", module)


def test_text_and_typed_values_become_an_instance() -> None:
    assert validate_options(INFO, {"depth": "3", "fast": True}) == Options(depth=3, fast=True)
    assert validate_options(INFO, {}) == Options()


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownKey, match=r"no option backend_options\.dept; did you mean backend_options\.depth\?"):
        validate_options(INFO, {"dept": 1})


@pytest.mark.parametrize("value", ["deep", -1, None, [1]])
def test_an_ill_typed_option_is_named_with_its_value(value: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        validate_options(INFO, {"depth": value})
    assert f"backend_options.depth = {value!r} (backend 'fake')" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit_together_are_told_in_the_models_words() -> None:
    with pytest.raises(InvalidValue, match=r"^backend_options \(backend 'fake'\): fast = true needs depth <= 5$"):
        validate_options(INFO, {"depth": 6, "fast": True})


def test_a_backend_without_options_takes_none() -> None:
    info = replace(INFO, options="")
    assert validate_options(info, {}) is None
    with pytest.raises(UnknownKey, match="no key is allowed here"):
        validate_options(info, {"depth": 1})


@pytest.mark.parametrize(
    "reference", ["absent_module:X", "fake_options_module:Absent", "fake_options_module:NotAModel", "z"]
)
def test_a_model_that_is_none_is_the_plugins_mistake(reference: str) -> None:
    with pytest.raises(PluginError):
        validate_options(replace(INFO, options=reference), {})
