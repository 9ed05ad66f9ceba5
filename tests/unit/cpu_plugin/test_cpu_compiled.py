"""The compiled kernels where the small cases of their ops do not reach: several threads, long contexts, odd numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.cpu_plugin.test_cpu_attention import FEATURES, SPEC, case_of, tensors_of
from tests.unit.cpu_plugin.test_cpu_kernels import LEVELS

from lineshaft.errors import Unsupported
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.cases import Paging, paged_step
from lineshaft_contract.ops.run import compare
from lineshaft_contract.problems import (
    AttendProblem,
    NormProblem,
    PointwiseProblem,
    Problem,
    RopeProblem,
    SampleProblem,
)
from lineshaft_cpu import compiled, native
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions
from lineshaft_torch.arrays import to_host
from lineshaft_torch.session import TorchSession
from lineshaft_torch.tensors import map_tensors, tensors_in

Run = Callable[..., Any]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kernel(op: str, level: str = "auto") -> Kernel:
    (found,) = [
        k for k in create(CpuOptions(engine="torch", native=level), World()).kernels() if k.name == f"cpu_native_{op}"
    ]  # type: ignore[arg-type]
    return found


def bound(op: str, problem: Problem, level: str = "auto", threads: int = 1) -> Run:
    torch.set_num_threads(threads)
    run: Run = kernel(op, level).bind(problem, TorchSession())
    return run


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(result: Any) -> list[bytes]:
    return [to_host(tensor).tobytes() for tensor in tensors_in(result)]


def large_jobs() -> list[Any]:
    """(op, problem, arguments) above the size from which threads share the work; widths leave a rest in each vector."""
    x, r, w = random(300, 333), random(300, 333, seed=1), random(333, seed=2)
    heads, positions = random(300, 6, 72, seed=3), torch.arange(300, dtype=torch.int32)
    norm = NormProblem(dtype="bfloat16", width=333, eps=1e-5)
    rope = RopeProblem(dtype="bfloat16", dim=36, base=1e4, head_dim=72, max_position=512)
    return [
        ("rms_norm", norm, (x, w)),
        ("add_rms_norm", norm, (x, r, w)),
        ("silu_mul", PointwiseProblem(dtype="bfloat16"), (random(300, 666),)),
        ("rope", rope, (heads[:, :4], heads[:, 4:], positions)),
        ("argmax", SampleProblem(dtype="bfloat16", vocab=333), (x,)),
    ]


@pytest.mark.parametrize("job", large_jobs(), ids=lambda job: job[0])
@torch.inference_mode()
def test_threads_change_no_bit(job: Any, level: str) -> None:
    op, problem, args = job
    one, two = (bits(bound(op, problem, level, threads)(*args)) for threads in (1, 2))
    assert one == two


@pytest.mark.parametrize("fields", FEATURES, ids=lambda fields: next(iter(fields), "plain"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_mixed_steps_over_long_contexts_are_within_tolerance(fields: dict[str, Any], dtype: str, level: str) -> None:
    """Contexts of several blocks of keys; chunks on both sides of the length from which torch attends them."""
    rng = np.random.default_rng(7)
    lengths = ((1, 700), (1, 1), (40, 300), (0, 50), (70, compiled.WHOLE + 70), (1, 130), (33, 33), (3, 513))
    paged = paged_step(rng, paging := Paging(lengths, page_size=24, padding=3))
    case = case_of(paging, paged, dtype=dtype, **fields)
    q, cache, step, kwargs = tensors_of(case)
    results = [bound("attend", case.problem, level, threads)(q, cache, step, **kwargs) for threads in (1, 2)]
    assert not compare(SPEC, case, map_tensors(to_host, results[0]))
    ours = torch.tensor([count == 1 or context <= compiled.WHOLE for count, context in lengths for _ in range(count)])
    assert 0 < ours.sum() < len(ours)
    one, two = (map_tensors(lambda tensor: tensor[: len(ours)][ours], result) for result in results)
    assert bits(one) == bits(two)


@torch.inference_mode()
def test_a_decode_row_does_not_depend_on_the_others(level: str) -> None:
    """Alone, among few and among so many that a tile takes all key heads, a row has the same bits."""
    found = []
    for others in (0, 2, 9):
        lengths = ((1, 200), *((1, 3 + 40 * n) for n in range(others)))
        paged = paged_step(np.random.default_rng(3), paging := Paging(lengths, pool=200))
        case = case_of(paging, paged)
        q, cache, step, _ = tensors_of(case)
        values = random(*cache.arrays["k"].shape, seed=5)
        slots = torch.arange(200) % 16 + 16 * step.groups[0].page_table[0].repeat_interleave(16)[:200]
        for name in "kv":
            cache.arrays[name][slots] = values[:200]
        q[0] = values[0, :1]
        found.append(bits(bound("attend", case.problem, level, threads=2)(q, cache, step)[0]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("fields", [{}, {"sinks": True}], ids=["plain", "sinks"])
@torch.inference_mode()
def test_a_query_without_a_visible_key_gets_exactly_0(fields: dict[str, Any], level: str) -> None:
    """Whatever the sinks, the values that the row's other queries see, and the memory that the result is put in."""
    paged = paged_step(np.random.default_rng(3), paging := Paging(((2, 0), (3, 1), (2, compiled.WHOLE + 9)), padding=1))
    case = case_of(paging, paged, **fields)
    q, cache, step, kwargs = tensors_of(case)
    table = step.groups[0].page_table
    cache.arrays["v"][16 * table[1, 0]] = torch.nan
    table[2] = 0
    for sink in kwargs.values():
        sink[:3] = torch.tensor([-torch.inf, torch.inf, 3.0])
    out = torch.full_like(q, torch.nan)
    bound("attend", case.problem, level)(q, cache, step, out=out, **kwargs)
    assert out[4].isnan().any()
    out[4] = 0.0
    assert not out.any()


@torch.inference_mode()
def test_weights_of_another_dtype_or_with_gaps_are_read_as_what_they_are(level: str) -> None:
    x, w = random(3, 40), random(40, 2, seed=1)[:, 0]
    norm = bound("rms_norm", NormProblem(dtype="bfloat16", width=40, eps=1e-5), level)
    add_norm = bound("add_rms_norm", NormProblem(dtype="bfloat16", width=40, eps=1e-5), level)
    for other in (w, w.float()):
        assert bits(norm(x, other)) == bits(norm(x, w.contiguous()))
        assert bits(add_norm(x, x, other)) == bits(add_norm(x, x, w.contiguous()))
    paged = paged_step(np.random.default_rng(3), paging := Paging(((1, 20), (3, 5))))
    case = case_of(paging, paged, sinks=True)
    q, cache, step, kwargs = tensors_of(case)
    attend, sinks = bound("attend", case.problem, level), kwargs["sinks"]
    assert bits(attend(q, cache, step, sinks=sinks.float())) == bits(attend(q, cache, step, sinks=sinks))


@torch.inference_mode()
def test_numbers_that_are_not_finite_stay_so(level: str) -> None:
    x = torch.tensor([[1.0, 2.0] * 20, [float("nan"), 2.0] * 20, [float("inf"), 1.0] * 20]).bfloat16()
    normed = bound("rms_norm", NormProblem(dtype="bfloat16", width=40, eps=1e-5), level)(x, torch.ones(40).bfloat16())
    assert normed[0].isfinite().all()
    assert normed[1].isnan().all()
    assert normed[2, ::2].isnan().all()
    gated = bound("silu_mul", PointwiseProblem(dtype="float32"), level)(
        torch.tensor([[-float("inf"), -200.0, -88.0, 0.0, 88.0, 200.0, float("inf"), float("nan")] * 6]).float()
    )
    expected = torch.nn.functional.silu(torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0]]))
    assert torch.allclose(gated[:, 1:6] / torch.tensor([-200.0, -88.0, 1.0, 88.0, 200.0]), expected, atol=1e-30)
    assert gated[0, 7].isnan()
    best = bound("argmax", SampleProblem(dtype="bfloat16", vocab=40), level)
    assert best(x).tolist() == [1, -1, 0]
    assert best(torch.full((2, 40), -torch.inf).bfloat16()).tolist() == [-1, -1]


@torch.inference_mode()
def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even(level: str) -> None:
    """Sums on both sides of the middle between two neighbours, and in it, next to an even one and to an odd one."""
    step, middle = 2.0**-7, 2.0**-8
    x = torch.tensor([1.0, 1.0 + step, 1.0, 1.0, -1.0, -1.0 - step, 3.0e38, 2.0**-126] * 5)[None].bfloat16()
    added = torch.tensor([middle, middle, middle * 1.01, middle * 0.99, -middle, -middle, 0.0, 2.0**-133] * 5)
    total = bound("add_rms_norm", NormProblem(dtype="bfloat16", width=40, eps=1e-5), level)
    _, found = total(x, added[None].bfloat16(), torch.ones(40).bfloat16())
    assert found[0, :6].tolist() == [1.0, 1.0 + 2 * step, 1.0 + step, 1.0, -1.0, -1.0 - 2 * step]
    assert torch.equal(found, (x.float() + added.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_keys_of_pages_that_are_gone_are_not_seen(dtype: str, level: str) -> None:
    lengths = ((1, 40), (1, 200), (5, 60), (20, 20), (3, 300))
    paged = paged_step(np.random.default_rng(1), Paging(lengths, dropped=1))
    case = case_of(Paging(lengths, dropped=1), paged, dtype=dtype)
    assert (case.args[2].arrays["page_table.0"][:, 0] == 0).any()
    q, cache, step, _ = tensors_of(case)
    cache.arrays["k"][: case.problem.page_size] = 9.0  # the null page, if it were read
    assert not compare(SPEC, case, to_host(bound("attend", case.problem, level)(q, cache, step)))


def test_a_level_that_was_named_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = native.Refused("there are no native kernels: no C compiler was found", native.FIX)
    monkeypatch.setattr(native, "_find", lambda wanted, package: refused)
    with pytest.raises(Unsupported, match=r"no C compiler was found; .*pip install"):
        create(CpuOptions(engine="torch", native="portable"), World())
    assert create(CpuOptions(engine="torch"), World()).kernels()  # "auto" goes on with torch's


def test_what_is_declined_says_why() -> None:
    problem = AttendProblem(
        dtype="bfloat16", kv_dtype="bfloat16", q_heads=4, kv_heads=2, qk_dim=40, v_dim=40, page_size=16, scale=1.0
    )
    assert "a multiple of 32 up to 640 values, not of 40" in str(kernel("attend").supports(problem))
    norm = NormProblem(dtype="float64", width=8, eps=1e-5)
    assert "computes in bfloat16 or float32, not in float64" in str(kernel("rms_norm").supports(norm))
    assert 'native = "off"' in str(kernel("rms_norm", "off").supports(NormProblem(dtype="float32", width=8, eps=1e-5)))
