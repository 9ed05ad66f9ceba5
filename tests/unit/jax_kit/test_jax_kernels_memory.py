"""What compiled programs hold: writes are in place where the cache is donated, attention stays within its budget."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lineshaft_contract.problems import AttendProblem, KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs, StepShape
from lineshaft_jax.kernels import xla_kernels
from lineshaft_jax.kernels.pages import LAYOUT, cache_specs

MIB = 2**20
PAGES = 8192
Spec = Callable[[tuple[int, ...], Any], jax.ShapeDtypeStruct]


@pytest.fixture(scope="module")
def chip() -> Spec:
    """Arrays on a TPU v5e that is not there: its compiler needs none."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1), num_slices=1
    )
    sharding = NamedSharding(Mesh(np.array(found.devices[:1]), ("x",)), PartitionSpec())
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def kernel_of(op: str, memory_mib: int = 256) -> Any:
    return next(kernel for kernel in xla_kernels("xla", memory_mib) if kernel.op == op)


def memory_of(run: Any, *args: Any) -> Any:
    return jax.jit(run, donate_argnums=0).lower(*args).compile().memory_analysis()


def cache_of(problem: KVProblem, pages: int, lanes: int, spec: Spec) -> tuple[dict[str, Any], int]:
    arrays = {name: spec(shape, dtype) for name, (shape, dtype) in cache_specs(problem, pages, lanes).items()}
    return arrays, sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())


def check_write(problem: KVProblem, lanes: int, spec: Spec, tokens: int) -> None:
    arrays, size = cache_of(problem, PAGES, lanes, spec)
    bound, new = kernel_of("write_kv").bind(problem, None), (tokens, problem.kv_heads, problem.qk_dim)
    shape = StepShape(tokens=tokens, rows=1, pages=(1,), logits=1, max_query=tokens)

    def run(held: dict[str, Any], k: Any, v: Any, slots: Any, scales: Any) -> Any:
        step = StepInputs({"slots.0": slots}, shape)
        named = {} if problem.kv_scheme == "none" else {"kv_scales": scales}
        return bound(Cache(0, problem, LAYOUT, held), k, v, step, **named).arrays

    one = spec(new, problem.dtype)
    found = memory_of(run, arrays, one, one, spec((tokens,), jnp.int32), spec((2,), jnp.float32))
    assert found.alias_size_in_bytes == size
    assert found.temp_size_in_bytes < size / 8


def kv_problem(kv_heads: int, dtype: str, **fields: Any) -> KVProblem:
    given = {"qk_dim": 64, "v_dim": 64, "page_size": 16, "kv_dtype": dtype, **fields}
    return KVProblem(dtype=dtype, kv_heads=kv_heads, **given)


WRITES = {
    **{f"{dtype}-heads{n}": kv_problem(n, dtype) for dtype in ("float32", "bfloat16") for n in (1, 2, 8)},
    "fp8": kv_problem(2, "bfloat16", kv_dtype="float8_e4m3fn"),
    "token_head": kv_problem(2, "float32", kv_dtype="int8", kv_scheme="token_head"),
}


@pytest.mark.parametrize("tokens", [4, 2048])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_copies_no_cache_on_the_cpu(name: str, tokens: int) -> None:
    check_write(WRITES[name], 1, jax.ShapeDtypeStruct, tokens)


@pytest.mark.parametrize("tokens", [4, 2048])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_copies_no_cache_on_a_tpu(name: str, tokens: int, chip: Spec) -> None:
    check_write(WRITES[name], 128, chip, tokens)


@pytest.mark.parametrize("op", ["write_pages", "copy_pages", "copy_slots"])
@pytest.mark.parametrize("place", ["cpu", "tpu"])
def test_moving_pages_copies_no_cache(op: str, place: str, request: pytest.FixtureRequest) -> None:
    problem, tpu = kv_problem(2, "bfloat16"), place == "tpu"
    spec = request.getfixturevalue("chip") if tpu else jax.ShapeDtypeStruct
    arrays, size = cache_of(problem, PAGES, 128 if tpu else 1, spec)
    bound, ids = kernel_of(op).bind(problem, None), spec((4,), jnp.int32)
    pages = {name: spec((4, *shape), dtype) for name, (shape, dtype) in problem.page_arrays.items()}
    others = (ids, pages) if op == "write_pages" else (ids, ids)
    found = memory_of(lambda held, *args: bound(Cache(0, problem, LAYOUT, held), *args).arrays, arrays, *others)
    assert found.alias_size_in_bytes == size
    assert found.temp_size_in_bytes < size / 8


ATTENDS = {
    "decode": {"tokens": 32, "rows": 32, "max_query": 1, "pages": 512},
    "verify": {"tokens": 64, "rows": 16, "max_query": 4, "pages": 512},
    "prefill": {"tokens": 1024, "rows": 1, "max_query": 1024, "pages": 512},
    "mixed": {"tokens": 1024, "rows": 64, "max_query": 1024, "pages": 512},
}


@pytest.mark.parametrize("memory_mib", [256, 4])
@pytest.mark.parametrize("name", ATTENDS)
@pytest.mark.parametrize("place", ["cpu", "tpu"])
def test_attention_over_long_contexts_keeps_to_its_budget(
    place: str, name: str, memory_mib: int, request: pytest.FixtureRequest
) -> None:
    """Besides what is as long as the step itself: its queries and results, once as they come and once padded."""
    tpu, sizes = place == "tpu", ATTENDS[name]
    spec = request.getfixturevalue("chip") if tpu else jax.ShapeDtypeStruct
    heads = {"q_heads": 8, "kv_heads": 2, "page_size": 16}
    problem = AttendProblem(dtype="bfloat16", kv_dtype="bfloat16", qk_dim=64, v_dim=64, scale=0.125, **heads, **sizes)
    kernel = kernel_of("attend", memory_mib)
    assert kernel.supports(problem) is None
    tokens, rows, pages = problem.tokens, problem.rows, problem.pages
    arrays, _ = cache_of(kv_problem(2, "bfloat16"), 1 + rows * pages, 128 if tpu else 1, spec)
    inputs = {
        "query_starts": spec((rows + 1,), jnp.int32), "page_table.0": spec((rows, pages), jnp.int32),
        "context_lens.0": spec((rows,), jnp.int32),
    }  # fmt: skip
    shape = StepShape(tokens=tokens, rows=rows, pages=(pages,), logits=1, max_query=problem.max_query)
    bound = kernel.bind(problem, None)

    def run(q: Any, held: Any, step: Any) -> Any:
        return bound(q, Cache(0, problem, LAYOUT, held), StepInputs(step, shape))

    found = memory_of(run, spec((tokens, 8, 64), jnp.bfloat16), arrays, inputs)
    step_bytes = tokens * 8 * 128 * 4
    assert found.temp_size_in_bytes < memory_mib * MIB + 4 * step_bytes
