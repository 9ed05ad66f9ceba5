"""Collectives over mesh axes. All are pure and tiled; a dim that the axis does not divide is a ContractViolation.

References take and return a list with one array per member, in row-major order of the axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import seeded, short, variants
from lineshaft_contract.ops.checks import array_spec, refuse
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance
from lineshaft_contract.problems import CollectiveProblem, itemsize
from lineshaft_contract.steps import ArraySpec

Members = Sequence[HostArray]
Axis = str | tuple[str, ...]

_STATICS: dict[str, tuple[str, ...]] = {
    "all_reduce": (), "all_gather": ("dim",), "reduce_scatter": ("dim",), "all_to_all": ("split_dim", "concat_dim"),
    "broadcast": ("src",), "permute": ("shift",),
}  # fmt: skip


def specs() -> tuple[OpSpec, ...]:
    sums = Tolerance(depth=lambda p: p.size)
    moves = Tolerance(exact=True)
    return (
        _spec("all_reduce", "all_reduce(x, axis) -> the sum over members", all_reduce, sums),
        _spec("all_gather", "all_gather(x, axis, dim) -> members joined along dim", all_gather, moves),
        _spec("reduce_scatter", "reduce_scatter(x, axis, dim) -> this member's tile of the sum", reduce_scatter, sums),
        _spec("all_to_all", "all_to_all(x, axis, split_dim, concat_dim) -> own tile of each member", all_to_all, moves),
        _spec("broadcast", "broadcast(x, axis, src) -> x of member src", broadcast, moves),
        _spec("permute", "permute(x, axis, shift) -> x of the member `shift` before, cyclic", permute, moves),
    )


def _spec(name: str, signature: str, reference: Callable[..., list[HostArray]], tolerance: Tolerance) -> OpSpec:
    return OpSpec(
        name=name,
        signature=signature,
        problem=CollectiveProblem,
        specialise=lambda base, call: _specialise(name, call),
        infer=lambda p, call: ArraySpec(_shape(name, p), p.dtype),
        reference=reference,
        cases=lambda rng, size: _cases(name, rng, size),
        tolerance=tolerance,
        required=False,
        collective=True,
        flops=lambda p: (p.size - 1) * math.prod(p.shape) if "reduce" in name else 0,
        moved=lambda p: (math.prod(p.shape) + math.prod(_shape(name, p))) * itemsize(p.dtype),
    )


# ---- references ------------------------------------------------------------------------------------------------


def all_reduce(p: CollectiveProblem, xs: Members, axis: Axis, *, num: Numerics = EXACT) -> list[HostArray]:
    """Every member gets the sum, accumulated in member order and rounded once."""
    total = num.save(_sum(xs, num))
    return [total.copy() for _ in xs]


def all_gather(p: CollectiveProblem, xs: Members, axis: Axis, dim: int, *, num: Numerics = EXACT) -> list[HostArray]:
    """Every member gets all members' arrays, joined along `dim` in member order."""
    whole = num.save(np.concatenate([num.load(x) for x in xs], axis=dim))
    return [whole.copy() for _ in xs]


def reduce_scatter(
    p: CollectiveProblem, xs: Members, axis: Axis, dim: int, *, num: Numerics = EXACT
) -> list[HostArray]:
    """Member m gets tile m along `dim` of the sum."""
    return [num.save(tile) for tile in np.split(_sum(xs, num), len(xs), axis=dim)]


def all_to_all(
    p: CollectiveProblem, xs: Members, axis: Axis, split_dim: int, concat_dim: int, *, num: Numerics = EXACT
) -> list[HostArray]:
    """Member m gets tile m along `split_dim` of every member, joined along `concat_dim` in member order."""
    tiles = [np.split(num.load(x), len(xs), axis=split_dim) for x in xs]
    return [num.save(np.concatenate([own[m] for own in tiles], axis=concat_dim)) for m in range(len(xs))]


def broadcast(p: CollectiveProblem, xs: Members, axis: Axis, src: int, *, num: Numerics = EXACT) -> list[HostArray]:
    """Every member gets what member `src` has."""
    return [num.save(num.load(xs[src]).copy()) for _ in xs]


def permute(p: CollectiveProblem, xs: Members, axis: Axis, shift: int, *, num: Numerics = EXACT) -> list[HostArray]:
    """Member m gets what member (m - shift) mod size has."""
    return [num.save(num.load(xs[(m - shift) % len(xs)]).copy()) for m in range(len(xs))]


def _sum(xs: Members, num: Numerics) -> HostArray:
    total = num.load(xs[0]).copy()
    for x in xs[1:]:
        total = total + num.load(x)
    return total


# ---- shapes ----------------------------------------------------------------------------------------------------


def axis_names(axis: Any) -> tuple[str, ...]:
    """The axes that a collective runs over: a name or a tuple of names, as a tuple."""
    return (axis,) if isinstance(axis, str) else tuple(axis)


def _specialise(op: str, call: Call) -> CollectiveProblem:
    if len(call.args) < 2:
        refuse(op, f"{len(call.args)} positional arguments", "x and axis")
    x = array_spec(op, "x", call.args[0])
    axes = _axes(op, call.args[1], call.degrees)
    statics = _statics(op, call.args[2:], call.kwargs)
    size = math.prod(call.degrees[name] for name in axes)
    problem = CollectiveProblem(dtype=x.dtype, axis=axes, size=size, shape=x.shape, **statics)
    _check(op, problem)
    return problem


def _axes(op: str, axis: Any, degrees: Mapping[str, int]) -> tuple[str, ...]:
    axes = axis_names(axis) if isinstance(axis, (str, tuple)) else ()
    if not axes or any(type(name) is not str or name not in degrees for name in axes) or len(set(axes)) != len(axes):
        refuse(op, f"axis {axis!r}", f"one or more of {', '.join(degrees)}, each once")
    return axes


def _statics(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """The ints of a call by the problem's field names; each is given exactly once, by position or by keyword."""
    names, given = [*_STATICS[op][: len(args)], *kwargs], [*args, *kwargs.values()]
    fits = len(names) == len(given) and sorted(names) == sorted(_STATICS[op])
    if not fits or any(type(value) is not int for value in given):
        shown = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        refuse(op, f"{shown or 'nothing'} after axis", f"ints for {', '.join(_STATICS[op]) or 'nothing more'}")
    return {"dim" if name == "split_dim" else name: value for name, value in zip(names, given, strict=True)}


def _check(op: str, p: CollectiveProblem) -> None:
    for name in _STATICS[op]:
        dim = p.concat_dim if name == "concat_dim" else p.dim
        if name.endswith("dim") and not 0 <= dim < len(p.shape):
            refuse(op, f"{name} {dim}", f"a dim of {list(p.shape)}, from 0")
    if op in ("reduce_scatter", "all_to_all") and p.shape[p.dim] % p.size:
        refuse(op, f"dim {p.dim} of {list(p.shape)}", f"a size that the {p.size} members of {'x'.join(p.axis)} divide")
    if not 0 <= p.src < p.size:
        refuse(op, f"src {p.src}", f"a member of 0 to {p.size - 1}")


def _shape(op: str, p: CollectiveProblem) -> tuple[int, ...]:
    shape = list(p.shape)
    if op in ("reduce_scatter", "all_to_all"):
        shape[p.dim] //= p.size
    if op in ("all_gather", "all_to_all"):
        shape[p.dim if op == "all_gather" else p.concat_dim] *= p.size
    return tuple(shape)


# ---- cases -----------------------------------------------------------------------------------------------------

_CALLS: dict[str, list[dict[str, int]]] = {
    "all_reduce": [{}],
    "all_gather": [{"dim": 0}, {"dim": 1}],
    "reduce_scatter": [{"dim": 0}, {"dim": 1}],
    "all_to_all": [{"dim": 0, "concat_dim": 1}, {"dim": 1, "concat_dim": 0}, {"dim": 1, "concat_dim": 1}],
    "broadcast": [{"src": 0}, {"src": 1}],
    "permute": [{"shift": 1}, {"shift": -1}, {"shift": 6}],
}
_WHY = {
    "all_reduce": "summed in float32 and rounded once", "reduce_scatter": "member m gets tile m of the sum",
    "all_gather": "members are joined in row-major order of the axes",
    "all_to_all": "member m gets tile m of every member, in member order", "permute": "cyclic in both directions",
}  # fmt: skip
_MESHES: dict[str, tuple[tuple[str, ...], int]] = {
    "tp2": (("tp",), 2), "tp3": (("tp",), 3), "dp2xtp2": (("dp", "tp"), 4),
}  # fmt: skip


def _cases(op: str, rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for mesh, dtype in variants(size, _MESHES):
        axes, members = _MESHES[mesh]
        for statics in _CALLS[op]:
            label = "".join(f"-{name}{value}" for name, value in statics.items())
            case_id = f"{mesh}{label}-{short(dtype)}"
            shape = (2 * members, 3 * members)
            xs = list(draw(case_id).standard_normal((members, *shape)))
            problem = CollectiveProblem(dtype=dtype, axis=axes, size=members, shape=shape, **statics)
            axis: Axis = axes if len(axes) > 1 else axes[0]
            yield Case(case_id, problem, (xs, axis, *statics.values()), why=_WHY.get(op, ""))
