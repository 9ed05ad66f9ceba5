"""Checks of backends whose sessions run several ranks: the JAX kit passes them, and a broken session does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lineshaft_tpu")

import jax

from lineshaft.errors import LayoutError
from lineshaft_conformance.checks import Failure, NotClaimed
from lineshaft_conformance.harness.rank import mesh_executor
from lineshaft_conformance.levels import collectives, load, ranks
from lineshaft_conformance.levels.determinism import Bench
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.backends import BackendInfo, Probe
from lineshaft_jax import session as sessions
from lineshaft_jax.mesh import coordinates_of
from lineshaft_jax.program import StepPending
from lineshaft_jax.session import JaxSession

jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]

TARGET = Target("tpu", {"platform": "cpu", "cache_dir": "off"})


@pytest.fixture
def subject() -> Iterator[Subject]:
    made = Subject(TARGET)
    yield made
    made.close()


def ran(subject: Subject, pattern: str) -> dict[str, str]:
    """What each check of the pattern said: "" for a pass."""
    said = {}
    for theme in (ranks, collectives):
        for check in theme.checks(subject, "smoke"):
            if fnmatch(check.id, f"L3/{pattern}"):
                try:
                    check.run(subject, 0)
                    said[check.id] = ""
                except (Failure, NotClaimed) as outcome:
                    said[check.id] = f"{type(outcome).__name__}: {outcome}"
    assert said
    return said


def test_a_right_session_passes_and_names_the_kernels_of_collectives(subject: Subject) -> None:
    said = ran(subject, "ranks/*") | ran(subject, "collectives/all_*/[tw]*-small-*f32")
    assert {id: reason for id, reason in said.items() if reason} == {}
    (check,) = (c for c in collectives.checks(subject, "smoke") if c.id.endswith("all_gather/tp4-small-dim0-bf16"))
    assert check.run(subject, 0).kernels == ("xla_all_gather",)


def test_a_backend_of_one_rank_a_session_has_no_such_checks() -> None:
    numpy = Subject(Target("numpy"))
    assert not list(ranks.checks(numpy, "full"))
    assert not [check for check in collectives.checks(numpy, "full") if "world8" in check.id]


def test_a_machine_of_too_few_devices_claims_no_mesh(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise LayoutError("4 ranks, 1 device")

    monkeypatch.setattr(sessions, "mesh_of", refuse)
    said = ran(subject, "ranks/own") | ran(subject, "collectives/permute/tp-small-shift1-f32")
    assert set(said.values()) == {"NotClaimed: this machine cannot hold the mesh: 4 ranks, 1 device"}


# ---- broken sessions ---------------------------------------------------------------------------------------------


def reversed_results(self: Any, name: str) -> Any:
    return right_results(self, name)[::-1]


def first_alone(self: Any, name: str) -> Any:
    return right_results(self, name)[:1]


def heads_by_page(self: Any, cache: int, ids: Any) -> Any:
    return {
        name: pages.reshape(*pages.shape[:2], self.ranks, -1, *pages.shape[3:]).swapaxes(2, 3).reshape(pages.shape)
        for name, pages in right_read(self, cache, ids).items()
    }


def written_to_others(self: Any, cache: int, ids: Any, pages: Any) -> Any:
    return right_write(self, cache, ids, {name: np.roll(values, 2, axis=2) for name, values in pages.items()})


def nothing_copied(self: Any, group: int, src: Any, dst: Any) -> Any:
    return right_copy(self, group, src, src)


def update_of_first(self: Any, weights: Any) -> Any:
    same = {name: np.stack([v[0]] * len(v)) if v.ndim > 2 else v for name, v in weights.items()}
    return right_update(self, same)


def update_of_any_shape(self: Any, weights: Any) -> Any:
    return right_update(self, {"v": np.stack([weights["v"]] * 4)} if weights.keys() == {"v"} else weights)


def update_half(self: Any, weights: Any) -> Any:
    right_update(self, {name: values for name, values in weights.items() if name == "w" and values.ndim == 2})
    return right_update(self, weights)


def everyone_the_first(world: Any) -> Any:
    return right_coordinates(world)[:1] * world.ranks


def without_replica(world: Any) -> Any:
    return [type(at)(**{**vars(at), "dp": 0}) for at in right_coordinates(world)]


def handle_of_first(self: Any, name: str) -> Any:
    handle = right_handle(self, name)
    parts = np.split(np.asarray(handle.array), handle.ranks)
    return type(handle)(self._session.placement.put_own(parts[:1] * handle.ranks), handle.ranks)


right_results, right_handle = StepPending.results, StepPending.handle
right_read, right_write, right_copy = JaxSession.read_pages, JaxSession.write_pages, JaxSession.copy_pages
right_update, right_coordinates = JaxSession.update, coordinates_of

BROKEN: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("own", StepPending, "results", reversed_results),
    ("equal", StepPending, "results", first_alone),
    ("pages", JaxSession, "read_pages", heads_by_page),
    ("pages", JaxSession, "write_pages", written_to_others),
    ("pages", JaxSession, "copy_pages", nothing_copied),
    ("update", JaxSession, "update", update_of_first),
    ("update", JaxSession, "update", update_of_any_shape),
    ("update", JaxSession, "update", update_half),
    ("own", sessions, "coordinates_of", everyone_the_first),
    ("handles", StepPending, "handle", handle_of_first),
]


@pytest.mark.parametrize(("check", "of", "name", "broken"), BROKEN, ids=lambda item: getattr(item, "__name__", None))
def test_a_broken_session_fails(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, check: str, of: Any, name: str, broken: Callable[..., Any]
) -> None:
    monkeypatch.setattr(of, name, broken)
    (said,) = ran(subject, f"ranks/{check}").values()
    assert said.startswith("Failure: ")


def test_a_second_replica_with_the_weights_of_the_first_fails(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "coordinates_of", without_replica)
    (check,) = (check for check in ranks.checks(subject, "smoke") if check.id == "L3/ranks/replicas")
    with pytest.raises(Failure, match="of rank 2 is not what its own weights"):
        check.run(subject, 0)


def test_ranks_that_answer_for_each_other_fail_collectives(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepPending, "results", reversed_results)
    (said,) = ran(subject, "collectives/all_gather/tp-small-dim0-f32").values()
    assert said.startswith("Failure: ")


# ---- what else a single program changes --------------------------------------------------------------------------


def test_two_ranks_in_one_program_give_the_logits_of_one(subject: Subject) -> None:
    bench = Bench(subject, "float32", 0)
    one = bench.run(range(3))
    for layout in ({"tp": 2}, {"dp": 2, "tp": 2}):
        several = bench.run(range(3), mesh_executor, layout=layout)
        assert several.keys() == one.keys()
        for key, logits in one.items():
            np.testing.assert_allclose(several[key], logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())


INFO = BackendInfo("tpu", "lineshaft_tpu.probe:probe", "", options="lineshaft_tpu.options:TpuOptions")


@pytest.mark.parametrize(
    ("unless", "said"), [({"platfrom": "cpu"}, "no option of the backend"), ({"platform": "host"}, "refuses")]
)
def test_a_probe_may_only_name_options_that_there_are(unless: dict[str, str], said: str) -> None:
    load._unless(INFO, Probe(False, "no device", unless={"platform": "cpu"}))
    with pytest.raises(Failure, match=said):
        load._unless(INFO, Probe(False, "no device", unless=unless))
