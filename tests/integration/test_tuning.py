"""Kernels of a plugin that are equally good: rank 0 measures them before capture, and only once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import config, drive, greedy
from tests.integration.processes import lineshaft

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.errors import Unsupported
from lineshaft.explain import explain
from lineshaft.plan import Plan
from lineshaft.plan.tuning import settle
from lineshaft.registry import discover
from lineshaft.runner.setup import choices_file, make_setup
from lineshaft.runner.worker import Worker
from lineshaft_contract.backends import Probe
from lineshaft_contract.kernels import Kernel

RIVALS = Path(__file__).parent / "rivals"
LATE = 0.003
PROMPT = [[1, 2, 3]]


@pytest.fixture
def rivals(install: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Llama) -> Any:
    """A configuration of the CPU backend with the plugin `rivals` and a cache folder of the test's own."""
    install(RIVALS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small: dict[str, Any] = {
        "max_model_len": 32, "cache.pages": 13, "cache.page_size": 8, "scheduler.token_budget": 16,
        "backend_options.engine": "torch",
    }  # fmt: skip
    return partial(config, llama("even").path, **small)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a measurement is an error."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("measured again")

    return lambda: monkeypatch.setattr("lineshaft.runner.setup.settle", refuse)


def norms(plan: Plan) -> set[str]:
    return {entry.kernel for entry in plan.entries if entry.op == "rms_norm"}


def run(settings: EngineConfig) -> tuple[Plan, list[list[int]]]:
    with Engine(settings) as engine:
        return engine.plan, drive(engine, PROMPT, greedy(4), look=False).tokens


def test_the_fast_one_is_chosen_and_the_next_start_knows(rivals: Any, unmeasured: Callable[[], None]) -> None:
    before = explain(rivals())
    assert norms(before) == {"rivals_a"} and {str(c) for c in before.choices.values()} == {"not measured"}
    first, tokens = run(rivals())
    assert norms(first) == {"rivals_b"} and len(first.choices) == len(before.choices) > 1
    for choice in first.choices.values():
        assert choice.seconds["rivals_b"] < LATE <= choice.seconds["rivals_a"]
    unmeasured()
    second, again = run(rivals())
    assert second == first and again == tokens
    assert explain(rivals()) == first
    named, _ = run(rivals(**{"kernels.rms_norm": "rivals_a"}))
    assert norms(named) == {"rivals_a"} and not named.choices and named.hash != first.hash
    off, _ = run(rivals(tuning="off"))
    assert norms(off) == {"rivals_a"} and off.hash == before.hash


def test_fresh_measures_at_each_start(rivals: Any, unmeasured: Callable[[], None]) -> None:
    run(rivals())
    unmeasured()
    with pytest.raises(AssertionError, match="measured again"):
        run(rivals(tuning="fresh"))


def test_ranks_agree_with_rank_0_whatever_they_would_measure(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = rivals(**{"layout.tp": 2})
    with Engine(settings) as engine:
        sizes = engine._executor.size()
        assert [norms(size.plan) for size in sizes] == [{"rivals_b"}] * 2 and len(engine.plan.choices) > 1
        assert sizes[0].plan.choices == sizes[1].plan.choices
        assert len(drive(engine, PROMPT, greedy(4), look=False).tokens[0]) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    other = Worker(rivals(**{"layout.tp": 2, "tuning": "off"}), rank=1)
    session = partial(other.setup.backend.session, 1)
    alone = settle(other.planned.ties, session, other.setup.checkpoint)
    assert {choice.kernel for choice in alone.values()} == {"rivals_a"}


@pytest.mark.parametrize("tp", [1, 2])
def test_all_broken_is_an_error_that_names_them(rivals: Any, monkeypatch: pytest.MonkeyPatch, tp: int) -> None:
    monkeypatch.setenv("RIVALS_BROKEN", "rivals_a rivals_b")
    with pytest.raises(Unsupported, match=r"rms_norm .*rivals_a raises .*is broken; rivals_b raises .*is broken"):
        Engine(rivals(**{"layout.tp": tp}))


def test_a_broken_one_is_left_out(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVALS_BROKEN", "rivals_b")
    plan, _ = run(rivals())
    assert norms(plan) == {"rivals_a"}
    (reason,) = {r.reason for entry in plan.entries for r in entry.rejected if r.kernel == "rivals_b"}
    assert "RuntimeError" in reason and "rivals_b is broken" in reason


def test_without_a_cache_folder_a_start_warns_and_measures(
    rivals: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    plan, _ = run(rivals())
    assert norms(plan) == {"rivals_b"}
    assert any("measured at each start" in record.getMessage() for record in caplog.records)


def test_a_damaged_file_is_measured_anew(
    rivals: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, unmeasured: Callable[[], None]
) -> None:
    run(rivals())
    (file,) = (tmp_path / "cache" / "lineshaft" / "tuning").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    plan, _ = run(rivals())
    assert norms(plan) == {"rivals_b"}
    assert any("measured anew" in record.getMessage() for record in caplog.records)
    unmeasured()
    assert norms(run(rivals())[0]) == {"rivals_b"}


def test_what_decides_a_choice_names_its_file(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = discover()
    kernels = registry.kernels("cpu")

    def file(settings: EngineConfig, *given: Kernel) -> Path | None:
        return choices_file(settings, make_setup(settings, registry), given)

    base = file(rivals(), *kernels)
    assert base is not None and base == file(rivals(), *reversed(kernels)) == file(rivals(max_model_len=64), *kernels)
    assert file(rivals(), *(replace(kernel, tunable=False) for kernel in kernels)) is None
    assert file(rivals(tuning="off"), *kernels) is None
    others = [
        file(rivals(), *kernels[:1]),
        file(rivals(), replace(kernels[0], version="2"), kernels[1]),
        file(rivals(), replace(kernels[0], options={"tile": "64"}), kernels[1]),
        file(rivals(threads=2), *kernels),
        file(rivals(**{"backend_options.program": "eager"}), *kernels),
    ]
    monkeypatch.setattr("lineshaft.runner.setup.probe", lambda info: Probe(True, "another", ("another device",)))
    others.append(file(rivals(), *kernels))
    monkeypatch.setattr("lineshaft.runner.setup.distributions", list)
    others.append(file(rivals(), *kernels))
    assert len({base, *others}) == 1 + len(others)


def test_explain_tells_the_times(rivals: Any, tmp_path: Path) -> None:
    settings = rivals()
    run(settings)
    values = {"max_model_len": 32, "cache.page_size": 8, "scheduler.token_budget": 16, "scheduler.max_rows": 4}
    given = [f"--set={key}={value}" for key, value in {**values, "max_logprobs": 0}.items()]
    model = ["--model", settings.model, "--backend", "cpu", "--dtype", "float32", "--set=sampling_extras=false"]
    model += ["--backend-option", "engine=torch"]
    done = lineshaft("explain", "--shapes", *model, *given)
    assert done.returncode == 0, done.stderr
    (row, *_) = [line for line in done.stdout.splitlines() if " rivals_a " in line and " ms" in line]
    assert row.startswith("rms_norm ") and "rivals_b " in row
    assert "rivals_a: rivals_b was not slower" in done.stdout
    found = json.loads(lineshaft("explain", "--json", *model, *given).stdout)
    assert all(choice["seconds"]["rivals_a"] >= LATE for choice in found["choices"].values())
    assert found["hash"] == explain(settings).hash
