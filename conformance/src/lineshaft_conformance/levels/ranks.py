"""L3: what a session of several ranks promises beyond one of a single rank, for single-program backends.

Values are whole numbers, so that products and sums are exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from lineshaft.errors import MisshapenTensor
from lineshaft.plan import ProgramSpec
from lineshaft_conformance.checks import Check, Found, NotClaimed, expect, require, rule_of
from lineshaft_conformance.harness.rig import Rig
from lineshaft_conformance.harness.world import RANK, mesh_axes, place, rank_number, rank_param, results
from lineshaft_conformance.levels.collectives import require_collectives
from lineshaft_conformance.subject import Subject
from lineshaft_contract.backends import World
from lineshaft_contract.ops.spec import Size, numpy_dtype
from lineshaft_contract.problems import KVProblem, LinearProblem
from lineshaft_contract.sessions import Cache, HostArray, Pending
from lineshaft_contract.steps import ArraySpec, InputField, InputLayout, StepInputs, StepShape, forward_inputs
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Param

ROWS, WIDTH = 4, 32
HEADS, DIM, PAGES = 2, 16, 6
FOUR = World(axes=mesh_axes(tp=4), threads=1, ranks=4)
REPLICAS = tuple(World(rank, mesh_axes(dp=2, tp=2), threads=1, ranks=2) for rank in (0, 2))
"""The workers of two replicas of two ranks."""


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file; none for a backend whose sessions run one rank."""
    if subject.info.single_program:
        for name, run in CHECKS.items():
            yield Check(f"L3/ranks/{name}", run, rule=rule_of(run), op="ranks", shape_class=name)


class Several:
    """A session of several ranks, as a context manager. Its program gives, of x [ROWS, WIDTH], which is the same on all
    ranks: "common" = x @ w^T, "own" = x @ v^T of each rank's own v, and "total", the sum of "own" over tp; and it
    writes each rank's own keys, which are their values too, into its cache. A second program doubles a handle.
    """

    def __init__(self, subject: Subject, world: World, seed: int) -> None:
        require_collectives(subject)
        self.dtype, self.world = subject.main_dtype, world
        self.rng = np.random.default_rng([seed, 31])
        self.page = subject.capabilities.default_page_size
        self.w, self.v = self.values(WIDTH, WIDTH), self.values(world.size, WIDTH, WIDTH)
        shape = StepShape(tokens=ROWS, rows=1, pages=(1,), logits=1, max_query=ROWS)
        keys = InputField("keys", self.dtype, (world.ranks, ROWS * HEADS * DIM))
        fields = [*forward_inputs(shape).fields, InputField("x", self.dtype, (ROWS, WIDTH)), keys]
        held = ArraySpec((ROWS, WIDTH), self.dtype)
        programs = [
            ProgramSpec("several", self._forward, shape, InputLayout(fields)),
            ProgramSpec("doubled", self._doubled, shape, InputLayout([]), {"held": held}),
        ]
        cache = KVProblem(
            dtype=self.dtype, kv_heads=HEADS, qk_dim=DIM, v_dim=DIM, page_size=self.page, kv_dtype=self.dtype
        )
        values = {"w": self.w, "v": self.v.reshape(-1, WIDTH)}
        self.rig = Rig(
            subject, programs, params=self._params(), values=values, caches=[cache], pages=[PAGES],
            **place(subject, world),
        )  # fmt: skip

    def values(self, *shape: int) -> HostArray:
        """Whole numbers from -2 to 2."""
        return self.rng.integers(-2, 3, shape).astype(numpy_dtype(self.dtype))

    def _params(self) -> dict[str, Param]:
        problems = {"linear": LinearProblem(dtype=self.dtype, n=WIDTH, k=WIDTH)}

        def shared(checkpoint: Checkpoint, coordinate: Coordinate) -> Local:
            return Local((checkpoint.rows("w", 0, WIDTH),))

        def own(checkpoint: Checkpoint, coordinate: Coordinate) -> Local:
            first = rank_number(self.world, coordinate) * WIDTH
            return Local((checkpoint.rows("v", first, first + WIDTH),))

        rank, shape = rank_param(self.world), (WIDTH, WIDTH)
        return {
            RANK: rank,
            "w": Param("w", "w", shape, self.dtype, problems, shared),
            "v": Param("v", "v", shape, self.dtype, problems, own, rank.varies),
        }

    @staticmethod
    def _forward(ops: Any, weights: Any, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        x = step.arrays["x"]
        keys = ops.gather_rows(step.arrays["keys"], weights[RANK]).reshape(ROWS, HEADS, DIM)
        own = ops.linear(x, weights["v"])
        out = {"common": ops.linear(x, weights["w"]), "own": own, "total": ops.all_reduce(own, "tp")}
        return out, [ops.write_kv(caches[0], keys, keys, step)]

    @staticmethod
    def _doubled(ops: Any, weights: Any, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        return {"doubled": ops.add(arrays["held"], arrays["held"])}, caches

    @property
    def ranks(self) -> range:
        """The ranks of the session, by their number in the mesh."""
        return range(self.world.rank, self.world.rank + self.world.ranks)

    def submit(self, x: HostArray, keys: HostArray | None = None, page: int = 0) -> Pending:
        """One step, which stores keys [ranks, ROWS, HEADS, DIM] at the beginning of a page."""
        slots = np.arange(ROWS) + page * self.page if page else np.zeros(ROWS)
        host = {"x": x, "slots.0": slots.astype(np.int32)}
        return self.rig.submit(host if keys is None else {**host, "keys": keys.reshape(len(keys), -1)})

    def check(self, pending: Any, name: str, exact: list[HostArray]) -> list[HostArray]:
        """An output of every rank. Raises Failure unless it is the exact one."""
        found = results(pending, name, len(self.ranks))
        for rank, array, right in zip(self.ranks, found, exact, strict=True):
            same = array.dtype.name == self.dtype and np.array_equal(array.astype(np.float64), right)
            require(same, f"{name!r} of rank {rank} is not what its own weights and the step's inputs give")
        return found

    def products(self, x: HostArray, v: HostArray) -> list[HostArray]:
        """x @ v^T of each rank of the session, exact; v [ranks, WIDTH, WIDTH]."""
        return [x.astype(np.float64) @ own.astype(np.float64).T for own in v]

    def __enter__(self) -> Several:
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.session.close()


# ---- checks ----------------------------------------------------------------------------------------------------


def _equal(subject: Subject, seed: int) -> Found:
    """What all ranks compute from equal inputs and weights is equal bit for bit, and so is a sum over all of them."""
    with Several(subject, FOUR, seed) as several:
        x = several.rng.standard_normal((ROWS, WIDTH)).astype(numpy_dtype(several.dtype))
        pending = several.submit(x)
        for name in ("common", "total"):
            first, *others = results(pending, name, FOUR.ranks)
            unlike = [rank for rank, other in enumerate(others, 1) if other.tobytes() != first.tobytes()]
            require(not unlike, f"{name!r} of rank {', '.join(map(str, unlike))} differs from that of rank 0")
        x = several.values(ROWS, WIDTH)
        exact = several.products(x, np.stack([several.w] * FOUR.ranks))
        return Found(several.rig.kernels, outputs=several.check(several.submit(x), "common", exact))


def _own(subject: Subject, seed: int) -> Found:
    """A Param that varies is loaded for each rank at its coordinate, and `results` gives each rank's own output."""
    with Several(subject, FOUR, seed) as several:
        x = several.values(ROWS, WIDTH)
        exact = several.products(x, several.v)
        pending = several.submit(x)
        found = several.check(pending, "own", exact)
        several.check(pending, "total", [np.sum(exact, axis=0)] * FOUR.ranks)
        return Found(several.rig.kernels, outputs=found)


def _replicas(subject: Subject, seed: int) -> Found:
    """A worker of the second replica has its own ranks' weights, and its sums over tp are those of its replica."""
    seen: list[HostArray] = []
    with Several(subject, REPLICAS[0], seed) as first, Several(subject, REPLICAS[1], seed) as second:
        for several in (first, second):
            x = several.values(ROWS, WIDTH)
            exact = several.products(x, several.v[several.ranks.start : several.ranks.stop])
            pending = several.submit(x)
            seen += several.check(pending, "own", exact)
            seen += several.check(pending, "total", [np.sum(exact, axis=0)] * len(exact))
        return Found(first.rig.kernels, outputs=seen)


def _handles(subject: Subject, seed: int) -> Found:
    """A handle passes each rank's own output on to the next program."""
    with Several(subject, FOUR, seed) as several:
        x = several.values(ROWS, WIDTH)
        handle = several.submit(x).handle("own")
        spec = ArraySpec((ROWS, WIDTH), several.dtype)
        require(handle.spec == spec, f"the handle of an output that is {spec} on each rank says {handle.spec}")
        pending = several.rig.submit({}, 1, {"held": handle})
        exact = [2 * own for own in several.products(x, several.v)]
        return Found(several.rig.kernels, outputs=several.check(pending, "doubled", exact))


def _update(subject: Subject, seed: int) -> Found:
    """`update` takes [ranks, ...] for a Param that varies, its own shape for another; a wrong form changes nothing."""
    if subject.capabilities.weights_fixed:
        raise NotClaimed("Capabilities.weights_fixed is True")
    with Several(subject, FOUR, seed) as several:
        session, x = several.rig.session, several.values(ROWS, WIDTH)
        w, v = several.values(WIDTH, WIDTH), several.values(FOUR.ranks, WIDTH, WIDTH)
        wrong: tuple[Mapping[str, HostArray], ...] = ({"v": v[0]}, {"w": v}, {"w": w, "v": v[:3]})
        for given in wrong:
            shapes = {name: list(values.shape) for name, values in given.items()}
            expect(MisshapenTensor, partial(session.update, given), f"update of {shapes} on 4 ranks")
        before = several.submit(x)
        several.check(before, "common", several.products(x, np.stack([several.w] * FOUR.ranks)))
        several.check(before, "own", several.products(x, several.v))
        session.update({"w": w, "v": v})
        after = several.submit(x)
        seen = several.check(after, "common", several.products(x, np.stack([w] * FOUR.ranks)))
        seen += several.check(after, "own", several.products(x, v))
        return Found(several.rig.kernels, outputs=seen)


def _pages(subject: Subject, seed: int) -> Found:
    """`read_pages`, `write_pages` and `copy_pages` move the heads of every rank, one rank after another."""
    with Several(subject, FOUR, seed) as several:
        session, ids = several.rig.session, np.array([3, 1], np.int32)
        keys = several.values(FOUR.ranks, ROWS, HEADS, DIM)
        several.submit(several.values(ROWS, WIDTH), keys, page=3)
        joined = np.concatenate(list(keys), axis=1)
        for name, pages in session.read_pages(0, ids).items():
            shape = (len(ids), several.page, FOUR.ranks * HEADS, DIM)
            require(pages.shape == shape, f"read_pages gives {name} {list(pages.shape)}, not {list(shape)}")
            require(np.array_equal(pages[0, :ROWS], joined), f"read_pages: {name} is not each rank's heads in turn")
        new = {name: several.values(*shape) for name in ("k", "v")}
        session.write_pages(0, ids, new).wait()
        session.copy_pages(0, ids, np.array([2, 4], np.int32)).wait()
        several.submit(several.values(ROWS, WIDTH), keys, page=3)
        found = session.read_pages(0, np.array([2, 4, 1, 3], np.int32))
        for name, pages in found.items():
            right = np.concatenate([new[name], new[name][1:], new[name][:1]])
            right[3, :ROWS] = joined
            require(np.array_equal(pages, right), f"{name}: pages that were written and copied are not those read")
        return Found(several.rig.kernels, outputs=list(found.values()))


CHECKS = {
    "equal": _equal,
    "own": _own,
    "replicas": _replicas,
    "handles": _handles,
    "update": _update,
    "pages": _pages,
}
