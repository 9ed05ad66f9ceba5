"""The Pallas kernels, interpreted on the host, against the contract's references; and which problems they decline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.quantize import quantize_rows
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg, Case, StepArg, WeightArg
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs, StepShape
from lineshaft_contract.weights import Weight
from lineshaft_tpu.chips import CHIPS
from lineshaft_tpu.pallas.interpreting import watched
from lineshaft_tpu.pallas.recipes import pallas_kernels
from lineshaft_tpu.tiling import LANES, padded

QUICK = {
    "attend": (
        "decode/gqa4-page16-garbage_tail", "mixed/gqa2-page16-padding", "mixed/gqa3-page32-d80", "mixed/stale_table",
        "decode/dropped_pages", "mixed/softcap-sinks-window", "mixed/sinks_extreme-no_visible_key",
        "mixed/lse-no_visible_key", "mixed/bidirectional-window4", "mixed/value_in_key",
    ),
    "write_kv": (
        "mixed/page16", "decode/page8-d80", "prefill/page128-d256", "all_padding/page16", "value_in_key/page16",
        "bf16_pages/page16",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def on_the_host() -> None:
    jax.config.update("jax_platforms", "cpu")


def made(name: str, mode: Any = "interpret", chip: str = "v5e") -> Kernel:
    return next(kernel for kernel in pallas_kernels("tpu", CHIPS[chip], mode) if kernel.name == name)


def accepted(op: str, size: str) -> Iterator[Any]:
    """The op's cases that the kernel takes; those that are not QUICK belong to the long sizes."""
    kernel = made(f"pallas_{op}")
    for case in all_ops()[op].cases(np.random.default_rng(0), size):
        if case.problem.features() <= kernel.handles and kernel.supports(case.problem) is None:
            name, _, dtype = case.id.rpartition("-")
            quick = name in QUICK[op] and dtype == ("f32", "bf16")[QUICK[op].index(name) % 2]
            yield pytest.param(case, id=case.id, marks=() if quick else pytest.mark.full)


def head_major(pages: np.ndarray[Any, Any]) -> jax.Array:
    """[N, page, Hkv, D] -> [N, Hkv, page, D rounded up to lanes]."""
    wide = ((0, 0), (0, 0), (0, 0), (0, padded(pages.shape[-1], LANES) - pages.shape[-1]))
    return jnp.asarray(np.pad(np.moveaxis(pages, 1, 2), wide))


def canonical(pages: jax.Array, dim: int) -> np.ndarray[Any, Any]:
    return np.moveaxis(np.asarray(pages), 1, 2)[..., :dim]


def held_cache(problem: Any, pages: dict[str, Any]) -> Cache:
    return Cache(0, problem, "hnd", {name: head_major(held) for name, held in pages.items()})


def inputs(step: StepArg) -> StepInputs:
    return StepInputs({name: jnp.asarray(held) for name, held in step.arrays.items()}, step.shape)


def attended(case: Case, mode: str = "interpret", chip: str = "v5e") -> Any:
    """The case through the kernel: in a jit, as a session runs it."""
    q, pages, step = (operand(arg, case.problem) for arg in case.args)
    kwargs = {name: jnp.asarray(operand(value, case.problem)) for name, value in case.kwargs.items()}
    run = made("pallas_attend", mode, chip).bind(case.problem, None)
    given, cache = inputs(step), held_cache(case.problem, pages)

    def call(q: Any, arrays: Any, steps: Any, kwargs: Any) -> Any:
        held = Cache(0, cache.problem, "hnd", arrays)
        return run(q, held, StepInputs(steps, given.shape), **kwargs)

    return jax.tree.map(np.asarray, jax.jit(call)(jnp.asarray(q), cache.arrays, given.arrays, kwargs))


def written(case: Case, mode: str = "interpret") -> dict[str, Any]:
    pages, k, v, step = (operand(arg, case.problem) for arg in case.args)
    run = made("pallas_write_kv", mode).bind(case.problem, None)
    given, cache = inputs(step), held_cache(case.problem, pages)

    def call(arrays: Any, k: Any, v: Any, steps: Any) -> Any:
        return run(Cache(0, cache.problem, "hnd", arrays), k, v, StepInputs(steps, given.shape)).arrays

    found = jax.jit(call)(cache.arrays, k, v, given.arrays)
    return {name: canonical(held, pages[name].shape[-1]) for name, held in found.items()}


def named(op: str, case_id: str, size: Any = "smoke") -> Case:
    return next(case for case in all_ops()[op].cases(np.random.default_rng(0), size) if case.id == case_id)


# ---- against the references ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(accepted("attend", "smoke")))
def test_attend_agrees_with_the_reference(case: Case) -> None:
    assert compare(all_ops()["attend"], case, attended(case)) == []


@pytest.mark.parametrize("case", list(accepted("write_kv", "smoke")))
def test_write_kv_agrees_with_the_reference(case: Case) -> None:
    assert compare(all_ops()["write_kv"], case, written(case)) == []


def test_attend_over_several_blocks_of_keys_and_of_queries() -> None:
    for name in ("decode/long-page16-f32", "prefill/long-page32-bf16"):
        case = named("attend", name, "full")
        assert compare(all_ops()["attend"], case, attended(case)) == []


def test_attend_with_the_key_heads_of_two_cores() -> None:
    case = named("attend", "mixed/gqa2-page16-padding-bf16")
    assert compare(all_ops()["attend"], case, attended(case, chip="v5p")) == []


def test_write_kv_where_tokens_of_one_tile_are_far_apart() -> None:
    """Slots in no order, so that two rows share tiles, and more of them than a grid step holds."""
    tokens, rng = 290, np.random.default_rng(9)
    problem = kv_problem(dtype="float32", kv_dtype="float32", kv_heads=1, qk_dim=8, v_dim=8, rows=tokens)
    slots = np.concatenate([rng.permutation(280) + 19, rng.integers(0, 16, 10)]).astype(np.int32)
    step = StepArg({"slots.0": slots}, StepShape(tokens=tokens, rows=1, pages=(1,), logits=1, max_query=tokens))
    pages = {name: rng.standard_normal((20, 16, 1, 8)) for name in "kv"}
    k, v = (rng.standard_normal((tokens, 1, 8)) for _ in "kv")
    case = Case("own", problem, (CacheArg(pages), k, v, step))
    assert compare(all_ops()["write_kv"], case, written(case, "races")) == []


@pytest.mark.parametrize("op_and_case", ["attend mixed/gqa2-page16-padding-f32", "write_kv prefill/page128-d256-bf16"])
def test_no_data_race(op_and_case: str) -> None:
    op, _, name = op_and_case.partition(" ")
    case = named(op, name)
    result = attended(case, "races") if op == "attend" else written(case, "races")
    assert compare(all_ops()[op], case, result) == []


def test_a_kernel_with_a_race_fails() -> None:
    def hasty(x: Any, out: Any, held: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(x, held, arrived)
        copy.start()
        out[...] = held[...]
        copy.wait()

    def run(x: jax.Array) -> Any:
        return pl.pallas_call(
            hasty,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
            interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", vector_clock_size=64),
        )(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match="data race"):
        jax.jit(watched(run, "races"))(jnp.ones((8, 128))).block_until_ready()


def test_pages_without_a_visible_key_are_not_fetched() -> None:
    """Their ids point nowhere, and the interpreter refuses to read there."""
    problem = AttendProblem(
        dtype="float32", q_heads=2, kv_heads=1, qk_dim=128, v_dim=128, page_size=8, scale=0.1, kv_dtype="float32",
        tokens=3, rows=2, pages=128, max_query=2, window=10,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    table = np.full((2, 128), 10**6, np.int32)
    table[0, :2], table[1, 86:89] = (1, 2), (3, 4, 5)  # positions 0 to 11, and 692 to 702 of the window
    arrays = {
        "query_starts": np.array([0, 1, 3], np.int32), "page_table.0": table,
        "context_lens.0": np.array([12, 703], np.int32), "slots.0": np.zeros(3, np.int32),
    }  # fmt: skip
    step = StepArg(arrays, StepShape(tokens=3, rows=2, pages=(128,), logits=2, max_query=2))
    pages = {name: rng.standard_normal((6, 8, 1, 128)).astype(np.float32) for name in "kv"}
    q = rng.standard_normal((3, 2, 128)).astype(np.float32)
    run = made("pallas_attend", "races").bind(problem, None)
    out = np.asarray(run(jnp.asarray(q), held_cache(problem, pages), inputs(step)))
    table[:, :] = np.where(table == 10**6, 0, table)
    reference = all_ops()["attend"].reference(problem, q, pages, step)
    np.testing.assert_allclose(out, reference, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("sizes", [(1, 128, 128), (37, 384, 4352)])
def test_linear_agrees_with_the_reference(dtype: str, scheme: str, sizes: tuple[int, int, int]) -> None:
    rng, (m, n, k) = np.random.default_rng(5), sizes
    problem = LinearProblem(dtype=dtype, m=m, n=n, k=k, scheme=scheme)
    case = Case("own", problem, (rng.standard_normal((m, k)), WeightArg(rng.standard_normal((n, k)), "linear")))
    q, scale = quantize_rows(operand(case.args[1], problem), scheme)
    kernel = made(f"pallas_linear_{scheme}")
    assert kernel.supports(problem) is None
    weight = Weight(0, "w", {"linear": problem}, kernel.layout, {"q": jnp.asarray(q), "scale": jnp.asarray(scale)})
    out = kernel.bind(problem, None)(jnp.asarray(operand(case.args[0], problem)), weight)
    assert out.dtype == dtype
    assert compare(all_ops()["linear"], case, np.asarray(out)) == []


# ---- what is declined ------------------------------------------------------------------------------------------


def attend_problem(**fields: Any) -> AttendProblem:
    given = {
        "dtype": "bfloat16", "q_heads": 32, "kv_heads": 8, "qk_dim": 128, "v_dim": 128, "page_size": 16, "scale": 0.1,
        "kv_dtype": "bfloat16", "tokens": 256, "rows": 256, "pages": 512, "max_query": 1, **fields,
    }  # fmt: skip
    return AttendProblem(**given)


def kv_problem(**fields: Any) -> KVProblem:
    given = {"dtype": "bfloat16", "kv_heads": 8, "qk_dim": 128, "v_dim": 128, "page_size": 16, "kv_dtype": "bfloat16"}
    return KVProblem(**{**given, "rows": 256, **fields})


def linear_problem(**fields: Any) -> LinearProblem:
    return LinearProblem(**{"dtype": "bfloat16", "m": 8, "n": 256, "k": 256, "scheme": "int8", **fields})


@pytest.mark.parametrize(
    "name, problem, said",
    [
        ("attend", attend_problem(page_size=24), "the nearest are 16 and 32"),
        ("attend", attend_problem(page_size=8), "the nearest is 16"),
        ("attend", attend_problem(dtype="float32", kv_dtype="float32", page_size=8, pages=1024), "pages of 16 tokens"),
        ("attend", attend_problem(page_size=65_536, pages=1), "the nearest page_size that works is"),
        ("attend", attend_problem(dtype="float64", kv_dtype="float64"), "the nearest that works is float32"),
        ("attend", attend_problem(kv_dtype="float32"), "pages of bfloat16"),
        ("write_kv", kv_problem(page_size=40), "the nearest are 32 and 48"),
        ("write_kv", kv_problem(rows=200_000), "the nearest that works is"),
        ("linear_int8", linear_problem(n=200), "the nearest are 128 and 256"),
        ("linear_int8", linear_problem(k=100), "the nearest is 128"),
        ("linear_int8", linear_problem(scheme="fp8"), "'int8' alone"),
        ("linear_fp8", linear_problem(scheme="fp8", group_size=128), "the nearest that works is 0"),
    ],
)
def test_a_reason_names_the_nearest_that_works(name: str, problem: Any, said: str) -> None:
    reason = made(f"pallas_{name}").supports(problem)
    assert reason is not None and said in reason


def test_realistic_problems_are_taken_on_every_chip() -> None:
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        for page_size in (16, 32, 64, 128):
            fields = {"page_size": page_size, "pages": 8192 // page_size}
            for shares in ({}, {"q_heads": 4, "kv_heads": 1}, {"tokens": 2048, "max_query": 2048}):
                for dtype in ("bfloat16", "float32"):
                    problem = attend_problem(dtype=dtype, kv_dtype=dtype, **fields, **shares)
                    assert made("pallas_attend", chip=chip).supports(problem) is None
            assert made("pallas_write_kv", chip=chip).supports(kv_problem(page_size=page_size)) is None
