"""The CPU's attention against its reference on larger random steps, and its plan of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.cases import PagedStep, Paging, paged_step
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg
from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_cpu.attention import SPARE_KEYS, Planner, alike, attend
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.tensors import map_tensors

SPEC = all_ops()["attend"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem_of(paging: Paging, **fields: Any) -> AttendProblem:
    given = {"dtype": "bfloat16", "q_heads": 6, "kv_heads": 2, "qk_dim": 32, "v_dim": 32, "scale": 32**-0.5, **fields}
    return AttendProblem(
        kv_dtype=given["dtype"], page_size=paging.page_size, tokens=paging.tokens, rows=len(paging.lengths),
        pages=paging.columns, max_query=max(q for q, _ in paging.lengths), **given,
    )  # fmt: skip


def case_of(paging: Paging, paged: PagedStep, seed: int = 0, **fields: Any) -> Case:
    rng, problem = np.random.default_rng(seed), problem_of(paging, **fields)
    pages = {name: paged.fill(rng, (problem.kv_heads, 32)) for name in "kv"}
    kwargs = {"sinks": rng.standard_normal(problem.q_heads)} if problem.sinks else {}
    q = rng.standard_normal((paging.tokens, problem.q_heads, problem.qk_dim))
    return Case("random", problem, (q, CacheArg(pages), paged.step), kwargs)


def tensors_of(case: Case) -> tuple[torch.Tensor, Cache, StepInputs, dict[str, torch.Tensor]]:
    q, pages = (operand(value, case.problem) for value in case.args[:2])
    flat = {name: from_host(array).flatten(0, 1) for name, array in pages.items()}
    step = StepInputs(
        {name: from_host(array.copy()) for name, array in case.args[2].arrays.items()}, case.args[2].shape
    )
    kwargs = {name: from_host(operand(value, case.problem)) for name, value in case.kwargs.items()}
    return from_host(q), Cache(0, case.problem, "slots", flat), step, kwargs


def empty_like(step: StepInputs, columns: int) -> dict[str, torch.Tensor]:
    arrays = {name: torch.zeros_like(array) for name, array in step.arrays.items()}
    return {**arrays, "page_table.0": torch.zeros(3, columns, dtype=torch.int32)}


FEATURES = [{}, {"window": 9}, {"softcap": 5.0}, {"sinks": True}, {"return_lse": True}, {"causal": False}]


@pytest.mark.parametrize("fields", FEATURES, ids=lambda fields: next(iter(fields), "plain"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_random_mixed_steps_are_within_tolerance(fields: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(11)
    for seed in range(4):
        contexts = rng.integers(0, 150, 9)
        lengths = tuple((int(min(rng.choice([0, 1, 1, 1, 7, 40]), c)), int(c)) for c in contexts)
        paging = Paging((*lengths, (1, 33), (30, 30)), page_size=int(rng.choice([4, 16, 24])), padding=2)
        paged = paged_step(rng, paging)
        case = case_of(paging, paged, seed, dtype=dtype, **fields)
        q, cache, step, kwargs = tensors_of(case)
        got = attend(case.problem, Planner(case.problem), q, cache, step, **kwargs)
        assert not compare(SPEC, case, map_tensors(to_host, got)), (seed, lengths)


@torch.inference_mode()
def test_a_planner_follows_a_step_that_changes_in_place() -> None:
    rng = np.random.default_rng(2)
    first = Paging(((1, 40), (1, 7), (5, 25)), pool=40)
    second = Paging(((1, 41), (5, 12), (1, 70)), pool=40)
    planner: Planner | None = None
    static: StepInputs | None = None
    for paging in (first, second, first):
        paged = paged_step(rng, paging)
        case = case_of(paging, paged)
        case = replace(case, problem=replace(case.problem, pages=second.columns))
        q, cache, step, _ = tensors_of(case)
        planner = planner or Planner(case.problem)
        static = static or StepInputs(empty_like(step, second.columns), step.shape)
        for name, array in step.arrays.items():
            static.arrays[name].zero_()
            static.arrays[name][tuple(slice(n) for n in array.shape)].copy_(array)
        got = attend(case.problem, planner, q, cache, static)
        assert not compare(SPEC, case, to_host(got))


def test_an_unchanged_step_is_planned_once_for_all_layers() -> None:
    paging = Paging(((1, 40), (5, 25)))
    case = case_of(paging, paged_step(np.random.default_rng(0), paging))
    _, _, step, _ = tensors_of(case)
    planner = Planner(case.problem)
    plan = planner.plan(step, paging.tokens)
    assert planner.plan(step, paging.tokens) is plan
    step.groups[0].context_lens[0] -= 1
    assert planner.plan(step, paging.tokens) is not plan


def test_decode_rows_of_like_length_share_a_call() -> None:
    contexts = (1, 2, 3, 5, 8, 90, 100, 120, 500)
    paging = Paging(tuple((1, c) for c in contexts))
    case = case_of(paging, paged_step(np.random.default_rng(0), paging))
    plan = Planner(case.problem).plan(tensors_of(case)[2], paging.tokens)
    assert sum(rows.n for rows in plan.groups) == len(contexts)
    assert len(plan.groups) < len(contexts)
    for rows in plan.groups:
        if rows.pages is not None:
            gathered = len(rows.pages) * case.problem.page_size
            assert gathered - sum(contexts) < SPARE_KEYS + rows.n * case.problem.page_size


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_groups_cover_each_row_once_and_waste_little(lengths: list[int]) -> None:
    groups = list(alike([(keys, row) for row, keys in enumerate(lengths)]))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * max(lengths[r] for r in group) - sum(lengths[r] for r in group) <= SPARE_KEYS


def test_pages_in_a_row_are_read_without_a_gather() -> None:
    paging = Paging(((1, 40),))
    case = case_of(paging, paged_step(np.random.default_rng(0), paging))
    _, _, step, _ = tensors_of(case)
    step.groups[0].page_table[0, :3] = torch.tensor([2, 3, 4])
    (rows,) = Planner(case.problem).plan(step, 1).groups
    assert rows.slots == slice(32, 72) and rows.mask is None


@pytest.mark.parametrize("fields", [{}, {"window": 20}], ids=["plain", "window"])
@torch.inference_mode()
def test_keys_of_a_page_that_was_given_back_are_seen_by_none(fields: dict[str, Any]) -> None:
    paging = Paging(((1, 60), (9, 40), (1, 50), (20, 20), (1, 12)))
    paged = paged_step(np.random.default_rng(4), paging)
    table = paged.step.arrays["page_table.0"]
    table[0, 1] = table[1, 0] = table[3, 1] = table[4, 0] = 0
    case = case_of(paging, paged, **fields)
    q, cache, step, _ = tensors_of(case)
    assert not compare(SPEC, case, to_host(attend(case.problem, Planner(case.problem), q, cache, step)))
