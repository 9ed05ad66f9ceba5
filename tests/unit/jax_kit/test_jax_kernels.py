"""Every XLA kernel on every smoke case of its op that it supports, compiled, and what kernels decline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineshaft.contract.kernels import Kernel
from lineshaft.contract.ops import Case, all_ops
from lineshaft.contract.ops.run import compare, operand
from lineshaft.contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft.contract.sessions import Cache
from lineshaft.contract.steps import StepInputs
from lineshaft.contract.weights import Weight
from lineshaft_jax.arrays import to_host
from lineshaft_jax.kernels import xla_kernels
from lineshaft_jax.kernels.pages import LAYOUT, cache_specs, from_canonical, to_canonical

OPS = {name: spec for name, spec in all_ops().items() if not spec.collective}
KERNELS = [kernel for kernel in xla_kernels("xla") if kernel.op in OPS and not kernel.layout.endswith("_rows")]
LANES = (1, 128)
COMPOSED = {"expert_mlp", "latent_attend"}
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
    from lineshaft.contract.problems import KVProblem

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


def run_case(kernel: Kernel, case: Case, lanes: int, compiled: bool = True) -> list[str]:
    """What `compare` finds wrong with the kernel's result."""
    arguments, bound = Arguments(case, lanes), kernel.bind(case.problem, None)

    def run(args: list[Any], kwargs: dict[str, Any]) -> Any:
        whole, named = arguments.rebuilt(args, kwargs)
        result = bound(*whole, **named)
        return result.arrays if isinstance(result, Cache) else result

    result = (jax.jit(run) if compiled else run)(*arguments.leaves)
    if OPS[kernel.op].consumes:
        result = Cache(0, case.problem, LAYOUT, result)
    return compare(OPS[kernel.op], case, host_result(result, case))


def each(kernel: Kernel) -> Iterator[Case]:
    taken = [case for case in cases_of(kernel.op) if takes(kernel, case)]
    assert taken, f"{kernel.name} takes no case of {kernel.op}"
    yield from taken


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernel_computes_what_the_reference_does(kernel: Kernel) -> None:
    assert [text for case in each(kernel) for text in run_case(kernel, case, LANES[0])] == []
