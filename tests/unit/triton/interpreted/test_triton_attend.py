"""Attention kernels beyond the cases of the contract: wide groups of heads, latent keys, contexts that are split, what
is declined and why, and that everything a launch depends on follows from the bucket."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.cases import Paging, paged_step
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg
from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.session import TorchSession
from lineshaft_triton.kernels import attend, attend_tiles, triton_kernels
from lineshaft_triton.kernels.attend import plan, supports, tile_of
from lineshaft_triton.kernels.attend_tiles import CHUNK, CORES, DECODE, WAVES
from lineshaft_triton.targets import TARGETS, find_target

SPEC = all_ops()["attend"]
SM90 = TARGETS["sm90"]
LLAMA = AttendProblem(
    dtype="bfloat16", kv_dtype="bfloat16", q_heads=32, kv_heads=8, qk_dim=128, v_dim=128, page_size=16,
    scale=128**-0.5, tokens=64, rows=64, pages=512, max_query=1,
)  # fmt: skip
LATENT = replace(LLAMA, q_heads=128, kv_heads=1, qk_dim=576, v_dim=512, value_in_key=True)


def case_of(paging: Paging, seed: int = 0, **fields: Any) -> Case:
    given = {
        "dtype": "bfloat16", "q_heads": 4, "kv_heads": 2, "qk_dim": 32, "v_dim": 32, "scale": 0.2, **fields,
    }  # fmt: skip
    given = {"kv_dtype": given["dtype"], **given}
    problem = AttendProblem(
        page_size=paging.page_size, tokens=paging.tokens, rows=len(paging.lengths), pages=paging.columns,
        max_query=max(query for query, _ in paging.lengths), **given,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    paged = paged_step(rng, paging)
    dims = {"k": problem.qk_dim} if problem.value_in_key else {"k": problem.qk_dim, "v": problem.v_dim}
    pages = {name: paged.fill(rng, (problem.kv_heads, dim)) for name, dim in dims.items()}
    kwargs = {"sinks": rng.standard_normal(problem.q_heads)} if problem.sinks else {}
    q = rng.standard_normal((paging.tokens, problem.q_heads, problem.qk_dim))
    return Case("random", problem, (q, CacheArg(pages), paged.step), kwargs)


def outputs_of(case: Case, kernel: str, target: str = "sm90", session: Any = None) -> Any:
    """What a kernel gives for a case."""
    chosen = {made.name: made for made in triton_kernels("cuda", TARGETS[target])}[kernel]
    assert chosen.supports(case.problem) is None
    q, pages = (operand(value, case.problem) for value in case.args[:2])
    cache = Cache(0, case.problem, "slots", {name: from_host(array).flatten(0, 1) for name, array in pages.items()})
    arrays = {name: from_host(array.copy()) for name, array in case.args[2].arrays.items()}
    kwargs = {name: from_host(operand(value, case.problem)) for name, value in case.kwargs.items()}
    bound = chosen.bind(case.problem, session or TorchSession("cpu"))
    found = bound(from_host(q), cache, StepInputs(arrays, case.args[2].shape), **kwargs)
    return tuple(map(to_host, found)) if isinstance(found, tuple) else to_host(found)


def assert_right(case: Case, kernel: str, target: str = "sm90") -> None:
    assert not compare(SPEC, case, outputs_of(case, kernel, target))


LONG = Paging(((1, 300), (1, 7), (0, 0), (1, 131)), padding=2)
MIXED = Paging(((1, 150), (7, 90), (0, 3), (3, 3)), padding=3)


@pytest.mark.parametrize("heads", [(5, 1), (14, 2), (20, 1), (71, 1)], ids=str)
def test_groups_of_any_size(heads: tuple[int, int]) -> None:
    """Also those that are no power of two, and those of more heads than a tile has rows."""
    for paging, kernel in ((LONG, "triton_attend_decode"), (MIXED, "triton_attend_chunk")):
        assert_right(case_of(paging, q_heads=heads[0], kv_heads=heads[1]), kernel)


@pytest.mark.parametrize("kernel", ["triton_attend_decode", "triton_attend_chunk"])
def test_latent_keys_hold_their_values(kernel: str) -> None:
    """Heads of 576 whose first 512 are the values: multi-head latent attention."""
    paging = Paging(((1, 70), (1, 5)))
    assert_right(case_of(paging, q_heads=18, kv_heads=1, qk_dim=576, v_dim=512, value_in_key=True), kernel)


@pytest.mark.parametrize("fields", [{}, {"sinks": True}, {"return_lse": True}, {"window": 80}], ids=str)
def test_split_contexts(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a context give what the whole does, whichever of them a row fills."""
    monkeypatch.setattr(attend_tiles, "INTERPRETED_CORES", 100)
    case = case_of(LONG, **fields)
    assert planned(case.problem, DECODE).splits == (2 if fields.get("window") else 5)
    assert_right(case, "triton_attend_decode")
    assert_right(case, "triton_attend_chunk")
    assert_right(case_of(MIXED, **fields), "triton_attend_chunk")


@pytest.mark.parametrize("target", ["sm80", "gfx942", "gfx1100"])
def test_tiles_of_other_targets(target: str) -> None:
    assert_right(case_of(LONG, q_heads=6, dtype="float32"), "triton_attend_decode", target)
    assert_right(case_of(MIXED, q_heads=6, softcap=3.0, window=20), "triton_attend_chunk", target)


def test_partials_lie_in_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a session run one at a time, so its launches of a size share a workspace."""
    monkeypatch.setattr(attend_tiles, "INTERPRETED_CORES", 100)
    session = TorchSession("cpu")
    made: list[Any] = []
    constant = session.constant
    monkeypatch.setattr(session, "constant", lambda key, make: made.append(constant(key, make)) or made[-1])
    for seed in range(2):
        case = case_of(LONG, seed)
        assert not compare(SPEC, case, outputs_of(case, "triton_attend_decode", session=session))
    assert len({space.data_ptr() for space in made}) == 1 and len(made) == 2


def test_results_go_where_they_are_wanted() -> None:
    case = case_of(MIXED, return_lse=True)
    bound = {made.name: made for made in triton_kernels("cuda", SM90)}["triton_attend_chunk"].bind(
        case.problem, TorchSession("cpu")
    )
    q, pages = (operand(value, case.problem) for value in case.args[:2])
    cache = Cache(0, case.problem, "slots", {name: from_host(array).flatten(0, 1) for name, array in pages.items()})
    step = StepInputs({name: from_host(a.copy()) for name, a in case.args[2].arrays.items()}, case.args[2].shape)
    outs = torch.full((14, 4, 32), 7.0, dtype=torch.bfloat16), torch.full((14, 4), 7.0)
    wide = torch.zeros(14, 4, 80, dtype=torch.bfloat16)
    wide[..., :32] = from_host(q)
    found = bound.run(wide[..., :32], cache, step, out=outs)  # heads that are not dense
    assert found[0] is outs[0] and found[1] is outs[1]
    assert not compare(SPEC, case, tuple(map(to_host, outs)))


def planned(problem: AttendProblem, kind: str, target: str = "sm90") -> attend.Plan:
    config = tile_of(TARGETS[target], kind, problem)
    assert config is not None
    return plan(TARGETS[target], kind, problem, config)


@pytest.fixture
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as they are where kernels are compiled."""
    monkeypatch.setattr(attend_tiles, "interpreting", lambda: False)


@pytest.mark.usefixtures("as_compiled")
class TestPlans:
    def test_enough_programs_for_the_device(self) -> None:
        """At least two for each multiprocessor, where the context is long enough."""
        for target, rows in ((target, rows) for target in TARGETS for rows in (1, 8, 64)):
            found = planned(replace(LLAMA, rows=rows, tokens=rows), DECODE, target)
            tiles = LLAMA.pages * LLAMA.page_size // found.config.block["BLOCK_N"]
            assert found.grid[0] * found.splits >= min(2 * CORES[target], rows * 8 * tiles)

    def test_no_split_where_there_are_programs_enough(self) -> None:
        rows = -(-WAVES * CORES["sm90"] // 8)
        assert planned(replace(LLAMA, rows=rows, tokens=rows), DECODE).splits == 1
        assert planned(replace(LLAMA, rows=4, tokens=4096, max_query=4096), CHUNK).splits == 1

    def test_no_split_shorter_than_a_tile(self) -> None:
        assert planned(replace(LLAMA, rows=1, tokens=1, pages=4), DECODE).splits == 1
        assert planned(replace(LLAMA, rows=1, tokens=1, pages=8), DECODE).splits == 2

    def test_a_window_bounds_the_keys_that_are_split(self) -> None:
        assert planned(replace(LLAMA, rows=1, tokens=1, window=128), DECODE).splits == 3

    def test_tiles_for_any_lengths_of_a_bucket(self) -> None:
        """Tiles of queries cover every token, whatever the rows that they belong to."""
        found = planned(replace(LLAMA, tokens=100, rows=7, max_query=100), CHUNK)
        queries = found.config.block["BLOCK_M"] // 4
        rng = np.random.default_rng(0)
        for _ in range(200):
            ends = np.sort(rng.integers(0, 101, 7))
            lengths = np.diff([0, *ends, 100])
            assert sum(-(-length // queries) for length in lengths) <= found.tiles

    def test_few_queries_take_the_small_tile(self) -> None:
        """Verifying four tokens for a group of four heads fills the rows of one small product."""
        for target in TARGETS:
            assert planned(replace(LLAMA, max_query=4, tokens=256), CHUNK, target).config.block["BLOCK_M"] == 16
            assert planned(replace(LLAMA, max_query=5, tokens=320), CHUNK, target).config.block["BLOCK_M"] > 16

    def test_every_target_has_a_tile(self) -> None:
        for target, kind, dim in ((t, k, d) for t in TARGETS for k in (DECODE, CHUNK) for d in (16, 64, 80, 128, 256)):
            heads = {"qk_dim": dim, "v_dim": dim, "max_query": 1 if kind == DECODE else 64}
            for dtype in ("bfloat16", "float16", "float32"):
                problem = replace(LLAMA, dtype=dtype, kv_dtype=dtype, **heads)
                declined = supports(TARGETS[target], kind, problem)
                wide = dtype == "float32" and dim > 128 and target in attend_tiles.RDNA
                assert (declined is not None) == wide, (target, kind, dim, dtype, declined)

    def test_large_tiles_use_the_targets_best_instructions(self) -> None:
        for target, unit in (("sm90", "wgmma"), ("sm100", "tcgen05")):
            chunk = planned(replace(LLAMA, max_query=512, tokens=512, rows=1), CHUNK, target).config
            assert (planned(LLAMA, DECODE, target).config.unit, chunk.unit) == ("mma", "")
            assert TARGETS[target].expects("bfloat16", chunk.unit) == f"{unit}.bf16"

    @pytest.mark.parametrize(
        ("fields", "target", "words"),
        [
            ({"dtype": "float64", "kv_dtype": "float64"}, "sm90", "float64"),
            ({"max_query": 2}, "sm90", "one query a row, not of 2"),
            ({"qk_dim": 320, "v_dim": 256}, "sm90", "at most 256 values"),
            ({"value_in_key": True, "v_dim": 60}, "sm90", "one power of two holds both"),
            ({"kv_dtype": "float8_e4m3fnuz"}, "sm90", "sm90 does not convert float8_e4m3fnuz"),
            ({"kv_dtype": "float8_e5m2fnuz"}, "gfx1100", "gfx1100 does not convert float8_e5m2fnuz"),
            ({"kv_dtype": "float8_e4m3fn"}, "sm80", "sm80 does not convert float8_e4m3fn"),
            ({"kv_dtype": "float8_e4m3fn"}, "sm86", "a smaller GPU with the tiles of sm89 does not convert"),
            ({"kv_dtype": "float16"}, "sm90", "float16 as bfloat16"),
            ({"kv_dtype": "float32"}, "sm90", "float32 as bfloat16"),
        ],
        ids=str,
    )
    def test_reasons(self, fields: dict[str, Any], target: str, words: str) -> None:
        vendor = "amd" if target.startswith("gfx") else "nvidia"
        reason = supports(find_target(target, vendor), DECODE, replace(LLAMA, **fields))
        assert reason is not None and words in reason

    def test_latent_attention(self) -> None:
        """Where the registers hold its values, and otherwise declined."""
        for target in TARGETS:
            reason = supports(TARGETS[target], DECODE, LATENT)
            assert (reason is None) == (target not in attend_tiles.RDNA)
            assert reason is None or f"no tile for heads of 576 and 512 in bfloat16 on {target}" in reason


def test_tanh_is_exact_near_0_and_far_from_it() -> None:
    """By the kernel's own function: within 3e-7 of itself from the smallest normal numbers on, and on both sides of
    where the polynomial ends."""
    x = np.concatenate([np.logspace(-37, 1.6, 20_001), np.linspace(0.59, 0.61, 1001), [0.0, np.inf]])
    x = np.concatenate([x, -x]).astype(np.float32)
    out = torch.empty(len(x))
    tanh_kernel[(1,)](from_host(x), out, len(x), BLOCK=triton.next_power_of_2(len(x)))
    exact = np.tanh(x.astype(np.float64))
    assert np.all(np.abs(to_host(out) - exact) <= 3e-7 * np.abs(exact))
    nan = torch.tensor([torch.nan])
    tanh_kernel[(1,)](nan, out, 1, BLOCK=1)
    assert out[0].isnan()


@triton.jit
def tanh_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, attend.tanh(tl.load(x_ptr + at, at < count, 0.0)), at < count)
