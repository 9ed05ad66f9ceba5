"""Profiles: defaults for a kind of load, below every value that is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineshaft.config import load_config, make_config
from lineshaft.config.load import gather
from lineshaft.config.profiles import PROFILES
from lineshaft.errors import InvalidValue


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_its_keys(name: str) -> None:
    config = make_config(model="m", profile=name)
    for key, value in PROFILES[name].items():
        table, field = key.split(".")
        assert getattr(getattr(config, table), field) == value
    assert config.profile == name and make_config(model="m").profile is None


def test_every_given_key_wins_wherever_the_profile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('model = "m"\n[scheduler]\nmax_rows = 7\n')
    config = load_config(file, {"LINESHAFT_CACHE__WATERMARK": "0.2"}, {"profile": "interactive"})
    assert (config.scheduler.max_rows, config.cache.watermark) == (7, 0.2)
    assert config.scheduler.admission == "priority"
    file.write_text('model = "m"\nprofile = "interactive"\n')
    assert load_config(file, {}, {}).scheduler.max_rows == 16
    assert load_config(file, {}, {"profile": "batch"}).scheduler.max_rows == 256
    assert load_config(file, {"LINESHAFT_PROFILE": "none"}, {}).scheduler.max_rows == 32


def test_values_remember_that_they_are_of_the_profile() -> None:
    sources = {item.path: item.source for item in gather(None, {}, {"profile": "batch", "scheduler.max_rows": "9"})}
    assert sources["scheduler", "cache_aware"] == "profile batch"
    assert sources["scheduler", "max_rows"] == "option scheduler.max_rows"


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"profile = 'fast'.*'interactive' or 'batch'"):
        make_config(model="m", profile="fast")
