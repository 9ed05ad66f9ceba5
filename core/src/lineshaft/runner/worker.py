"""One rank at work: owns a session, loads, allocates, captures every bucket, then runs steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from lineshaft.config import EngineConfig
from lineshaft.errors import OutOfMemory, SessionClosed
from lineshaft.registry import Registry, discover
from lineshaft.runner.host_pages import HostPages
from lineshaft.runner.messages import ChoiceMessage, Settled, Sizes, Started, StepMessage, StepResult
from lineshaft.runner.programs import FORWARD, LOGPROBS, program_of
from lineshaft.runner.setup import Setup, make_planned, make_setup
from lineshaft.runner.sizing import sizes
from lineshaft.sampling.logprobs import Logprobs
from lineshaft.weights.memory import breakdown
from lineshaft_contract.backends import Backend, World
from lineshaft_contract.sessions import HostArray, Pending, Program, Session
from lineshaft_contract.steps import HostStep, InputField, InputLayout, StepShape

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) while something long goes on."""


def silent(what: str, done: int, total: int) -> None:
    """Shows no progress."""


class Worker:
    """`size`, then `start`, then `submit`, `choose` and `collect` for every step, then `close`."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int = 0,
        rendezvous: str = "",
        registry: Registry | None = None,
        start: Callable[[World], Backend] | None = None,
    ) -> None:
        registry = registry or discover()
        self.config = config
        self.setup: Setup = make_setup(config, registry, rank, rendezvous, start)
        self.planned = make_planned(config, self.setup, registry, measured=rank == 0)
        self._registry = registry
        self._session: Session | None = None
        self._programs: dict[tuple[str, StepShape], Program] = {}
        self._stages: list[Pending] = []  # of the latest step: its forward, then what chooses its tokens
        self._choice = ChoiceMessage()
        self._pages = HostPages([cache.group for cache in self.setup.caches])
        self._rows = 0

    @property
    def session(self) -> Session:
        """The session that `start` made. Raises SessionClosed before that and after `close`."""
        if self._session is None:
            raise SessionClosed("the worker has no session: start it first")
        return self._session

    # ---- before steps ------------------------------------------------------------------------------------------

    def size(self, told: Settled | None = None) -> Sizes:
        """What this rank needs and can hold, with ties of kernels settled as it is told.

        Raises OutOfMemory and PoolTooSmall before anything is loaded.
        """
        if told and told.choices not in (None, self.planned.plan.choices):
            self.planned = make_planned(self.config, self.setup, self._registry, told.choices)
        return sizes(self.config, self.setup, self.planned.plan)

    def start(self, pages: tuple[int, ...], progress: Progress = silent) -> Started:
        """Load weights, allocate caches, capture every program, freeze. Raises ModelError, OutOfMemory."""
        try:
            return self._start(pages, progress)
        except MemoryError as error:
            self.close()
            need = breakdown({"weights": self.planned.plan.weight_bytes})
            raise OutOfMemory(f"out of memory at start ({need} and {pages} pages): lower cache.pages") from error
        except BaseException:
            self.close()
            raise

    def _start(self, pages: tuple[int, ...], progress: Progress) -> Started:
        began = time.perf_counter()
        progress("loading weights", 0, 1)
        session = self._session = self.setup.backend.session(self.setup.world.rank)
        session.load(self.setup.model.params(), self.setup.checkpoint, self.planned.packings)
        session.alloc_caches(self.setup.caches, pages, self.planned.plan.cache_layout)
        progress("loading weights", 1, 1)
        loaded = time.perf_counter()
        programs = self.planned.programs
        for done, (spec, ops) in enumerate(programs):
            progress("capturing programs", done, len(programs))
            self._programs[spec.name, spec.shape] = session.capture(
                spec.fn, spec.shape, spec.inputs, ops, spec.arrays, spec.host_outputs
            )
        progress("capturing programs", len(programs), len(programs))
        session.freeze()
        self._registry.plan_frozen(self.planned.plan)
        arena = max((program.report.arena for program in self._programs.values()), default=0)
        return Started(loaded - began, time.perf_counter() - loaded, arena)

    # ---- steps -------------------------------------------------------------------------------------------------

    def submit(self, step: StepMessage) -> None:
        """Start one step's forward. `choose` follows, then `collect`, before the next step is submitted."""
        if step.swaps_out:
            self._pages.save(self.session, step.swaps_out, step.on_host)
        moved = [self.session.copy_pages(*copies) for copies in step.copies_by_group()]
        moved += self._pages.restore(self.session, step.swaps_in)
        self._stages = [self._programs[FORWARD, step.shape](step.forward, {}, moved)]
        self._rows = step.shape.logits

    def choose(self, choice: ChoiceMessage) -> None:
        """Start what the step's tokens are chosen by: each stage works on the logits of the one before."""
        self._choice = choice
        for host in choice.adjust:
            self._stages.append(self._over_logits(host, self._stages[-1]))
        self._adjusted = self._stages[-1]
        if choice.sampling is not None:
            self._stages.append(self._over_logits(choice.sampling, self._adjusted))

    def collect(self) -> StepResult:
        """Wait for the step, and return what its choice wants."""
        choice, stages = self._choice, self._stages
        token_ids = stages[-1].result("token_ids")
        seconds = sum(stage.kernel_seconds for stage in stages)
        logits = self._adjusted.result("logits").astype(np.float32) if choice.logits else None
        logprobs = self._logprobs(token_ids, choice.scored) if choice.logprobs else None
        return StepResult(token_ids, seconds, logprobs, logits)

    def _over_logits(self, host: HostStep, before: Pending, name: str = "") -> Pending:
        shape = StepShape(tokens=0, rows=self._rows, pages=(), logits=self._rows, max_query=0)
        return self._programs[name or program_of(host), shape](host, {"logits": before.handle("logits")})

    def _logprobs(self, chosen: HostArray, scored: HostArray | None) -> Logprobs:
        """Of the ids [R] that were chosen or, where it is not -1, of those that `scored` names."""
        host = HostStep(InputLayout([InputField("ids", "int32", (self._rows,))]))
        ids = chosen if scored is None else np.where(scored >= 0, scored, chosen)
        host["ids"][:] = np.maximum(ids, 0)
        pending = self._over_logits(host, self._adjusted, LOGPROBS)
        return Logprobs(*(pending.result(name) for name in ("chosen", "top_ids", "top")))

    def close(self) -> None:
        """Idempotent: frees everything the session holds."""
        session, self._session = self._session, None
        self._stages.clear()
        self._programs.clear()
        if session is not None:
            session.close()
