"""Buckets cover every step that the limits allow, and the cheapest one is taken."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lineshaft.runner.buckets import Need, fit, make_shapes, powers_of_two
from lineshaft.runner.programs import all_programs
from lineshaft_contract.backends import Capabilities


@given(budget=st.integers(1, 300), max_rows=st.integers(1, 40), data=st.data())
def test_some_bucket_holds_every_step_within_the_limits(budget: int, max_rows: int, data: st.DataObject) -> None:
    max_rows = min(max_rows, budget)
    shapes = make_shapes(Capabilities(), budget, max_rows, (4,))
    rows = data.draw(st.integers(1, max_rows))
    tokens = data.draw(st.integers(rows, budget))
    need = Need(tokens, rows, data.draw(st.integers(0, rows)), tokens - rows + 1)
    shape = fit(shapes, need)
    assert shape.tokens >= tokens and shape.rows >= rows and shape.max_query >= need.max_query
    assert not any(other.tokens < shape.tokens and fits(other, need) for other in shapes)


def fits(shape: object, need: Need) -> bool:
    return all(getattr(shape, name) >= getattr(need, name) for name in ("tokens", "rows", "logits", "max_query"))


def test_a_lone_decode_takes_one_token_and_a_lone_prompt_one_row_of_logits() -> None:
    shapes = make_shapes(Capabilities(), 512, 32, (8,))
    assert fit(shapes, Need(1, 1, 1, 1)).tokens == 1
    prompt = fit(shapes, Need(40, 1, 1, 40))
    assert (prompt.tokens, prompt.logits) == (64, 1)


def test_the_tables_of_a_backend_are_used_and_cut_at_the_limits() -> None:
    capabilities = Capabilities(token_buckets=(128, 256, 4096), row_buckets=(4, 8, 64))
    shapes = make_shapes(capabilities, 512, 16, (8,))
    assert {s.tokens for s in shapes if s.max_query > 1} == {128, 256, 512}
    assert {s.rows for s in shapes if s.max_query == 1} == {4, 8, 16}


def test_powers_of_two_end_at_the_last_value() -> None:
    assert powers_of_two(1, 6) == (1, 2, 4, 6)
    assert powers_of_two(8, 8) == (8,)


def test_programs_come_largest_first_so_that_later_ones_share_the_memory_of_earlier_ones() -> None:
    model: Any = SimpleNamespace(shape=SimpleNamespace(vocab=9), forward=None)
    for capabilities in (Capabilities(), Capabilities(token_buckets=(128, 256), row_buckets=(4, 8, 64))):
        shapes = make_shapes(capabilities, 512, 64, (8,))
        tokens = [program.shape.tokens for program in all_programs(model, shapes, "float32", 4, extras=True)]
        assert tokens == sorted(tokens, reverse=True) and tokens[0] == 512
