"""Runs small functions on a backend as the engine runs a model: traced, planned, loaded, captured, replayed.

Nothing here knows an op, and nothing is called that the contract does not name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lineshaft.plan import Plan, Planned, ProgramSpec, Resolver, Workload, make_plan
from lineshaft_conformance.subject import Subject
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import ConstProblem, KVProblem, Problem
from lineshaft_contract.sessions import Handle, HostArray, Pending, Program, Session, Transfer, Tree, map_tree
from lineshaft_contract.steps import HostStep
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Param, Stored

ONE = dict.fromkeys(("dp", "pp", "cp", "ep", "tp"), 1)


class Values:
    """A checkpoint in memory: named host arrays."""

    def __init__(self, arrays: Mapping[str, HostArray]) -> None:
        self.arrays = arrays
        self.config: Mapping[str, Any] = {}

    def names(self) -> frozenset[str]:
        return frozenset(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.arrays[name].shape)

    def stored_bytes(self, name: str) -> int:
        return self.arrays[name].nbytes

    def rows(self, name: str, start: int, stop: int) -> Stored:
        return stored(self.arrays[name][start:stop])

    def cols(self, name: str, start: int, stop: int) -> Stored:
        return stored(self.arrays[name][:, start:stop])


def stored(array: HostArray) -> Stored:
    """An array as a checkpoint stores it, unquantized."""
    return Stored("none", array.shape, {"data": array})


def whole_param(name: str, array: HostArray, problems: Mapping[str, Problem]) -> Param:
    """A Param that is the same at every coordinate, read from `Values` under its own name."""

    def shard(checkpoint: Checkpoint, coordinate: Coordinate) -> Local:
        return Local((checkpoint.rows(name, 0, array.shape[0]),))

    return Param(name, name, array.shape, array.dtype.name, problems, shard)


def const_param(name: str, array: HostArray) -> Param:
    """A Param that reaches the function as a bare array."""
    return whole_param(name, array, {"const": ConstProblem(dtype=array.dtype.name, shape=array.shape)})


def kernel_names(plan: Plan) -> tuple[str, ...]:
    """The kernels that a plan chose, each once."""
    return tuple(dict.fromkeys(entry.kernel for entry in plan.entries))


class Rig:
    """One session of the subject with captured programs; use it as a context manager.

    params    tree of Params, of which `values` holds the host array of each, in the Param's dtype, or `checkpoint` all
    caches    problem of each cache; `pages` counts pages (with the null page) per cache group
    uses      name in a function -> (op, base problem)
    kernels   the kernels to choose from (default: all of the subject's)

    A program without `host_outputs` brings all its outputs to the host.
    """

    def __init__(
        self,
        subject: Subject,
        programs: Sequence[ProgramSpec],
        *,
        params: Tree = (),
        values: Mapping[str, HostArray] | None = None,
        checkpoint: Checkpoint | None = None,
        caches: Sequence[KVProblem] = (),
        pages: Sequence[int] = (),
        uses: Mapping[str, tuple[str, Problem]] | None = None,
        kernels: Iterable[Kernel] | None = None,
        degrees: Mapping[str, int] | None = None,
        session: Session | None = None,
    ) -> None:
        work = Workload(list(params) if params == () else params, caches, uses or {}, programs, degrees or ONE)
        choice = subject.kernels if kernels is None else kernels
        self._resolver = Resolver(subject.info.name, choice, {})
        self._subject, self._work = subject, work
        self.planned: Planned = make_plan(subject.info.name, work, self._resolver, subject.ops)
        self.checkpoint: Checkpoint = checkpoint or Values(values or {})
        self.session = subject.backend.session(0) if session is None else session
        self.programs: list[Program] = []
        try:
            self.weights = self.session.load(work.params, self.checkpoint, self.planned.packings)
            self.session.alloc_caches(caches, pages, self.planned.plan.cache_layout)
            self._capture(0)
            self.session.freeze()
        except BaseException:
            self.session.close()
            raise

    def _capture(self, first: int) -> None:
        """Capture the planned programs from `first` on."""
        outputs = self.planned.outputs[first:]
        for (spec, ops), names in zip(self.planned.programs[first:], outputs, strict=True):
            host = spec.host_outputs or frozenset(names)
            self.programs.append(self.session.capture(spec.fn, spec.shape, spec.inputs, ops, spec.arrays, host))

    def capture_more(self, *programs: ProgramSpec) -> None:
        """Plan and capture further programs of the same weights and caches; the session must be thawed."""
        first = len(self.programs)
        self._work = replace(self._work, programs=[*self._work.programs, *programs])
        self.planned = make_plan(self._subject.info.name, self._work, self._resolver, self._subject.ops)
        self._capture(first)

    def reload(self, parts: Mapping[str, Stored]) -> None:
        """Load other values into the same parameters and capture every program anew; the session must be thawed."""

        def moved(param: Param) -> Param:
            return replace(param, shard=lambda checkpoint, coordinate: Local((parts[param.name],)))

        params = map_tree(moved, self._work.params)
        self.weights = self.session.load(params, self.checkpoint, self.planned.packings)
        self.programs.clear()
        self._capture(0)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that the plan chose."""
        return kernel_names(self.planned.plan)

    def host(self, values: Mapping[str, HostArray], program: int = 0) -> HostStep:
        """The packed host buffer of a program with these values; inputs that are not named stay zero."""
        host = HostStep(self.planned.programs[program][0].inputs)
        for name, array in values.items():
            host[name][...] = array
        return host

    def submit(
        self,
        values: Mapping[str, HostArray],
        program: int = 0,
        arrays: Mapping[str, Handle] | None = None,
        after: Sequence[Transfer] = (),
    ) -> Pending:
        """One step of a program."""
        return self.programs[program](self.host(values, program), arrays or {}, after)

    def run(
        self, values: Mapping[str, HostArray], program: int = 0, arrays: Mapping[str, Handle] | None = None
    ) -> dict[str, HostArray]:
        """One step, and all its outputs on the host."""
        pending = self.submit(values, program, arrays)
        return {name: pending.result(name) for name in self.planned.outputs[program]}

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
