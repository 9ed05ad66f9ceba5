"""Runs the steps of a generation again, with every op's outputs brought to the host.

It uses the public contract alone: a captured function may return any array of its forward as an output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lineshaft.config import EngineConfig
from lineshaft.plan import Planned, ProgramSpec
from lineshaft.plan.trace import dispatch_key
from lineshaft.registry import Registry
from lineshaft.runner.messages import StepMessage
from lineshaft.runner.programs import FORWARD, forward_function
from lineshaft.runner.setup import Setup, plan_programs
from lineshaft.runner.worker import Progress
from lineshaft_contract.ops import OpSpec, all_ops
from lineshaft_contract.problems import Problem
from lineshaft_contract.sessions import Cache, HostArray, Program, Session, StepFunction, Tree
from lineshaft_contract.steps import HostStep, StepInputs, StepShape, forward_inputs
from lineshaft_contract.weights import Array, Weight

DECOMPOSED = "default decomposition"
"""Stands for the kernel of a composite op that has none of its own."""


@dataclass
class Noted:
    """One call of the forward, as the watched run saw it.

    outputs  name among the program's outputs -> what its first dim counts: "tokens", "logits" or "" (something else)
    given    name among the program's outputs of an argmax's own input ("" for other ops)
    written  key of the cache that the call consumed
    """

    name: str
    key: tuple[Any, ...]
    layer: int | None
    outputs: dict[str, str] = field(default_factory=dict)
    given: str = ""
    written: int | None = None


class Watch:
    """Stands in for `ops`: passes every call on, and keeps what it returned."""

    def __init__(self, ops: Any, step: StepInputs) -> None:
        self._ops, self._step = ops, step
        self._layer: int | None = None
        self._per_row = False  # whether logit_rows were taken: what follows has a row for each of them
        self.calls: list[Noted] = []
        self.outputs: dict[str, Array] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        run = getattr(self._ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._locate(args)
            noted = Noted(name, dispatch_key(args, kwargs), self._layer)
            self.calls.append(noted)
            result = run(*args, **kwargs)
            self._keep(noted, args, result)
            return result

        return call

    def _locate(self, args: Sequence[Any]) -> None:
        for item in args:
            if isinstance(item, Weight):
                self._layer = layer_of(item.name)
            elif isinstance(item, Cache) and self._layer is None:
                self._layer = item.key
            elif item is self._step.logit_rows:
                self._per_row = True

    def _keep(self, noted: Noted, args: Sequence[Any], result: Any) -> None:
        for place, item in enumerate(result if isinstance(result, tuple) else (result,)):
            if isinstance(item, Cache):
                noted.written = item.key
                continue
            output = f"{len(self.calls) - 1:05d}.{noted.name}.{place}"
            self.outputs[output] = item
            noted.outputs[output] = self._rows_of(item)
        if noted.name == "argmax":
            noted.given = f"{len(self.calls) - 1:05d}.argmax.given"
            self.outputs[noted.given] = args[0]

    def _rows_of(self, array: Array) -> str:
        rows, kind = (self._step.shape.logits, "logits") if self._per_row else (self._step.shape.tokens, "tokens")
        return kind if array.shape and array.shape[0] == rows else ""


def layer_of(name: str) -> int | None:
    """The layer that a Param's name speaks of ("layers.3.qkv"), or None."""
    found = re.search(r"(?:^|\.)layers?\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


class Watched:
    """A step function that returns every output of every op; `calls` is what its latest run noted."""

    def __init__(self, fn: StepFunction) -> None:
        self._fn = fn
        self.calls: list[Noted] = []

    def __call__(
        self, ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: dict[str, Array]
    ) -> tuple[dict[str, Array], list[Cache]]:
        watch = Watch(ops, step)
        _, after = self._fn(watch, weights, caches, step, arrays)
        self.calls = watch.calls
        return watch.outputs, after


@dataclass(frozen=True)
class Call:
    """One call of a program: where it stands, the problem it solves, and the kernel that the plan chose."""

    noted: Noted
    op: OpSpec
    problem: Problem
    kernel: str


@dataclass(frozen=True)
class Result:
    """What one call returned in one step, without what padding tokens and padding rows gave."""

    index: int  # of the call in its program
    call: Call
    outputs: Mapping[
        str, HostArray
    ]  # "0", "1", ...; of a cache's writer also "k", "v": its arrays at the written slots
    given: HostArray | None  # an argmax's own input


class Rerun:
    """A session of a setup's backend whose programs show what every op returns; a context manager.

    `pages` counts pages (with the null page) per cache group. Raises what starting a worker raises.
    """

    def __init__(
        self,
        setup: Setup,
        config: EngineConfig,
        registry: Registry,
        shapes: Sequence[StepShape],
        pages: Sequence[int],
        progress: Progress,
    ) -> None:
        self._setup = setup
        watched = [Watched(forward_function(setup.model)) for _ in shapes]
        programs = [ProgramSpec(FORWARD, w, s, forward_inputs(s)) for w, s in zip(watched, shapes, strict=True)]
        specs = all_ops(registry.ops())
        planned = plan_programs(config, setup, registry, programs)
        self.calls: dict[StepShape, list[Call]] = {}
        for (program, ops), function in zip(planned.programs, watched, strict=True):
            found = [(noted, *ops.chosen(noted.name, noted.key)) for noted in function.calls]
            self.calls[program.shape] = [
                Call(noted, specs[site.op], site.problem, DECOMPOSED if kernel is None else kernel.name)
                for noted, site, kernel in found
            ]
        self.session: Session = setup.backend.session(setup.world.rank)
        try:
            self._programs = self._start(planned, pages, progress)
        except BaseException:
            self.session.close()
            raise

    def _start(self, planned: Planned, pages: Sequence[int], progress: Progress) -> dict[StepShape, Program]:
        session, setup = self.session, self._setup
        progress("loading weights", 0, 1)
        session.load(setup.model.params(), setup.checkpoint, planned.packings)
        session.alloc_caches(setup.caches, pages, planned.plan.cache_layout)
        programs = {}
        for done, ((spec, ops), outputs) in enumerate(zip(planned.programs, planned.outputs, strict=True)):
            progress("capturing programs", done, len(planned.programs))
            programs[spec.shape] = session.capture(
                spec.fn, spec.shape, spec.inputs, ops, spec.arrays, frozenset(outputs)
            )
        session.freeze()
        return programs

    def run(self, step: StepMessage) -> Iterator[Result]:
        """One step; what each of its calls returned, in their order."""
        moves = [self.session.copy_pages(*copies) for copies in step.copies_by_group()]
        pending = self._programs[step.shape](step.forward, {}, moves)
        live = {"tokens": live_tokens(step.forward), "logits": live_logits(step.forward)}
        for index, call in enumerate(self.calls[step.shape]):
            noted = call.noted
            outputs = {
                name.rpartition(".")[2]: pending.result(name)[: live.get(rows)] for name, rows in noted.outputs.items()
            }
            if noted.written is not None:
                outputs |= self._written(noted.written, step.forward, live["tokens"])
            given = pending.result(noted.given)[: live["logits"]] if noted.given else None
            yield Result(index, call, outputs, given)

    def _written(self, cache: int, host: HostStep, tokens: int) -> dict[str, HostArray]:
        """What a cache holds at the slots that the step wrote, [tokens, Hkv, D] of each of its arrays."""
        problem = self._setup.caches[cache]
        slots = host[f"slots.{problem.group}"][:tokens]
        pages, offsets = slots // problem.page_size, slots % problem.page_size
        ids, where = np.unique(pages[pages > 0], return_inverse=True)
        held = self.session.read_pages(cache, ids.astype(np.int32))
        return {name: held[name][where, offsets[pages > 0]] for name in sorted(held)}

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Rerun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def live_tokens(host: HostStep) -> int:
    """How many tokens of a step are no padding."""
    return int(host["query_starts"][-1])


def live_logits(host: HostStep) -> int:
    """How many rows of logits a step asks for, at least 1: the row of a padding entry is that of token 0."""
    return 1 + int(np.count_nonzero(host["logit_rows"][1:]))
