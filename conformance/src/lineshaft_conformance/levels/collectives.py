"""L3: every collective at world 1, and on a mesh of ranks: its groups, message sizes, order and replays.

Calls, references and tolerances come from the OpSpecs. A mesh of 2 x 2 has two groups of each axis, and the whole.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np

from lineshaft.errors import ContractViolation
from lineshaft.plan import Resolver, Workload, make_plan
from lineshaft_conformance.checks import Check, Found, NotClaimed, expect, require, require_dtype
from lineshaft_conformance.harness.rig import ONE, Rig
from lineshaft_conformance.harness.world import Axes, Collective, Exchange, Ranks, make_ranks, mesh_axes, outputs
from lineshaft_conformance.levels.ops import claims, deviation, refusal
from lineshaft_conformance.results import Deviation
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops import Numerics, OpSpec
from lineshaft_contract.ops.spec import EXACT, Call, Size, numpy_dtype
from lineshaft_contract.problems import CollectiveProblem, Problem
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import ArraySpec

FOUR = mesh_axes(dp=2, tp=2)
THREE = mesh_axes(tp=3)
GROUPS: Mapping[str, tuple[Axes, tuple[str, ...]]] = {
    "world": (FOUR, ("dp", "tp")), "tp": (FOUR, ("tp",)), "dp": (FOUR, ("dp",)), "tp3": (THREE, ("tp",)),
}  # fmt: skip
"""Groups that collectives run over: the mesh and the axes. The members of dp are not neighbours."""

EIGHT = mesh_axes(dp=2, tp=4)
MORE: Mapping[str, tuple[Axes, tuple[str, ...]]] = {"world8": (EIGHT, ("dp", "tp")), "tp4": (EIGHT, ("tp",))}
"""Groups of a mesh that only a session of all its ranks makes cheap; their messages are small."""

LARGE = 2**18
"""Elements of a large message: 1 MB of float32."""

TURNS = 2
"""Steps of each program, each with values of its own: one that answers from an earlier step is seen."""


@dataclass(frozen=True)
class Way:
    """One way to call an op, as a case of its OpSpec does; the shape is for a group of `members`."""

    label: str
    members: int
    dtype: str
    shape: tuple[int, ...]
    statics: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """A program of collectives on a mesh. `whole` values are small integers, so that all sums are exact."""

    id: str
    mesh: Axes
    exchange: Exchange
    rule: str
    whole: bool = False


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    specs = [spec for spec in subject.ops.values() if spec.collective]
    for spec in specs:
        ways = list(ways_of(spec, size))
        for dtype in dict.fromkeys(way.dtype for way in ways):
            yield _alone_check(spec.name, [way for way in ways if way.dtype == dtype and way.members == 2])
        trials = list(group_trials(spec.name, ways, size))
        trials += more_trials(spec.name, ways) if subject.info.single_program else []
        yield _minimum_check(spec, trials)
        yield from (_trial_check(trial, trials, spec.name) for trial in trials)
    yield from (_refusal_check(op, statics) for op, statics in (("reduce_scatter", (1,)), ("all_to_all", (1, 0))))
    order = list(order_trials())
    yield from (_trial_check(trial, order, "") for trial in order)


# ---- trials ----------------------------------------------------------------------------------------------------


def ways_of(spec: OpSpec, size: Size) -> Iterator[Way]:
    """The ways to call an op in its cases."""
    for case in spec.cases(np.random.default_rng(0), size):
        assert isinstance(case.problem, CollectiveProblem)
        label, p = case.id.partition("-")[2], case.problem
        yield Way(label, p.size, p.dtype, p.shape, tuple(case.args[2:]))


def group_trials(op: str, ways: Sequence[Way], size: Size) -> Iterator[Trial]:
    """Each way to call the op in each group, small and large; large ones at smoke in the op's first way alone."""
    for group, (mesh, axes) in GROUPS.items():
        if mesh == THREE and size == "smoke":
            continue
        rule = f"ops.{op} over {'x'.join(axes)}: each group by itself, whatever the size of the message"
        fitting = [way for way in ways if way.members == members_of(mesh, axes)]
        firsts = {way.dtype: way for way in reversed(fitting)}
        for way in fitting:
            collective = Collective(op, axes, way.statics)
            shapes = {"small": way.shape, "large": enlarged(way.shape)}
            for name in ("small", "large") if size == "full" or firsts[way.dtype] == way else ("small",):
                exchange = Exchange(way.dtype, shapes[name], (collective,))
                yield Trial(f"{op}/{group}-{name}-{way.label}", mesh, exchange, rule)


def more_trials(op: str, ways: Sequence[Way]) -> Iterator[Trial]:
    """The op's first way of four members in each dtype, in the groups of MORE; the shape grows with the group."""
    for group, (mesh, axes) in MORE.items():
        members = members_of(mesh, axes)
        firsts = {way.dtype: way for way in reversed(ways) if way.members == 4}
        for way in firsts.values():
            shape = tuple(dim * members // 4 for dim in way.shape)
            exchange = Exchange(way.dtype, shape, (Collective(op, axes, way.statics),))
            rule = f"ops.{op} over {members} of eight ranks, all of them in one program"
            yield Trial(f"{op}/{group}-small-{way.label}", mesh, exchange, rule)


def enlarged(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape with each dim as many times larger as makes it a large message."""
    factor = int((LARGE / math.prod(shape)) ** (1 / len(shape)))
    return tuple(dim * factor for dim in shape)


def order_trials() -> Iterator[Trial]:
    """Programs of several collectives."""
    flight = (
        Collective("all_reduce", ("tp",)), Collective("all_gather", ("dp",), (0,)), Collective("all_reduce", ("dp",)),
        Collective("broadcast", ("dp", "tp"), (3,)), Collective("permute", ("tp",), (1,)),
    )  # fmt: skip
    chain = (
        Collective("all_gather", ("tp",), (1,), 0), Collective("all_reduce", ("dp",), (), 1),
        Collective("reduce_scatter", ("dp", "tp"), (0,), 2), Collective("all_to_all", ("tp",), (1, 0), 3),
    )  # fmt: skip
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        rule = "collectives over different axes, unread when the next one starts, do not mix"
        yield Trial(f"order/in_flight-{short}", FOUR, Exchange(dtype, (8, 12), flight), rule, whole=True)
        rule = "a collective takes the result of another, over other axes"
        yield Trial(f"order/chain-{short}", FOUR, Exchange(dtype, (8, 12), chain), rule, whole=True)


def values(trial: Trial, seed: int, turn: int) -> list[HostArray]:
    """Each rank's array: no two are alike."""
    rng = np.random.default_rng([seed, zlib.crc32(trial.id.encode()), turn])
    shape = (math.prod(degree for _, degree in trial.mesh), *trial.exchange.shape)
    drawn = rng.integers(-8, 9, shape) if trial.whole else rng.standard_normal(shape)
    return list(drawn.astype(numpy_dtype(trial.exchange.dtype)))


# ---- what must come out ----------------------------------------------------------------------------------------


def problems(ops: Mapping[str, OpSpec], exchange: Exchange, mesh: Axes) -> list[Problem]:
    """The problem of each collective of a program."""
    arrays, found = [ArraySpec(exchange.shape, exchange.dtype)], []
    for item in exchange.collectives:
        spec = ops[item.op]
        call = Call((SimpleNamespace(spec=arrays[item.source]), *item.arguments), {}, dict(mesh))
        found.append(spec.specialise(None, call))
        result = spec.infer(found[-1], call)
        assert isinstance(result, ArraySpec)
        arrays.append(result)
    return found


def members_of(mesh: Axes, axes: Sequence[str]) -> int:
    """How many members a group over `axes` has."""
    return math.prod(dict(mesh)[axis] for axis in axes)


def groups_of(mesh: Axes, axes: Sequence[str]) -> list[list[int]]:
    """The ranks of each group over `axes`, members in row-major order of them."""
    names = [name for name, _ in mesh]
    ranks = np.arange(math.prod(degree for _, degree in mesh)).reshape([degree for _, degree in mesh])
    last = np.moveaxis(ranks, [names.index(axis) for axis in axes], range(-len(axes), 0))
    found: list[list[int]] = last.reshape(-1, members_of(mesh, axes)).tolist()
    return found


def expected(
    ops: Mapping[str, OpSpec], trial: Trial, xs: Sequence[HostArray], num: Numerics | None = None
) -> list[list[HostArray]]:
    """What the references give for each collective, at each rank; as a reference run where `num` is None."""
    made = [list(xs)]
    for item, problem in zip(trial.exchange.collectives, problems(ops, trial.exchange, trial.mesh), strict=True):
        spec = ops[item.op]
        held: dict[int, HostArray] = {}
        for ranks in groups_of(trial.mesh, item.axis):
            members = [made[item.source][rank] for rank in ranks]
            used = num or Numerics.of(problem.dtype, spec.accumulate)
            results = spec.reference(problem, members, *item.arguments, num=used)
            held.update(zip(ranks, results, strict=True))
        made.append([held[rank] for rank in range(len(xs))])
    return made[1:]


def compare(
    ops: Mapping[str, OpSpec], trial: Trial, xs: Sequence[HostArray], got: Sequence[Sequence[HostArray]]
) -> list[Deviation]:
    """How far the results of one step are off; raises Failure for the first that is too far, or a changed input."""
    exact, run = expected(ops, trial, xs, EXACT), expected(ops, trial, xs)
    found = []
    for rank, results in enumerate(got):
        given, results = results[0], results[1:]
        require(given.tobytes() == xs[rank].tobytes(), f"rank {rank}: its input was changed; collectives are pure")
        for i, problem in enumerate(problems(ops, trial.exchange, trial.mesh)):
            item, result = trial.exchange.collectives[i], results[i]
            where = f"{item.op} over {'x'.join(item.axis)} at rank {rank}"
            require(result.dtype.name == problem.dtype, f"{where} gives {result.dtype.name}, not {problem.dtype}")
            tolerance, wide = ops[item.op].tolerance, result.astype(np.float64)
            reason = tolerance.check(problem, wide, exact[i][rank], run[i][rank].astype(np.float64))
            require(reason is None, f"{where}: {reason} [{problem.describe()}]")
            if not tolerance.exact:
                compared = (wide, exact[i][rank], run[i][rank].astype(np.float64))
                found.append(deviation(tolerance, problem, item.op, f"rank{rank}", *compared))
    return found


# ---- checks ----------------------------------------------------------------------------------------------------


def require_claim(subject: Subject, exchange: Exchange, mesh: Axes) -> None:
    """Raises NotClaimed where the backend does not claim a program's dtype, or a kernel for each collective."""
    require_dtype(subject, exchange.dtype)
    for item, problem in zip(exchange.collectives, problems(subject.ops, exchange, mesh), strict=True):
        if not claims(subject, subject.ops[item.op], problem).taken:
            raise NotClaimed(refusal(subject, subject.ops[item.op], problem))


def claimed(subject: Subject, mesh: Axes, family: Sequence[Trial]) -> list[Exchange]:
    """The programs of the trials on a mesh for which `require_claim` holds."""
    found = []
    for trial in family:
        if trial.mesh == mesh:
            with suppress(NotClaimed):
                require_claim(subject, trial.exchange, mesh)
                found.append(trial.exchange)
    return found


def require_collectives(subject: Subject) -> None:
    """Raises NotClaimed for a backend that has none beyond world 1."""
    if not subject.capabilities.collectives:
        raise NotClaimed("Capabilities.collectives is False")


def _trial_check(trial: Trial, family: Sequence[Trial], op: str) -> Check:
    """A check of one of a family of trials, whose programs are captured together."""

    def run(subject: Subject, seed: int) -> Found:
        require_collectives(subject)
        require_claim(subject, trial.exchange, trial.mesh)
        mesh: Ranks = subject.keep(("mesh", trial.mesh), lambda: make_ranks(subject, trial.mesh))
        together = subject.keep(("exchanges", trial.mesh, op), lambda: claimed(subject, trial.mesh, family))
        program = together.index(trial.exchange)
        deviations: list[Deviation] = []
        seen: list[HostArray] = []
        for turn in range(TURNS):
            xs = values(trial, seed, turn)
            kernels, got = mesh.run(op or "order", together, program, xs)
            deviations += compare(subject.ops, trial, xs, got)
            seen += [array for results in got for array in results[1:]]
        return Found(kernels, tuple(deviations), seen)

    return Check(
        f"L3/collectives/{trial.id}", run, rule=trial.rule, op=op, dtype=trial.exchange.dtype,
        shape_class=trial.id.split("/")[1].partition("-")[0], limit=180.0,
    )  # fmt: skip


def _minimum_check(spec: OpSpec, trials: Sequence[Trial]) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        require_collectives(subject)
        names: dict[str, None] = {}
        for trial in trials:
            if trial.exchange.dtype in subject.capabilities.dtypes:
                (problem,) = problems(subject.ops, trial.exchange, trial.mesh)
                taken = claims(subject, spec, problem).taken
                require(taken, f"Capabilities.collectives is True, but: {refusal(subject, spec, problem)}")
                names.update(dict.fromkeys(kernel.name for kernel in taken))
        require(names, "none of Capabilities.dtypes is one that the suite has cases of")
        return Found(tuple(names))

    rule = f"Capabilities.collectives claims ops.{spec.name} over every axis, in each executed dtype"
    return Check(f"L3/collectives/minimum/{spec.name}", run, rule=rule, op=spec.name, shape_class="minimum")


def _alone_check(op: str, ways: Sequence[Way]) -> Check:
    """Groups of one member: one axis, and two."""
    dtype, label = ways[0].dtype, ways[0].label.rpartition("-")[2]
    exchanges = [
        Exchange(dtype, way.shape, (Collective(op, axes, way.statics),))
        for way in ways
        for axes in (("tp",), ("dp", "tp"))
        if not (op == "broadcast" and way.statics != (0,))  # there is no other member
    ]

    def run(subject: Subject, seed: int) -> Found:
        for exchange in exchanges:
            require_claim(subject, exchange, mesh_axes())
        seen = []
        with Rig(subject, [exchange.program() for exchange in exchanges]) as rig:
            for program, exchange in enumerate(exchanges):
                for turn in range(TURNS):
                    rng = np.random.default_rng([seed, program, turn])
                    x = rng.standard_normal(exchange.shape).astype(numpy_dtype(dtype))
                    given, result = outputs(rig, program, x)
                    at = f"{op} over {'x'.join(exchange.collectives[0].axis)}"
                    require(given.tobytes() == x.tobytes(), f"{at}: its input was changed; collectives are pure")
                    same = result.dtype == x.dtype and result.shape == x.shape and result.tobytes() == x.tobytes()
                    require(same, f"{at} of one member is not the identity")
                    seen.append(result)
            return Found(rig.kernels, outputs=seen)

    rule = "at world 1 each collective is the identity"
    return Check(f"L3/collectives/{op}/alone-{label}", run, rule=rule, op=op, dtype=dtype, shape_class="alone")


def _refusal_check(op: str, statics: tuple[int, ...]) -> Check:
    exchange = Exchange("float32", (4, 5), (Collective(op, ("tp",), statics),))

    def run(subject: Subject, seed: int) -> Found:
        work = Workload([], [], {}, [exchange.program()], {**ONE, "tp": 2})
        resolver = Resolver(subject.info.name, subject.kernels, {})
        plan = partial(make_plan, subject.info.name, work, resolver, subject.ops)
        expect(ContractViolation, plan, f"{op} of a dim of 5 over 2 members")
        return Found()

    rule = "a dim that the axis does not divide is a typed error, raised before a step"
    return Check(f"L3/collectives/refused/{op}", run, rule=rule, op=op, dtype="float32", shape_class="refused")
