"""Levels 4 and 5: right backends pass, broken ones do not, and every scenario does what it is named for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest

from lineshaft.config import make_config
from lineshaft.models import builtin_families, find_family
from lineshaft.runner.messages import ChoiceMessage, StepMessage
from lineshaft_conformance.checks import Check, Failure, Found, NotClaimed
from lineshaft_conformance.harness.rank import make_worker, mesh_executor
from lineshaft_conformance.harness.replay import compare_step
from lineshaft_conformance.harness.stage import Stage
from lineshaft_conformance.harness.timed import interleaved
from lineshaft_conformance.harness.tiny import FEATURED, TENSORS, TINY, tiny
from lineshaft_conformance.harness.watched import Step
from lineshaft_conformance.levels import determinism, engine, speed
from lineshaft_conformance.levels.engine import SCENARIOS, Scenario, make_check
from lineshaft_conformance.mutants.engine import MUTANTS
from lineshaft_conformance.mutants.kill import TARGET
from lineshaft_conformance.mutants.mutant import changed
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.steps import HostStep, StepShape, forward_inputs, sample_inputs

SEED = 3
KILLS = {mutant.name: mutant for mutant in MUTANTS}
IN_A_SECOND = [name for name in KILLS if name.startswith("engine-")]


@pytest.fixture(scope="module", params=["cpu", "numpy"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    made = Subject(Target(request.param))
    yield made
    made.close()


@pytest.fixture(scope="module")
def cpu() -> Iterator[Subject]:
    made = Subject(Target("cpu"))
    yield made
    made.close()


def run_all(subject: Subject, pattern: str) -> list[Found]:
    """Every smoke check whose id matches; there is one."""
    found = [
        check.run(subject, SEED)
        for theme in (engine, determinism, speed)
        for check in theme.checks(subject, "smoke")
        if fnmatch(check.id, pattern)
    ]
    assert found
    return found


# ---- level 4 -----------------------------------------------------------------------------------------------------


def test_each_scenario_passes(subject: Subject) -> None:
    for i, scenario in enumerate(SCENARIOS):
        found = make_check(list(TINY)[i % len(TINY)], scenario, "float32").run(subject, SEED)
        assert found.kernels and found.notes and len(found.outputs) > 1
        (deviation,) = found.deviations
        assert 0 < deviation.l2 <= deviation.l2_allowed and deviation.linf <= deviation.linf_allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_pass(cpu: Subject, dtype: str) -> None:
    assert make_check("llama-gqa8", SCENARIOS[2], dtype).run(cpu, SEED).deviations


def test_a_dtype_that_is_not_claimed_is_not_checked(cpu: Subject) -> None:
    with pytest.raises(NotClaimed, match="bfloat16, float32, float64"):
        make_check("llama-gqa1", SCENARIOS[0], "float16").run(cpu, SEED)


def test_every_architecture_of_core_has_a_tiny_model() -> None:
    families = builtin_families()
    configs = [*TINY.values(), *FEATURED.values()]
    assert {find_family(config, families).name for config in configs} == {family.name for family in families}
    assert {config["model_type"] for config in configs} <= TENSORS.keys()


class Lacking(Subject):
    """The CPU backend with kernels for the required ops and no feature."""

    def start(self, world: World) -> Any:
        def plain(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
            ops = self.ops
            return [replace(kernel, handles=frozenset()) for kernel in kernels if ops[kernel.op].required]

        return changed(super().start(world), change_kernels=plain)


@pytest.mark.parametrize("name", FEATURED)
def test_a_model_of_ops_that_a_backend_may_lack_passes_or_is_not_claimed(cpu: Subject, name: str) -> None:
    assert run_all(cpu, f"L4/{name}/*")
    lacking = Lacking(Target("cpu"))
    if name in ("qwen3", "phi3"):  # made of required ops
        assert run_all(lacking, f"L4/{name}/*")
    else:
        with pytest.raises(NotClaimed, match="no kernel for"):
            run_all(lacking, f"L4/{name}/*")
    lacking.close()


def test_ids_are_stable_and_unlike_each_other(cpu: Subject) -> None:
    checks: list[Check] = [check for theme in (engine, determinism, speed) for check in theme.checks(cpu, "full")]
    ids = [check.id for check in checks]
    assert len(set(ids)) == len(ids) and "L4/llama-gqa1/chunks-float32" in ids
    assert all(check.level == (4 if "L4" in check.id else 5) and check.rule for check in checks)
    smoke = {check.id for check in engine.checks(cpu, "smoke")}
    assert smoke < set(ids)


def test_a_scenario_that_does_not_come_about_fails(cpu: Subject) -> None:
    """With pages enough nobody is preempted; with no prefix cache nothing is shared."""
    roomy = replace(next(s for s in SCENARIOS if s.name == "preemption"), settings=lambda page: {})
    alone = replace(
        next(s for s in SCENARIOS if s.name == "prefixes"), settings=lambda page: {"cache.prefix_caching": False}
    )
    for scenario in (roomy, alone):
        with pytest.raises(Failure, match="did not come about"):
            make_check("llama-gqa1", scenario, "float32").run(cpu, SEED)


def test_pages_in_use_at_the_end_are_lost(cpu: Subject) -> None:
    def leave(stage: Stage) -> None:
        stage.add(stage.prompt(5), 3)
        stage.finish()
        stage.engine.caches[0].open(99, stage.prompt(5))
        stage.engine.caches[0].extend(99, 5)

    with pytest.raises(Failure, match="still held"):
        make_check("llama-gqa1", Scenario("leave", leave), "float32").run(cpu, SEED)


def test_what_no_step_may_read_holds_nan() -> None:
    cpu = Subject(TARGET)  # whose engine schedules no step ahead
    with Stage(cpu, tiny(cpu, "llama-gqa1", SEED), "float32", SEED, 4) as stage:
        stage.add(stage.prompt(6), 2)
        stage.step()
        cache, session = stage.engine.caches[0], stage.watched.worker.session
        unused = np.array([0, *cache.unused_pages()], np.int32)
        held = [page for page in range(96) if page not in unused]
        stage.watched.submit([stage.steps[-1].message])
        assert len(held) == 2
        assert all(np.isnan(pages).all() for pages in session.read_pages(1, unused[1:]).values())
        found = session.read_pages(1, np.array(held, np.int32))["k"].reshape(8, -1)
        assert sorted(np.isnan(found).any(1)) == [False] * 6 + [True] * 2  # six tokens, and two slots past them
        stage.finish()


@pytest.mark.parametrize("name", IN_A_SECOND)
def test_a_wrong_engine_dies_at_level_4(name: str) -> None:
    broken = Subject(replace(TARGET, mutant=name))
    with pytest.raises(Failure):
        run_all(broken, KILLS[name].checks)
    broken.close()


# ---- comparing ---------------------------------------------------------------------------------------------------


def make_step(logits: Any, tokens: Any, sampling: HostStep | None = None) -> Step:
    shape = StepShape(tokens=4, rows=2, pages=(1,), logits=2, max_query=2)
    host = HostStep(forward_inputs(shape))
    host["query_starts"][:], host["logit_rows"][:] = [0, 2, 4], [1, 3]
    return Step(
        StepMessage(shape, host, np.zeros((0, 3), np.int32)), ChoiceMessage(sampling),
        np.array(tokens, np.int32), np.array(logits, np.float32), None,
    )  # fmt: skip


EXACT = np.array([[0.0, 1, 2, 3], [3, 2, 1, 0]])


@pytest.mark.parametrize(
    ("logits", "tokens", "wrong"),
    [
        (EXACT, [3, 0], ""),
        (EXACT + 1e-7, [3, 0], ""),
        (EXACT + np.array([[0], [1e-4]]), [3, 0], "row 1: L2"),
        (EXACT + np.array([[0, 0, 0, np.nan], [0] * 4]), [3, 0], "row 0: L2 error of the logits nan"),
        (EXACT, [3, 1], "row 1: token 1, its own logits give 0"),
        (EXACT[::-1], [0, 3], "row 0: the likeliest token is 0, the reference's is 3"),
    ],
)
def test_a_step_is_compared_row_by_row(logits: Any, tokens: list[int], wrong: str) -> None:
    found = compare_step(make_step(logits, tokens), EXACT, EXACT, "float32", 16)
    assert wrong in found.wrong if wrong else not found.wrong
    assert (found.rows, found.decided) == (2, 2)


def test_a_drawn_token_is_the_one_of_its_own_number() -> None:
    sampling = HostStep(sample_inputs(2))
    sampling["temperature"][:], sampling["u"][:, 0] = 1, [0.01, 0.99]
    flat = np.zeros((2, 4))
    assert not compare_step(make_step(flat, [0, 3], sampling), flat + 1e-9, flat, "float32", 16).wrong
    assert "row 1: token 0" in compare_step(make_step(flat, [0, 0], sampling), flat + 1e-9, flat, "float32", 16).wrong
    sampling["u"][:, 0] = 0.5  # on a border either neighbour is right
    assert not compare_step(make_step(flat, [1, 2], sampling), flat + 1e-9, flat, "float32", 16).wrong


def test_padding_rows_of_logits_are_left_out() -> None:
    step = make_step(EXACT, [3, 0])
    assert step.live == 2 and [row.count for row in step.rows(4)] == [2, 2]
    step.message.forward["logit_rows"][:] = [1, 0]
    assert step.live == 1


# ---- level 5 -----------------------------------------------------------------------------------------------------


def test_a_run_repeats_itself(subject: Subject) -> None:
    (found,) = run_all(subject, "L5/determinism/run")
    assert all(" 0 of 48 " in note for note in found.notes)


def test_what_is_not_claimed_is_told_apart_from_what_does_not_hold(cpu: Subject) -> None:
    for name in ("batch", "device"):
        with pytest.raises(NotClaimed, match=r"not claimed by Capabilities\.determinism"):
            determinism.check(name, cpu, SEED)


@pytest.mark.parametrize(
    "name", ["determinism-noise", "determinism-none", "determinism-boasts-chunk", "determinism-boasts-device"]
)
def test_a_false_claim_of_determinism_dies(name: str) -> None:
    broken = Subject(replace(TARGET, mutant=name))
    with pytest.raises(Failure, match=r"Capabilities\.determinism"):
        run_all(broken, KILLS[name].checks)
    broken.close()


def test_a_worker_in_a_process_starts_the_mutant(cpu: Subject) -> None:
    config = make_config(model=str(tiny(cpu, "llama-gqa1", SEED)), backend="cpu")
    assert not make_worker("determinism-none", config, 0, "").setup.backend.capabilities.determinism.run
    assert make_worker("", config, 0, "").setup.backend.capabilities.determinism.run


def test_a_worker_in_a_process_gives_the_same_bits(cpu: Subject) -> None:
    bench = determinism.Bench(cpu, "float32", SEED)
    here, there = bench.run([1]), bench.run([1], mesh_executor)
    assert len(here) == determinism.TOKENS and here.keys() == there.keys()
    assert all(here[key].tobytes() == there[key].tobytes() for key in here)


def test_unused_capacity_costs_no_time(cpu: Subject) -> None:
    (found,) = run_all(cpu, "L5/speed/unused/vocabulary")
    assert "eight times the size" in found.notes[0]
    broken = Subject(replace(TARGET, mutant="speed-whole-vocabulary"))
    with pytest.raises(Failure, match="times as long"):
        run_all(broken, "L5/speed/unused/vocabulary")
    broken.close()


@pytest.mark.parametrize("check", ["roofline/add", "roofline/decode"])
def test_an_interpreter_reaches_no_roofline_and_claims_none(cpu: Subject, check: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotClaimed, match="TRITON_INTERPRET=1 is set: an interpreter's times"):
        run_all(cpu, f"L5/speed/{check}")


def test_interleaved_runs_take_turns() -> None:
    order: list[str] = []
    taken = interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["a", "b"] * 4 and len(taken) == 2 and min(taken) > 0
