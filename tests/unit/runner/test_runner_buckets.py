"""Buckets cover every step that the limits allow, no other is made, and the cheapest one is taken."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.config import make_config
from lineshaft.runner.buckets import Need, fit, make_shapes, padding_share, powers_of_two
from lineshaft.runner.pack import need_of
from lineshaft.runner.programs import all_programs
from lineshaft.runner.setup import make_limits
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, Limits, Request, Scheduler
from lineshaft_contract.backends import Capabilities
from lineshaft_contract.steps import StepShape

ONE_PROMPT_A_STEP = Capabilities(
    token_buckets=(32, 64, 128), row_buckets=(1, 2, 4, 8, 16), max_prefill_rows=1, mixed_steps=False
)


def limits_of(capabilities: Capabilities, longest: int = 400, dp: int = 1, **scheduler: int) -> Limits:
    model: Any = SimpleNamespace(max_position=longest)
    return make_limits(make_config(model="m", scheduler=scheduler, layout={"dp": dp}), capabilities, model)


def holds(shape: StepShape, need: Need) -> bool:
    return all(getattr(shape, name) >= getattr(need, name) for name in ("tokens", "rows", "logits", "max_query"))


# ---- every step has a bucket ---------------------------------------------------------------------------------------

sizes = st.integers(1, 60)
tables = st.none() | st.sets(sizes, min_size=1, max_size=4).map(tuple)
any_capabilities = st.builds(
    Capabilities, token_buckets=tables, row_buckets=tables, max_prefill_rows=st.none() | st.integers(1, 4),
    mixed_steps=st.booleans(), max_query=st.none() | sizes,
)  # fmt: skip
prompts = st.lists(st.tuples(st.integers(1, 70), st.booleans()), min_size=1, max_size=8)


def batches(limits: Limits, given: list[tuple[int, bool]], max_tokens: int = 6) -> list[Batch]:
    """All steps of requests with so many tokens, some of them scored."""
    engine, found = Scheduler(limits, CacheManager([GroupSpec(400, 4)])), []
    for number, (length, scored) in enumerate(given):
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
        prompt = tuple(range(100 * number, 100 * number + min(length, limits.max_model_len - 1)))
        engine.add(Request(number, prompt, params))
    while engine.has_work:
        found.append(engine.schedule())
        engine.commit(found[-1], [7] * found[-1].samples)
    return found


@settings(max_examples=300, deadline=None)
@given(can=any_capabilities, budget=sizes, rows=sizes, longest=st.integers(2, 80), given_prompts=prompts)
def test_every_step_that_the_scheduler_plans_has_a_bucket(
    can: Capabilities, budget: int, rows: int, longest: int, given_prompts: list[tuple[int, bool]]
) -> None:
    limits = limits_of(can, longest, token_budget=max(budget, rows), max_rows=rows)
    shapes = make_shapes(can, limits, (4,))
    for batch in batches(limits, given_prompts):
        need = need_of(batch.rows)
        shape = fit(shapes, need)
        assert holds(shape, need)
        assert not any(other.tokens < shape.tokens and holds(other, need) for other in shapes)


@settings(max_examples=150, deadline=None)
@given(can=any_capabilities, budget=sizes, rows=sizes, loads=st.tuples(prompts, prompts))
def test_steps_of_replicas_have_a_bucket_that_holds_both(
    can: Capabilities, budget: int, rows: int, loads: tuple[list[tuple[int, bool]], list[tuple[int, bool]]]
) -> None:
    limits = limits_of(can, 80, dp=2, token_budget=max(budget, rows), max_rows=rows)
    shapes = make_shapes(can, limits, (4,), replicas=2)
    first, second = (batches(limits, load) for load in loads)
    for one in first:
        for other in second:
            need = need_of(one.rows).join(need_of(other.rows))
            assert holds(fit(shapes, need), need)


@settings(max_examples=200, deadline=None)
@given(can=any_capabilities, data=st.data())
def test_some_bucket_holds_every_mix_within_the_limits(can: Capabilities, data: st.DataObject) -> None:
    """Also those that few schedules reach."""
    rows = data.draw(st.integers(1, 40))
    limits = limits_of(can, 100, token_budget=data.draw(st.integers(rows, 300)), max_rows=rows)
    shapes, longest = make_shapes(can, limits, (4,)), min(limits.chunk, limits.max_model_len)
    many = limits.max_prefill_rows or limits.max_rows
    prefills = data.draw(st.integers(0, min(many, limits.max_rows)))
    decodes = data.draw(st.integers(0, limits.max_rows - prefills)) if limits.mixed_steps or not prefills else 0
    room = limits.token_budget - decodes
    lengths = [data.draw(st.integers(1, longest)) for _ in range(prefills)]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    scored = data.draw(st.booleans()) and lengths and lengths[0] + decodes + len(lengths) - 1 <= limits.max_rows
    logits = decodes + len(lengths) + (lengths[0] - 1 if scored else 0)
    need = Need(decodes + sum(lengths), decodes + prefills, logits, max([*lengths, min(decodes, 1)]))
    assert holds(fit(shapes, need), need)


def test_a_lone_decode_takes_one_token_and_a_lone_prompt_one_row_of_logits() -> None:
    shapes = make_shapes(Capabilities(), limits_of(Capabilities(), token_budget=512, max_rows=32), (8,))
    assert fit(shapes, Need(1, 1, 1, 1)).tokens == 1
    prompt = fit(shapes, Need(40, 1, 1, 40))
    assert (prompt.tokens, prompt.logits) == (64, 1)


# ---- no bucket is made for nothing ---------------------------------------------------------------------------------


def test_one_prompt_a_step_needs_prefill_buckets_of_one_row_and_one_for_scored_prompts() -> None:
    shapes = make_shapes(ONE_PROMPT_A_STEP, limits_of(ONE_PROMPT_A_STEP, max_rows=16), (8,))
    decode = [(n, n, n, 1) for n in (1, 2, 4, 8, 16)]
    prefill = [(32, 1, 1, 32), (32, 1, 16, 32), (64, 1, 1, 64), (128, 1, 1, 128)]
    assert [(s.tokens, s.rows, s.logits, s.max_query) for s in shapes] == [*decode, *prefill]


def test_a_prefill_bucket_has_one_row_where_the_decode_table_begins_at_more() -> None:
    can = Capabilities(row_buckets=(4, 8), token_buckets=(16, 32), max_prefill_rows=1, mixed_steps=False)
    shapes = make_shapes(can, limits_of(can, max_rows=8), (8,))
    assert {s.rows for s in shapes if s.max_query > 1} == {1}
    assert {s.rows for s in shapes if s.max_query == 1} == {4, 8}


@pytest.mark.parametrize(("most", "rows"), [(1, {1}), (3, {1, 3}), (100, {1, 16}), (None, {1, 16})])
def test_prefill_buckets_have_no_more_rows_than_a_prefill_step(most: int | None, rows: set[int]) -> None:
    can = Capabilities(max_prefill_rows=most, mixed_steps=False)
    shapes = make_shapes(can, limits_of(can, max_rows=16), (8,))
    assert {s.rows for s in shapes if s.max_query > 1} == rows


def test_steps_that_mix_and_replicas_need_prefill_buckets_of_all_rows() -> None:
    mixed = Capabilities(max_prefill_rows=1)
    for can, replicas in ((mixed, 1), (ONE_PROMPT_A_STEP, 2)):
        shapes = make_shapes(can, limits_of(can, max_rows=16, dp=replicas), (8,), replicas)
        assert {s.rows for s in shapes if s.max_query > 1} == {1, 16}


def test_a_prefill_bucket_is_no_longer_than_its_rows_can_be() -> None:
    shapes = make_shapes(Capabilities(), limits_of(Capabilities(), 100, token_budget=512, max_rows=4), (8,))
    assert [s.tokens for s in shapes if s.max_query > 1 and s.rows == 1] == [16, 32, 64, 100]
    assert [s.tokens for s in shapes if s.max_query > 1 and s.rows == 4] == [16, 32, 64, 128, 256, 400]
    assert max(s.max_query for s in shapes) == 100


# ---- the tables of a backend ---------------------------------------------------------------------------------------


def test_the_tables_of_a_backend_are_used_and_cut_at_the_limits() -> None:
    can = Capabilities(token_buckets=(128, 256, 4096), row_buckets=(4, 8, 64))
    shapes = make_shapes(can, limits_of(can, token_budget=512, max_rows=16), (8,))
    assert {s.tokens for s in shapes if s.max_query > 1} == {128, 256, 512}
    assert {s.rows for s in shapes if s.max_query == 1} == {4, 8, 16}


@settings(max_examples=100, deadline=None)
@given(can=any_capabilities, budget=sizes, rows=sizes)
def test_no_bucket_is_larger_than_the_largest_of_a_backends_table(can: Capabilities, budget: int, rows: int) -> None:
    shapes = make_shapes(can, limits_of(can, token_budget=max(budget, rows), max_rows=rows), (8,))
    for shape in shapes:
        assert shape.max_query == 1 or shape.tokens <= max(can.token_buckets or (60,))
        assert shape.rows <= max(can.row_buckets or (60,))
        assert shape.max_query <= (can.max_query or 60)


def test_a_prompt_longer_than_the_longest_bucket_is_computed_in_chunks() -> None:
    limits = limits_of(ONE_PROMPT_A_STEP, token_budget=512, max_rows=8)
    shapes = make_shapes(ONE_PROMPT_A_STEP, limits, (8,))
    needs = [need_of(batch.rows) for batch in batches(limits, [(300, False)])]
    assert [need.tokens for need in needs] == [128, 128, 44, 1, 1, 1, 1, 1]
    assert [fit(shapes, need).tokens for need in needs] == [128, 128, 64, 1, 1, 1, 1, 1]


def test_more_sequences_may_decode_than_the_longest_prefill_bucket_has_tokens() -> None:
    can = Capabilities(token_buckets=(16,), row_buckets=(8, 64), max_prefill_rows=1, mixed_steps=False)
    limits = limits_of(can, token_budget=128, max_rows=64)
    assert (limits.max_rows, limits.chunk) == (64, 16)
    assert max(batch.tokens for batch in batches(limits, [(3, False)] * 40, 50)) > 16
    assert limits_of(can, dp=2, token_budget=128, max_rows=64).max_rows == 16, "replicas decode beside a prefill"


def test_limits_are_lowered_to_the_tables() -> None:
    can = Capabilities(token_buckets=(16, 32), row_buckets=(4, 8))
    limits = limits_of(can, token_budget=512, max_rows=100)
    assert (limits.token_budget, limits.max_rows, limits.chunk) == (32, 8, 32)
    limits = limits_of(Capabilities(token_buckets=(16, 4)), token_budget=512, max_rows=100)
    assert (limits.token_budget, limits.max_rows) == (16, 16)


def test_powers_of_two_end_at_the_last_value() -> None:
    assert powers_of_two(1, 6) == (1, 2, 4, 6)
    assert powers_of_two(8, 8) == (8,)


def test_programs_come_largest_first_so_that_later_ones_share_the_memory_of_earlier_ones() -> None:
    model: Any = SimpleNamespace(shape=SimpleNamespace(vocab=9), forward=None)
    for can in (Capabilities(), Capabilities(token_buckets=(128, 256), row_buckets=(4, 8, 64)), ONE_PROMPT_A_STEP):
        shapes = make_shapes(can, limits_of(can, token_budget=512, max_rows=16), (8,))
        tokens = [program.shape.tokens for program in all_programs(model, shapes, "float32", 4, extras=True)]
        assert tokens == sorted(tokens, reverse=True) and tokens[0] == max(can.token_buckets or (512,))


# ---- padding -------------------------------------------------------------------------------------------------------


@given(table=st.sets(sizes, min_size=1), data=st.data())
def test_the_padding_share_is_what_counting_gives(table: set[int], data: st.DataObject) -> None:
    ascending = sorted(table)
    weights = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=ascending[-1]).filter(any))
    real = sum(length * weight for length, weight in enumerate(weights, start=1))
    padded = sum(min(n for n in table if n >= length) * weight for length, weight in enumerate(weights, start=1))
    assert padding_share(ascending, weights) == pytest.approx(float(1 - Fraction(real, padded)), abs=1e-12)


def test_the_padding_share_of_a_few_tables() -> None:
    assert padding_share([1, 2, 3], [1, 1, 1]) == 0
    assert padding_share([4], [0, 0, 0, 5]) == 0
    assert padding_share([4], [1, 1, 1, 1]) == pytest.approx(1 - 10 / 16)
    assert padding_share([128, 256, 512], [1] * 512) == pytest.approx(1 - 256.5 / 352)
