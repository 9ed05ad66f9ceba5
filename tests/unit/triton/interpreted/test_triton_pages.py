"""Kernels that write and move pages, beyond the cases of the contract: caches that are not changed in place, limits,
and bytes of any number."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lineshaft_contract.problems import KVProblem, RopeProblem, RopeWriteProblem
from lineshaft_contract.sessions import Cache
from lineshaft_torch.session import SessionOptions, TorchSession
from lineshaft_triton.interpreting import compiling
from lineshaft_triton.kernels import triton_kernels
from lineshaft_triton.kernels.pages import MOST, in_units, move
from lineshaft_triton.targets import TARGETS

KERNELS = {made.op: made for made in triton_kernels("cuda", TARGETS["sm90"])}
KV = KVProblem(dtype="float32", kv_dtype="bfloat16", kv_heads=2, qk_dim=8, v_dim=8, page_size=4, rows=3)
ROPE = RopeProblem(dtype="float32", dim=8, base=1e4, head_dim=8, q_heads=4, kv_heads=2, rows=3, max_position=32)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def cache_of(problem: KVProblem, pages: int) -> Cache:
    shapes = {name: (pages * shape[0], *shape[1:]) for name, (shape, _) in problem.page_arrays.items()}
    return Cache(0, problem, "slots", {name: random(*shape).bfloat16() for name, shape in shapes.items()})


def step_of(*slots: int) -> Any:
    return SimpleNamespace(groups=(SimpleNamespace(slots=torch.tensor(slots, dtype=torch.int32)),))


@pytest.mark.parametrize("given", [False, True], ids=["fresh", "given"])
def test_rope_and_write_leave_a_functional_sessions_cache(given: bool) -> None:
    """The result is a copy, in the tensors that a tape has for it, and the same as in place."""
    problem, cache = RopeWriteProblem.of(ROPE, KV), cache_of(KV, 3)
    q, k, v, at = random(3, 4, 8), random(3, 2, 8), random(3, 2, 8), torch.tensor([5, 0, 9], dtype=torch.int32)
    before = {name: array.clone() for name, array in cache.arrays.items()}
    functional = KERNELS["rope_write_kv"].bind(problem, TorchSession("cpu", options=SessionOptions(functional=True)))
    outs = (torch.empty_like(q), *map(torch.empty_like, cache.arrays.values())) if given else None
    turned, after = functional.run(cache, q, k, v, at, step_of(4, 9, 0), out=outs)
    assert all(torch.equal(before[name], cache.arrays[name]) for name in before)
    in_place = KERNELS["rope_write_kv"].bind(problem, TorchSession("cpu"))
    again, changed = in_place.run(cache, q, k, v, at, step_of(4, 9, 0))
    assert changed is cache and torch.equal(turned, again)
    assert all(torch.equal(after.arrays[name], cache.arrays[name]) for name in before)
    assert not torch.equal(before["k"][9], cache.arrays["k"][9])
    if outs:
        assert turned is outs[0] and after.arrays["v"] is outs[2]


def test_heads_that_are_not_dense() -> None:
    """q, k and v may be parts of wider heads, which a stride of rows does not tell."""
    whole, at = random(3, 8, 12), torch.tensor([5, 0, 9], dtype=torch.int32)
    q, k = whole[:, :4, :8], whole[:, 4:6, 2:10]
    rope = KERNELS["rope"].bind(ROPE, TorchSession("cpu"))
    for got, wanted in zip(rope.run(q, k, at), rope.run(q.contiguous(), k.contiguous(), at), strict=True):
        assert torch.equal(got, wanted)
    write = KERNELS["write_kv"].bind(KV, TorchSession("cpu"))
    cache = write.run(cache_of(KV, 3), k, q[:, :2], step_of(4, 9, 1))
    assert torch.equal(cache.arrays["k"][[4, 9, 1]], k.bfloat16())
    assert torch.equal(cache.arrays["v"][[4, 9, 1]], q[:, :2].bfloat16())


@pytest.mark.parametrize("width", [3, 6, 20, 24, 40])
def test_rows_of_any_number_of_bytes(width: int) -> None:
    array = torch.arange(width * 9, dtype=torch.int64).to(torch.uint8).view(9, width)
    assert in_units(array).shape[1] * in_units(array).itemsize == width
    wanted = array.clone()
    ids = torch.tensor([[1, 2, 3], [2, 3, 4]], dtype=torch.int32)
    wanted[ids[1].long()] = array[ids[0].long()]
    move(TorchSession("cpu"), array, array, src=ids[0], dst=ids[1])
    assert torch.equal(array, wanted)


def test_a_copy_that_one_program_cannot_hold_is_declined() -> None:
    for op in ("copy_pages", "copy_slots"):
        assert KERNELS[op].supports(replace(KV, rows=MOST)) is None
        assert f"at most {MOST}, not {MOST + 1}" in str(KERNELS[op].supports(replace(KV, rows=MOST + 1)))
    assert KERNELS["read_pages"].supports(replace(KV, rows=MOST + 1)) is None


def test_all_reads_of_many_pages_come_before_all_writes() -> None:
    """Each of 300 pages moves on by one."""
    cache, ids = cache_of(KV, 302), torch.arange(301, dtype=torch.int32)
    before = cache.arrays["k"].clone()
    KERNELS["copy_pages"].bind(replace(KV, rows=300), TorchSession("cpu")).run(cache, ids[:300], ids[:300] + 1)
    assert torch.equal(cache.arrays["k"][4 : 301 * 4], before[: 300 * 4])


def test_no_dim_of_a_grid_is_too_long_for_cuda() -> None:
    """1024 pages of 2 MiB, and 100 000 slots: the first dim of a grid may have 2^31 - 1 programs, others 65535."""
    grids: list[tuple[int, ...]] = []
    session = SimpleNamespace(launcher=lambda kernel, grid, *more: grids.append(grid))
    ids = torch.empty(MOST, dtype=torch.int32, device="meta")
    pages = torch.empty((MOST, 2 << 20), dtype=torch.uint8, device="meta")
    slots = torch.empty((100_000, 64 << 10), dtype=torch.uint8, device="meta")
    with compiling():
        move(session, pages, pages, src=ids, dst=ids)
        move(session, slots, slots, src=torch.empty(len(slots), dtype=torch.int32, device="meta"))
    assert max(grids[0]) > 65535 and max(grids[1]) > 65535
    assert all(first < 1 << 31 and max(others, default=1) <= 65535 for first, *others in grids)


@pytest.mark.parametrize(
    ("op", "problem", "words"),
    [
        ("write_kv", replace(KV, dtype="float64", kv_dtype="float64"), "does not store float64"),
        ("rope", replace(ROPE, dtype="float64"), "too narrow for float64"),
        ("rope", replace(ROPE, head_dim=2048), "at most 1024 values, not 2048"),
        ("rope", replace(ROPE, max_position=0), "needs max_position"),
        ("rope_write_kv", RopeWriteProblem.of(ROPE, replace(KV, kv_dtype="int8")), "does not store float32 as int8"),
    ],
    ids=str,
)
def test_reasons(op: str, problem: Any, words: str) -> None:
    assert words in str(KERNELS[op].supports(problem))
