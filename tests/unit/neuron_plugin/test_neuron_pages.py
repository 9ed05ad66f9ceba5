"""Pages that compiled programs move: what a plain model in NumPy says, whatever the ids, the dtypes and the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.unit.neuron_plugin.static_sessions import kv

from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import KVProblem
from lineshaft_neuron import stand_in
from lineshaft_neuron.pages import PAGES
from lineshaft_torch.arrays import from_host
from lineshaft_torch.pages import page_view

COUNT = 60
PROBLEMS = [
    kv(kv_dtype="bfloat16"), kv(kv_dtype="float8_e4m3fn"), kv(kv_dtype="bfloat16"), kv(group=1, v_dim=0),
    kv(group=1, kv_dtype="int8", kv_scheme="token_head"),
]  # fmt: skip
Pages = dict[str, Any]


class Model:
    """Caches as arrays of NumPy."""

    def __init__(self, problems: list[KVProblem], pages: int) -> None:
        self.problems = problems
        self.held: list[Pages] = [drawn(problem, pages, None) for problem in problems]

    def read(self, cache: int, ids: Any) -> Pages:
        return {name: array[ids] for name, array in self.held[cache].items()}

    def write(self, cache: int, ids: Any, pages: Pages) -> None:
        for name, array in self.held[cache].items():
            for place, page in zip(ids, pages[name], strict=True):
                array[place] = page

    def copy(self, group: int, src: Any, dst: Any) -> None:
        for cache, problem in enumerate(self.problems):
            if problem.group == group:
                self.write(cache, dst, self.read(cache, src))


def drawn(problem: KVProblem, count: int, rng: np.random.Generator | None) -> Pages:
    """Pages of any bits, NaN among them; zeros without `rng`."""
    found = {}
    for name, (shape, dtype) in problem.page_arrays.items():
        size = (count, *shape[:-1], shape[-1] * numpy_dtype(dtype).itemsize)
        raw = np.zeros(size, np.uint8) if rng is None else rng.integers(0, 256, size, np.uint8)
        found[name] = raw.view(numpy_dtype(dtype))
    return found


def same(one: Pages, other: Pages) -> bool:
    """Bit for bit."""
    return list(one) == list(other) and all(
        (array.dtype, array.shape, array.tobytes()) == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name, array in one.items()
    )


def check(session: Any, model: Model) -> None:
    for cache in range(len(model.problems)):
        everything = np.arange(len(model.held[cache]["k"]), dtype=np.int32)
        assert same(session.read_pages(cache, everything), model.held[cache])


@pytest.fixture
def caches(session: Any) -> Callable[..., Model]:
    """Allocates caches and says what they hold."""

    def make(problems: list[KVProblem], pages: int = COUNT) -> Model:
        session.alloc_caches(problems, [pages] * 2, "slots")
        return Model(problems, pages)

    return make


@pytest.mark.parametrize("seed", range(2))
def test_pages_hold_what_the_model_says(session: Any, caches: Any, seed: int) -> None:
    """Random reads, writes and copies in several groups, frozen and not, of 0 to 50 pages: ids in any order, the null
    page several times, and copies whose pages overlap."""
    model, rng = caches(PROBLEMS), np.random.default_rng(seed)
    for turn in range(40):
        if turn == 10:
            session.freeze()
        count, cache = int(rng.integers(0, 51)), int(rng.integers(len(PROBLEMS)))
        ids = rng.permutation(np.arange(1, COUNT))[:count].astype(np.int32)
        padding = np.zeros(int(rng.integers(0, 3)), np.int32)
        kind = rng.integers(3)
        if kind == 0:
            pages = drawn(PROBLEMS[cache], count, rng)
            assert session.write_pages(cache, ids, pages).done()
            model.write(cache, ids, pages)
        elif kind == 1:
            src, dst = rng.integers(0, COUNT, count).astype(np.int32), ids
            src, dst = np.append(src, padding), np.append(dst, padding)
            session.copy_pages(PROBLEMS[cache].group, src, dst).wait()
            model.copy(PROBLEMS[cache].group, src, dst)
        else:
            wanted = np.append(np.append(padding, rng.integers(0, COUNT, count)), padding).astype(np.int32)
            assert same(session.read_pages(cache, wanted), model.read(cache, wanted))
    check(session, model)


@pytest.mark.parametrize("count", [PAGES - 1, PAGES, PAGES + 1, 2 * PAGES, 3 * PAGES + 1])
def test_copies_read_every_page_before_they_write_one(session: Any, caches: Any, count: int) -> None:
    model, rng = caches(PROBLEMS[:2]), np.random.default_rng(count)
    everything = np.arange(COUNT, dtype=np.int32)
    for cache in range(2):
        pages = drawn(PROBLEMS[cache], COUNT, rng)
        session.write_pages(cache, everything, pages)
        model.write(cache, everything, pages)
    start = np.arange(1, count + 1, dtype=np.int32)
    for src, dst in ((start, start + 1), (start + 2, start), (start, start[::-1].copy())):
        session.copy_pages(0, src, dst)
        model.copy(0, src, dst)
    check(session, model)


def test_a_page_that_is_named_several_times_keeps_the_last(session: Any, caches: Any) -> None:
    model, rng = caches(PROBLEMS[:1]), np.random.default_rng(4)
    ids = rng.integers(1, 6, 50).astype(np.int32)
    pages = drawn(PROBLEMS[0], 50, rng)
    session.write_pages(0, ids, pages)
    model.write(0, ids, pages)
    check(session, model)


def test_the_null_page_is_changed_by_nothing_that_does_not_name_it(session: Any, caches: Any) -> None:
    model, rng = caches(PROBLEMS), np.random.default_rng(5)
    for cache, problem in enumerate(PROBLEMS):
        pages = drawn(problem, 1, rng)
        for name, view in page_view(session.caches[cache]).items():
            view[0].copy_(from_host(pages[name][0]))  # before there is a program
        model.write(cache, [0], pages)
    session.freeze()
    check(session, model)
    for cache, problem in enumerate(PROBLEMS):
        for ids in (np.array([], np.int32), np.array([7, 8]), np.arange(1, 20)):
            pages = drawn(problem, len(ids), rng)
            session.write_pages(cache, ids, pages)
            model.write(cache, ids, pages)
    for ids in (np.array([], np.int32), np.array([9, 7]), np.arange(1, 20)):
        session.copy_pages(0, ids, ids + 30)
        model.copy(0, ids, ids + 30)
    check(session, model)


def test_the_null_page_may_be_read_and_copied_and_written(session: Any, caches: Any) -> None:
    model, rng = caches(PROBLEMS[3:4], 3), np.random.default_rng(6)
    pages = drawn(PROBLEMS[3], 1, rng)
    session.write_pages(0, np.zeros(1, np.int64), pages)
    session.copy_pages(1, np.zeros(1, np.int64), np.array([2]))
    model.write(0, [0], pages)
    model.write(0, [2], pages)
    check(session, model)


def test_no_ids_move_nothing(session: Any, caches: Any) -> None:
    problems = PROBLEMS[2:4]
    model, none = caches(problems), np.zeros(0, np.int32)
    for cache, problem in enumerate(problems):
        empty = drawn(problem, 0, None)
        assert session.write_pages(cache, none, empty).done()
        assert same(session.read_pages(cache, none), empty)
    assert session.copy_pages(0, none, none).done() and session.copy_pages(1, none, none).done()
    check(session, model)


def test_caches_of_one_problem_share_their_programs_and_not_their_pages(session: Any, caches: Any) -> None:
    model, before = caches(PROBLEMS), stand_in.compiler().counts.compiled
    session.freeze()
    assert stand_in.compiler().counts.compiled - before == 2 * (len(PROBLEMS) - 1) + 2  # and a copy for each group
    rng = np.random.default_rng(8)
    for cache in (0, 2):
        pages = drawn(PROBLEMS[cache], 1, rng)
        session.write_pages(cache, np.array([3]), pages)
        model.write(cache, [3], pages)
    check(session, model)


def test_a_pool_that_is_smaller_than_a_call_is_moved_all_the_same(session: Any, caches: Any) -> None:
    model, rng = caches(PROBLEMS[:1], 2), np.random.default_rng(9)
    pages = drawn(PROBLEMS[0], 1, rng)
    session.write_pages(0, np.array([1]), pages)
    model.write(0, [1], pages)
    check(session, model)


def test_groups_have_pools_of_their_own_size(session: Any) -> None:
    problems = [kv(), kv(group=1)]
    session.alloc_caches(problems, [3, 20], "slots")
    rng = np.random.default_rng(10)
    pages = drawn(problems[1], 1, rng)
    session.write_pages(1, np.array([19]), pages)
    session.copy_pages(1, np.array([19]), np.array([18]))
    assert same(session.read_pages(1, np.array([18])), pages)
    assert not session.read_pages(0, np.arange(3))["k"].any()
