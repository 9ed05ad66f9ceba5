"""The Pallas kernels compiled ahead of time for each generation: the compiler rejects what the interpreter takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem
from lineshaft_tpu.chips import CHIPS, parse_topology
from lineshaft_tpu.devices import topology_devices
from lineshaft_tpu.inspection import inspect
from lineshaft_tpu.pallas import attend_blocks
from lineshaft_tpu.pallas.attend import attend
from lineshaft_tpu.pallas.linear import linear
from lineshaft_tpu.pallas.recipes import attend_reason, linear_reason, write_reason
from lineshaft_tpu.pallas.write_kv import write_kv
from lineshaft_tpu.tiling import LANES, padded, usable_vmem

AIMED = ("v5e", "v5p", "v6e", "tpu7x")

Compile = Callable[..., Any]


@pytest.fixture(scope="module")
def compile_for() -> Compile:
    """(chip, function, *(shape, dtype), donate) -> the compiled program; the compiler needs no device."""

    def run(chip: str, fn: Callable[..., Any], *specs: Any, donate: tuple[int, ...] = ()) -> Any:
        devices = topology_devices(parse_topology(chip))
        sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
        args = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in specs]
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile()

    return run


def attend_problem(share: str, dtype: str, page_size: int, **fields: Any) -> AttendProblem:
    q_heads, kv_heads = {"whole": (32, 8), "tp8": (4, 1)}[share]
    given = {"tokens": 256, "rows": 256, "max_query": 1, **fields}
    return AttendProblem(
        dtype=dtype, q_heads=q_heads, kv_heads=kv_heads, qk_dim=128, v_dim=128, page_size=page_size, scale=128**-0.5,
        kv_dtype=dtype, pages=8192 // page_size, **given,
    )  # fmt: skip


def compiled_attend(compile_for: Compile, chip: str, problem: AttendProblem) -> Any:
    pool = (4097, problem.kv_heads, problem.page_size, padded(problem.qk_dim, LANES))
    specs = [
        ((problem.tokens, problem.q_heads, problem.qk_dim), problem.dtype), (pool, problem.kv_dtype),
        (pool, problem.kv_dtype), ((problem.rows + 1,), "int32"), ((problem.rows, problem.pages), "int32"),
        ((problem.rows,), "int32"),
    ]  # fmt: skip
    if problem.sinks:
        specs.append(((problem.q_heads,), problem.dtype))

    def run(*args: Any) -> Any:
        return attend(problem, CHIPS[chip], *args[:6], sinks=args[6] if problem.sinks else None)

    return compile_for(chip, run, *specs)


MIXED = {"tokens": 2048, "max_query": 2048}
FEATURES = {"tokens": 512, "rows": 8, "max_query": 512, "window": 1024, "softcap": 30.0, "sinks": True}
ATTENDS = {
    "decode-page16": attend_problem("whole", "bfloat16", 16),
    "prefill-page128": attend_problem("whole", "bfloat16", 128, **MIXED),
    "tp8-mixed-page16-f32": attend_problem("tp8", "float32", 16, **MIXED),
    "features-page64": attend_problem("whole", "bfloat16", 64, **FEATURES),
    "decode-page32-f32": attend_problem("whole", "float32", 32),
    "lse-page64": attend_problem("whole", "bfloat16", 64, tokens=512, rows=8, max_query=512, return_lse=True),
}
LONG = ("prefill-page128", "decode-page32-f32", "lse-page64")


@pytest.mark.parametrize("chip", AIMED)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in LONG else name for name in ATTENDS]
)
def test_attend_compiles_within_vmem(compile_for: Compile, chip: str, name: str) -> None:
    problem, where = ATTENDS[name], CHIPS[chip]
    assert attend_reason(where, problem) is None
    compiled = compiled_attend(compile_for, chip, problem)
    report = inspect(compiled.as_text)
    planned = attend_blocks.vmem_bytes(problem, attend_blocks.blocks(problem, where))
    assert "lineshaft_attend" in compiled.as_text()
    assert planned <= attend_blocks.budget(where)
    assert 0 < int(report["vmem_bytes"]) <= min(2 * planned, usable_vmem(where))
    assert int(report["mxu"]) >= 2
    queries = problem.tokens * problem.q_heads * problem.qk_dim * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * queries + 2**20  # never a copy of the pages


def test_a_page_table_too_large_is_declined_and_the_nearest_compiles(compile_for: Compile) -> None:
    large = attend_problem("tp8", "float32", 8)
    reason = attend_reason(CHIPS["v5e"], large)
    assert reason is not None and "pages of 16 tokens" in reason
    with pytest.raises(jax.errors.JaxRuntimeError, match="smem"):
        compiled_attend(compile_for, "v5e", large)
    assert attend_reason(CHIPS["v5e"], attend_problem("tp8", "float32", 16)) is None
    compiled_attend(compile_for, "v5e", attend_problem("tp8", "float32", 16))


@pytest.mark.parametrize("chip", AIMED)
@pytest.mark.parametrize("rows, heads, page_size, dtype", [(256, 8, 16, "bfloat16"), (2048, 3, 24, "float32")])
def test_write_kv_compiles_in_place(
    compile_for: Compile, chip: str, rows: int, heads: int, page_size: int, dtype: str
) -> None:
    problem = KVProblem(
        dtype=dtype, kv_heads=heads, qk_dim=128, v_dim=128, page_size=page_size, kv_dtype=dtype, rows=rows
    )
    assert write_reason(CHIPS[chip], problem) is None
    pool, new = (40_001, heads, page_size, 128), (rows, heads, 128)

    def run(k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any) -> Any:
        return write_kv(problem, CHIPS[chip], (k_pages, v_pages), (k, v), slots, interpret=False)

    specs = [(pool, dtype)] * 2 + [(new, dtype)] * 2 + [((rows,), "int32")]
    memory = compile_for(chip, run, *specs, donate=(0, 1)).memory_analysis()
    pages = int(np.prod(pool)) * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= 2 * pages
    assert memory.temp_size_in_bytes < pages // 8


@pytest.mark.parametrize("chip", AIMED)
@pytest.mark.parametrize(
    "scheme, codes, dtype, m", [("int8", "int8", "bfloat16", 8), ("fp8", "float8_e4m3fn", "bfloat16", 300)]
)
def test_linear_compiles(compile_for: Compile, chip: str, scheme: str, codes: str, dtype: str, m: int) -> None:
    problem = LinearProblem(dtype=dtype, m=m, n=14_336, k=4096, scheme=scheme)
    assert linear_reason(CHIPS[chip], scheme, problem) is None

    def run(x: Any, q: Any, scale: Any) -> Any:
        return linear(problem, CHIPS[chip], x, q, scale)

    specs = [((m, 4096), dtype), ((14_336, 4096), codes), ((14_336,), "float32")]
    compiled = compile_for(chip, run, *specs)
    report = inspect(compiled.as_text)
    assert "lineshaft_quantized_linear" in compiled.as_text() and report["mxu"] == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 14_336 * 4096 // 4  # the weight is never widened in memory


def test_float32_products_fit_where_vmem_is_smallest(compile_for: Compile) -> None:
    problem = LinearProblem(dtype="float32", m=256, n=512, k=4096, scheme="int8")
    specs = [((256, 4096), "float32"), ((512, 4096), "int8"), ((512,), "float32")]
    compile_for("v4", lambda *args: linear(problem, CHIPS["v4"], *args), *specs)


def test_a_report_counts_the_compilers_own_products(compile_for: Compile) -> None:
    def run(x: Any, y: Any) -> Any:
        return jnp.tanh(x @ y) @ y

    report = inspect(compile_for("v5e", run, *[((512, 512), "bfloat16")] * 2).as_text)
    assert report["mxu"] == 2 and int(report["vmem_bytes"]) > 0
