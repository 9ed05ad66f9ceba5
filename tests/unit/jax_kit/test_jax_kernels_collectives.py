"""The collective kernels inside of a function mapped over a mesh of virtual devices, subgroups among them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lineshaft.errors import ContractViolation
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.problems import CollectiveProblem
from lineshaft_jax.arrays import to_host
from lineshaft_jax.kernels import xla_kernels

OPS = {name: spec for name, spec in all_ops().items() if spec.collective}
KERNELS = {kernel.op: kernel for kernel in xla_kernels("xla")}
MESHES: dict[str, dict[str, int]] = {
    "tp2": {"tp": 2}, "tp3": {"tp": 3}, "dp2xtp2": {"dp": 2, "tp": 2}, "tp2xdp2": {"tp": 2, "dp": 2},
}  # fmt: skip


def mesh_of(degrees: dict[str, int]) -> Mesh:
    count = math.prod(degrees.values())
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(degrees.values())), tuple(degrees))


def over_mesh(mesh: Mesh, run: Any, stacked: Any) -> Any:
    """`run` on stacked[i] at device i of the mesh, in the mesh's order; the results likewise stacked."""
    spec = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(lambda x: run(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return to_host(jax.jit(mapped)(stacked))


def places(mesh: Mesh, axes: tuple[str, ...]) -> list[list[int]]:
    """The groups over `axes`: devices by their place in the mesh, in row-major order of `axes`."""
    index = np.arange(mesh.size).reshape(mesh.devices.shape)
    own = [mesh.axis_names.index(name) for name in axes]
    others = [i for i in range(index.ndim) if i not in own]
    groups: list[list[int]] = (
        index.transpose(*others, *own).reshape(-1, math.prod(index.shape[i] for i in own)).tolist()
    )
    return groups


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("op", OPS)
def test_every_group_gets_what_the_reference_gives(op: str, name: str) -> None:
    mesh, wrong, seen = mesh_of(MESHES[name]), [], 0
    for case in OPS[op].cases(np.random.default_rng(5), "smoke"):
        axes = case.problem.axis
        if set(axes) <= set(mesh.axis_names) and math.prod(mesh.shape[a] for a in axes) == case.problem.size:
            seen += 1
            wrong += check(op, case, mesh)
    assert wrong == []
    assert seen


def check(op: str, case: Case, mesh: Mesh) -> list[str]:
    """Errors of a case that each group of the mesh runs, group n with its members' operands scaled by 2^n."""
    groups = places(mesh, case.problem.axis)
    members, axis, *statics = case.args
    cases = [Case(case.id, case.problem, ([x * 2.0**n for x in members], axis, *statics)) for n in range(len(groups))]
    stacked = np.zeros((mesh.size, *members[0].shape), operand(members[0], case.problem).dtype)
    for own, group in zip(cases, groups, strict=True):
        stacked[group] = np.stack(operand(own.args[0], case.problem))
    bound = KERNELS[op].bind(case.problem, None)
    result = over_mesh(mesh, lambda x: bound(x, axis, *statics), stacked)
    return [
        text
        for own, group in zip(cases, groups, strict=True)
        for text in compare(OPS[op], own, [result[device] for device in group])
    ]


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float32"])
def test_members_move_bits_and_sum_integers(dtype: str) -> None:
    mesh = mesh_of({"tp": 4})
    x = np.arange(4 * 8).reshape(4, 8).astype(jnp.dtype(dtype))
    if dtype != "int32":
        x[2, :3], x[0, 0] = (np.nan, -0.0, np.inf), np.nan
    problem = CollectiveProblem(dtype=dtype, axis=("tp",), size=4, shape=(8,), src=2)
    got = over_mesh(mesh, lambda a: KERNELS["broadcast"].bind(problem, None)(a, "tp", 2), x)
    assert [row.tobytes() for row in got] == [x[2].tobytes()] * 4
    if dtype == "int32":
        summed = over_mesh(mesh, lambda a: KERNELS["all_reduce"].bind(problem, None)(a, "tp"), x)
        np.testing.assert_array_equal(summed, np.tile(x.sum(0), (4, 1)))


def test_a_mesh_may_lack_axes_of_size_1() -> None:
    mesh, x = mesh_of({"tp": 2}), np.arange(8.0, dtype=np.float32).reshape(2, 4)
    problem = CollectiveProblem(dtype="float32", axis=("dp", "tp"), size=2, shape=(4,))
    bound = KERNELS["all_reduce"].bind(problem, None)
    np.testing.assert_array_equal(over_mesh(mesh, lambda a: bound(a, ("dp", "tp")), x), np.tile(x.sum(0), (2, 1)))


@pytest.mark.parametrize("op", OPS)
def test_among_one_member_nothing_is_asked_of_a_mesh(op: str) -> None:
    problem = CollectiveProblem(dtype="float32", axis=("tp",), size=1, shape=(4, 2))
    x = jnp.ones((4, 2))
    statics = {"all_reduce": (), "all_to_all": (0, 1)}.get(op, (0,))
    assert KERNELS[op].bind(problem, None)(x, "tp", *statics) is x


def test_another_mesh_than_the_plans_is_named() -> None:
    problem = CollectiveProblem(dtype="float32", axis=("tp",), size=4, shape=(4,))
    with pytest.raises(ContractViolation, match=r"4 members over tp.*'tp': 2"):
        over_mesh(mesh_of({"tp": 2}), lambda a: KERNELS["all_reduce"].bind(problem, None)(a, "tp"), np.ones((2, 4)))
