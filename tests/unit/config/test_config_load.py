"""What the merged configuration is, and what its errors say, for every source of a value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.config import EngineConfig, environment, load_config, make_config
from lineshaft.errors import ConfigError, InvalidValue, LineshaftError, UnknownKey


def toml(folder: Path, text: str) -> Path:
    path = folder / "engine.toml"
    path.write_text(text)
    return path


def message(call, kind: type[LineshaftError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    return text


def test_defaults_need_only_a_model() -> None:
    config = make_config(model="m")
    assert config == EngineConfig(model="m")
    assert (config.backend, config.scheduler.token_budget, config.cache.pages) == ("auto", 512, None)


def test_the_environment_overrules_the_file_and_options_overrule_both(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "file"\nseed = 1\nthreads = 1\n[cache]\npages = 7\npage_size = 8\n')
    variables = {"LINESHAFT_SEED": "2", "LINESHAFT_THREADS": "2", "LINESHAFT_CACHE__PAGE_SIZE": "16", "PATH": "/"}
    config = load_config(file, variables, {"threads": "3"})
    assert (config.model, config.seed, config.threads) == ("file", 2, 3)
    assert (config.cache.pages, config.cache.page_size) == (7, 16)


def test_every_field_has_a_meaning() -> None:
    def fields(model, path=()):
        for name, field in model.model_fields.items():
            yield (*path, name), field.description
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation, (*path, name))

    assert [path for path, meaning in fields(EngineConfig) if not meaning] == []


def test_free_tables_merge_key_by_key(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "m"\n[backend_options]\nplatform = "a"\ndepth = 3\n[kernels]\nattend = "x"\n')
    config = load_config(file, {"LINESHAFT_BACKEND_OPTIONS__PLATFORM": "b"}, {"kernels.linear": "y"})
    assert config.backend_options == {"platform": "b", "depth": 3}
    assert config.kernels == {"attend": "x", "linear": "y"}


def test_text_is_converted_to_the_type_of_its_key() -> None:
    variables = {
        "LINESHAFT_MODEL": "12",
        "LINESHAFT_CACHE__PREFIX_CACHING": "false",
        "LINESHAFT_CACHE__WATERMARK": "0.25",
        "LINESHAFT_CACHE__PAGES": "none",
    }
    config = load_config(None, variables, {"sampling.temperature": "0"})
    assert (config.model, config.cache.prefix_caching, config.cache.watermark) == ("12", False, 0.25)
    assert (config.cache.pages, config.sampling.temperature) == (None, 0.0)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ('threads = "12"', "threads", "'12'"),
        ("threads = true", "threads", "True"),
        ("threads = 1.0", "threads", "1.0"),
        ("threads = -1", "threads", "-1"),
        ('dtype = "int7"', "dtype", "'int7'"),
        ("cache = 3", "cache", "3"),
        ("threads.a = 3", "threads.a", "3"),
        ("[cache]\npages = 1", "cache.pages", "1"),
        ("[cache]\nmemory_fraction = 1.5", "cache.memory_fraction", "1.5"),
        ("[layout]\ntp = 0", "layout.tp", "0"),
        ("[kernels]\nattend = 3", "kernels.attend", "3"),
        ("[kernels.attend]\na = 'x'", "kernels.attend.a", "'x'"),
        ("backend_options = 3", "backend_options", "3"),
    ],
)
def test_a_file_must_give_the_type_itself(tmp_path: Path, text: str, key: str, value: str) -> None:
    file = toml(tmp_path, text)
    said = message(lambda: load_config(file, {"LINESHAFT_MODEL": "m"}, {}), InvalidValue)
    assert said.startswith(f"{key} = {value} (from file {file}): ")


def test_an_ill_typed_variable_is_named_with_what_is_allowed() -> None:
    said = message(lambda: load_config(None, {"LINESHAFT_CACHE__PAGES": "many"}, {"model": "m"}), InvalidValue)
    assert "cache.pages = 'many' (from variable LINESHAFT_CACHE__PAGES)" in said
    assert "valid integer" in said


@pytest.mark.parametrize(
    ("variables", "options", "parts"),
    [
        ({"LINESHAFT_BAKEND": "x"}, {}, ("bakend", "variable LINESHAFT_BAKEND", "did you mean LINESHAFT_BACKEND?")),
        ({"LINESHAFT_CACHE__PAGESIZE": "1"}, {}, ("cache.pagesize", "did you mean LINESHAFT_CACHE__PAGE_SIZE?")),
        ({"LINESHAFT_CACHE_PAGES": "1"}, {}, ("cache_pages", "did you mean LINESHAFT_CACHE__PAGES?")),
        ({"LINESHAFT_SCHEDULER_MAXROWS": "1"}, {}, ("did you mean LINESHAFT_SCHEDULER__MAX_ROWS?",)),
        ({"LINESHAFT_BACKEND_OPTIONS_PROGRAM": "1"}, {}, ("did you mean LINESHAFT_BACKEND_OPTIONS__PROGRAM?",)),
        ({}, {"cache_pages": "1"}, ("option cache_pages", "did you mean cache.pages?")),
        ({}, {"layout.zz": "1"}, ("layout.zz", "option layout.zz", "allowed here: dp, pp, cp, ep, tp")),
        ({}, {"cahce": {}}, ("cahce", "did you mean cache?")),
    ],
)
def test_an_unknown_key_comes_with_its_source_and_the_nearest(
    variables: dict[str, str], options: dict[str, object], parts: tuple[str, ...]
) -> None:
    said = message(lambda: load_config(None, {"LINESHAFT_MODEL": "m"} | variables, options), UnknownKey)
    assert all(part in said for part in parts), said


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "m"\n[sceduler]\nmax_rows = 1\n')
    said = message(lambda: load_config(file, {}, {}), UnknownKey)
    assert f"sceduler.max_rows (from file {file})" in said
    assert "did you mean scheduler?" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "-1"),
        ("top_p", "0"),
        ("top_p", "5"),
        ("top_k", "-2"),
    ],
)
def test_a_sampling_default_that_no_request_could_have_is_refused(key: str, value: str) -> None:
    said = message(lambda: load_config(None, {}, {"model": "m", f"sampling.{key}": value}), InvalidValue)
    assert f"sampling.{key} = '{value}'" in said


def test_no_model_says_how_to_set_one() -> None:
    assert "LINESHAFT_MODEL" in message(lambda: load_config(None, {}, {}), InvalidValue)


def test_a_file_that_is_missing_or_no_toml_is_one_line(tmp_path: Path) -> None:
    assert "cannot read" in message(lambda: load_config(tmp_path / "none.toml", {}, {}), ConfigError)
    assert "cannot read" in message(lambda: load_config(tmp_path, {}, {}), ConfigError)
    assert "is not TOML" in message(lambda: load_config(toml(tmp_path, "a = = 1"), {}, {}), ConfigError)
    assert "is not TOML" in message(lambda: load_config(toml(tmp_path, f"a = {'[' * 10_000}"), {}, {}), ConfigError)
    (tmp_path / "latin.toml").write_bytes(b"model = '\xff'")
    assert "is not TOML" in message(lambda: load_config(tmp_path / "latin.toml", {}, {}), ConfigError)


def test_only_variables_of_lineshaft_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINESHAFT_BACKEND", "x")
    monkeypatch.setenv("LINE", "y")
    assert environment()["LINESHAFT_BACKEND"] == "x"
    assert all(name.startswith("LINESHAFT_") for name in environment())


def test_a_configuration_cannot_be_changed() -> None:
    config = make_config(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


keys = st.sampled_from(
    ["model", "seed", "cache", "cache.pages", "kernels", "kernels.a", "backend_options.x.y", "q", ""]
)
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just({}), st.lists(st.integers())
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_whatever_is_given_it_loads_or_raises_one_line(options: dict[str, object]) -> None:
    try:
        config = load_config(None, {"LINESHAFT_MODEL": "m"}, options)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert EngineConfig.model_validate(config.model_dump()) == config
