"""Every XLA kernel on every smoke case of its op that it supports, compiled, and what kernels decline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, LINEAR_SCHEMES, quantize_rows
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft_contract.problems import KVProblem, LinearProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_jax.arrays import to_host
from lineshaft_jax.kernels import xla_kernels
from lineshaft_jax.kernels.attend import attend
from lineshaft_jax.kernels.linear import quantized_rows
from lineshaft_jax.kernels.pages import LAYOUT, cache_specs, from_canonical, to_canonical

OPS = {name: spec for name, spec in all_ops().items() if not spec.collective}
KERNELS = [kernel for kernel in xla_kernels("xla") if kernel.op in OPS and not kernel.layout.endswith("_rows")]
LANES = (1, 128)
COMPOSED = {"expert_mlp", "latent_attend", "rope_write_kv"}
"""Composites whose default decomposition is what there is."""


@cache
def cases_of(op: str) -> tuple[Case, ...]:
    return tuple(OPS[op].cases(np.random.default_rng(2024), "smoke"))


def takes(kernel: Kernel, case: Case) -> bool:
    return not case.problem.features() - kernel.handles and kernel.supports(case.problem) is None


class Arguments:
    """A case's arguments: arrays, which a compiled function is given, and all else, which is known when tracing."""

    def __init__(self, case: Case, lanes: int) -> None:
        self.case, self.lanes = case, lanes
        places = [i for i, value in enumerate(case.args) if isinstance(value, CacheArg)]
        self.cache_at = places[0] if places else -1
        self.leaves = (
            [self._leaf(value, i == self.cache_at) for i, value in enumerate(case.args)],
            {name: self._leaf(value, False) for name, value in case.kwargs.items()},
        )

    @property
    def statics(self) -> str:
        """What is known when tracing, besides the problem."""
        return repr(
            [getattr(value, "shape", value) for value in self.case.args if not isinstance(value, Mapping | CacheArg)]
        )

    def _leaf(self, value: Any, cache: bool) -> Any:
        host = operand(value, self.case.problem)
        if isinstance(value, StepArg):
            return jax.tree.map(jnp.asarray, dict(value.arrays))
        if cache:
            like = cache_like(self.case.problem, host, self.lanes)
            return from_canonical(canonical_problem(self.case.problem, host), jax.tree.map(jnp.asarray, host), like)
        if isinstance(host, Mapping):
            return jax.tree.map(jnp.asarray, dict(host))
        if isinstance(host, list):
            return [jnp.asarray(item) for item in host]
        return jnp.asarray(host) if isinstance(host, np.ndarray) else None

    def rebuilt(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """What the kernel takes, from (traced) leaves."""
        whole = [
            self._argument(value, leaf, i) for i, (value, leaf) in enumerate(zip(self.case.args, args, strict=True))
        ]
        return whole, kwargs

    def _argument(self, value: Any, leaf: Any, place: int) -> Any:
        if isinstance(value, WeightArg):
            return Weight(0, "w", {value.kind: self.case.problem}, "dense", {"data": leaf})
        if isinstance(value, StepArg):
            return StepInputs(leaf, value.shape)
        if place == self.cache_at:
            return Cache(0, self.case.problem, LAYOUT, leaf)
        return value if leaf is None else leaf


def canonical_problem(problem: Any, pages: Mapping[str, Any]) -> Any:
    """The KVProblem of pages that a case gives for `problem`, which may be one of attention."""
    if isinstance(problem, KVProblem):
        return problem
    fields = {
        name: getattr(problem, name) for name in ("dtype", "kv_heads", "qk_dim", "page_size", "kv_dtype", "kv_scheme")
    }
    return KVProblem(**fields, v_dim=pages["v"].shape[-1] if "v" in pages else 0)


def cache_like(problem: Any, pages: Mapping[str, Any], lanes: int) -> dict[str, Any]:
    specs = cache_specs(canonical_problem(problem, pages), len(pages["k"]), lanes)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in specs.items()}


def host_result(result: Any, case: Case) -> Any:
    if isinstance(result, Cache):
        return {name: to_host(x) for name, x in to_canonical(result.problem, result.arrays).items()}
    return jax.tree.map(to_host, result)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling is what these tests spend their time on; what a session's options give was found to agree."""

_COMPILED: dict[Any, Any] = {}


def compiled(kernel: Kernel, case: Case, arguments: Arguments) -> Any:
    """The kernel as a compiled function of the case's leaves, shared by cases of one problem."""
    key = kernel.name, case.problem, arguments.lanes, arguments.statics
    if key not in _COMPILED:
        bound = kernel.bind(case.problem, None)

        def run(args: list[Any], kwargs: dict[str, Any]) -> Any:
            whole, named = arguments.rebuilt(args, kwargs)
            result = bound(*whole, **named)
            return result.arrays if isinstance(result, Cache) else result

        _COMPILED[key] = jax.jit(run, compiler_options=QUICK)
    return _COMPILED[key]


def run_case(kernel: Kernel, case: Case, lanes: int) -> list[str]:
    """What `compare` finds wrong with the kernel's result."""
    arguments = Arguments(case, lanes)
    result = compiled(kernel, case, arguments)(*arguments.leaves)
    if OPS[kernel.op].consumes:
        result = Cache(0, case.problem, LAYOUT, result)
    return compare(OPS[kernel.op], case, host_result(result, case))


def each(kernel: Kernel, dtype: str = "") -> Iterator[Case]:
    """Every case, of `dtype` or of any, that the kernel takes: at least one."""
    taken = [case for case in cases_of(kernel.op) if takes(kernel, case) and dtype in ("", case.problem.dtype)]
    assert taken, f"{kernel.name} takes no case of {kernel.op}"
    yield from taken


def as_param(kernel: Kernel) -> Any:
    """Attention takes most of a minute to compile in each dtype, and `tox run -e tpu` certifies it on its cases too."""
    marks = [pytest.mark.full] if kernel.op == "attend" else []
    return pytest.param(kernel, id=kernel.name, marks=marks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [*map(as_param, KERNELS)])
def test_kernel_computes_what_the_reference_does(kernel: Kernel, dtype: str) -> None:
    assert [text for case in each(kernel, dtype) for text in run_case(kernel, case, LANES[0])] == []


@pytest.mark.parametrize("op", ["write_kv", "write_pages", "copy_slots", "read_pages", "attend"])
def test_padded_heads_change_nothing(op: str) -> None:
    """Caches as a platform with lanes keeps them; a few cases of each way to store pages."""
    kernel = next(kernel for kernel in KERNELS if kernel.op == op)
    seen: set[Any] = set()
    for case in each(kernel):
        kind = case.problem.kv_dtype, case.problem.kv_scheme, case.problem.features() == {"value_in_key"}
        if kind not in seen:
            seen.add(kind)
            assert run_case(kernel, case, LANES[1]) == []
    assert len(seen) > 4


@pytest.mark.parametrize("budget", [0, 90_000])
def test_attention_in_small_blocks_is_the_same(budget: int) -> None:
    """In next to no memory: a query, a row and a page at a time, and three rows of them."""
    kernel = next(kernel for kernel in KERNELS if kernel.op == "attend")
    small = replace(kernel, name=f"attend{budget}", bind=lambda problem, session: partial(attend, budget, problem))
    names = ("verify/gqa2", "mixed/gqa2", "mixed/softcap-sinks", "mixed/lse-no", "mixed/page_starts-lse", "verify/anc")
    names += ("decode/many_rows", "mixed/window5", "mixed/key_ranges-f32", "mixed/kv_block-f32", "prefill/mha")
    chosen = [case for case in each(small, "float32") if case.id.startswith(names)]
    assert len(chosen) >= len(names)
    assert [text for case in chosen for text in run_case(small, case, LANES[0])] == []


def test_there_is_a_kernel_for_every_op_but_composites() -> None:
    assert {kernel.op for kernel in xla_kernels("xla")} == set(all_ops()) - COMPOSED
    assert all(kernel.backend == "xla" and kernel.priority == 0 for kernel in xla_kernels("xla"))


@pytest.mark.parametrize("kernel", xla_kernels("xla"), ids=lambda kernel: kernel.name)
def test_widths_that_would_be_computed_in_others_are_declined(kernel: Kernel) -> None:
    for case in all_ops()[kernel.op].cases(np.random.default_rng(0), "smoke"):
        for dtype, reason in (("float64", "at most 32 bits"), ("float8_e4m3fn", "16 bits and more")):
            assert reason in str(kernel.supports(replace(case.problem, dtype=dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_of_codes_multiply_as_their_values_do(scheme: str, dtype: str, tokens: int) -> None:
    """x @ (q * scale)^T + bias, against the same in float64."""
    rng, out, width = np.random.default_rng(7), 24, 96
    codes = rng.integers(-127, 128, (out, width)).astype(np.int8)
    q = codes if scheme == "int8" else (codes / 16).astype(jnp.float8_e4m3fn)
    scale, bias = rng.uniform(0.01, 0.1, out).astype(np.float32), rng.standard_normal(out).astype(jnp.dtype(dtype))
    x = rng.standard_normal((tokens, width)).astype(jnp.dtype(dtype))
    problem = LinearProblem(dtype=dtype, m=tokens, n=out, k=width, scheme=scheme, bias=True)
    kernel = next(k for k in xla_kernels("xla") if k.name == f"xla_linear_{scheme}")
    assert kernel.supports(problem) is None
    assert problem.features() <= kernel.handles
    weight = Weight(0, "w", {"linear": problem}, kernel.layout, {"q": jnp.asarray(q), "scale": jnp.asarray(scale)})
    got = to_host(jax.jit(lambda a, b: kernel.bind(problem, None)(a, weight, bias=b))(x, bias))
    exact = x.astype(np.float64) @ (q.astype(np.float64) * scale[:, None]).T + bias.astype(np.float64)
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-23 * width**0.5
    assert got.dtype == x.dtype
    assert np.abs(got.astype(np.float64) - exact).max() <= unit * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_codes_and_scales_of_activations_are_those_of_the_rule(scheme: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 96)) * 2.0 ** rng.uniform(-100, 100, (60, 1))
    x[0], x[1, 3], x[2, 4] = 0, np.nan, -np.inf
    x[4], x[5] = rng.integers(-20, 20, (2, 96)) + 0.5
    x[4, 0], x[5, 0] = 127, 448
    x = x.astype(jnp.dtype(dtype))
    codes, scales = jax.jit(partial(quantized_rows, scheme=scheme))(jnp.asarray(x))
    expected, steps = quantize_rows(x, scheme)
    assert to_host(codes).tobytes() == expected.tobytes()
    np.testing.assert_array_equal(to_host(scales)[:, 0], steps)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_each_scheme_are_within_tolerance_of_the_reference(scheme: str, dtype: str) -> None:
    kernel = next(k for k in xla_kernels("xla") if k.name == f"xla_linear_{scheme}")
    cases = [case for case in each(kernel, dtype) if case.problem.m <= 3]
    assert {case.problem.scheme for case in cases} == {scheme} and len(cases) >= 5
    for case in cases:
        host = [operand(value, case.problem) for value in case.args]
        param = Param("w", "w", host[1].shape, dtype, {"linear": case.problem}, lambda checkpoint, at: Local(()))
        assert kernel.pack is not None
        leaves = kernel.pack(param, Local((Stored("none", host[1].shape, {"data": host[1]}),)))
        weight = Weight(0, "w", param.problems, kernel.layout, jax.tree.map(jnp.asarray, leaves))
        given = {name: operand(value, case.problem) for name, value in case.kwargs.items()}
        got = jax.jit(lambda x, more, w=weight, p=case.problem: kernel.bind(p, None)(x, w, **more))(host[0], given)
        assert compare(OPS["linear"], case, to_host(got)) == []


def test_a_kernel_of_codes_takes_no_other_scheme() -> None:
    kernels = {kernel.name: kernel for kernel in xla_kernels("xla")}
    problem = LinearProblem(dtype="float32", m=1, n=8, k=8, scheme="fp8")
    assert "scheme 'int8', not 'fp8'" in str(kernels["xla_linear_int8"].supports(problem))
    assert "scheme 'fp8', not 'none'" in str(kernels["xla_linear_fp8"].supports(replace(problem, scheme="none")))
    assert "scheme" not in kernels["xla_linear"].handles
