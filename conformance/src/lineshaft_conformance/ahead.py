"""Compiling a run's programs ahead of time, for devices that are not here, and what memory they will need there.

Reads no weight and runs nothing: what it tells is *compiled-only*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from lineshaft.config import EngineConfig, validate_options
from lineshaft.errors import InvalidValue, LineshaftError, OutOfMemory, PluginError
from lineshaft.plan import Plan, Planned, ProgramSpec
from lineshaft.registry import Registry, discover, load_attribute
from lineshaft.registry.loading import one_line
from lineshaft.runner.messages import Sizes
from lineshaft.runner.setup import Setup, make_planned, make_setup
from lineshaft.runner.sizing import free_bytes, sizes
from lineshaft.weights.checkpoint import CONFIG_ALONE, FORMATS
from lineshaft.weights.memory import breakdown, gib
from lineshaft_contract.backends import BackendInfo, Toolchain
from lineshaft_contract.sessions import DECLARED, CaptureReport, PlannedOps, Session
from lineshaft_contract.steps import StepShape


@dataclass(frozen=True)
class CompiledProgram:
    """One program of the run, as it was compiled."""

    label: str
    shape: StepShape
    report: CaptureReport

    def beyond(self, resident: int) -> int:
        """Bytes that it needs while it runs, beside `resident` ones: the weights and the KV pool."""
        r = self.report
        return max(0, r.arguments - resident) + max(0, r.outputs - r.aliased) + r.temporaries


Progress = Callable[[int, int, CompiledProgram], None]
"""Told after each program: how many are done, of how many, and the latest."""
MEMORY, WORK = ("temporaries", "aliased", "code"), ("flops", "moved")
"""Figures of a CaptureReport that a compiler gives all or none of: its account of memory, and its estimate of work."""


@dataclass(frozen=True)
class Compiled:
    """A run's programs on a target. `total` and `free` are bytes of one device, None where the backend does not count;
    `listed` counts the run's programs, `programs` those that were compiled."""

    topology: str
    plan: Plan
    dtype: str
    layout: Mapping[str, int]
    sizes: Sizes
    total: int | None
    free: int | None
    listed: int
    programs: tuple[CompiledProgram, ...]

    @property
    def pool(self) -> int:
        """Bytes of the KV pool."""
        return sum(n * size for n, size in zip(self.sizes.pages, self.sizes.page_bytes, strict=True))

    def counts(self, names: Sequence[str]) -> bool:
        """Whether the compiler gives these figures: of what it does not count, all are 0 in all programs."""
        return any(getattr(program.report, name) for program in self.programs for name in names)

    @property
    def counts_memory(self) -> bool:
        """Whether the compiler gives an account of memory."""
        return self.counts(MEMORY)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The figures that the compiler does not give."""
        return tuple(name for group in (MEMORY, WORK) if not self.counts(group) for name in group)

    @property
    def declared(self) -> tuple[str, ...]:
        """The collectives that are declared, not compiled (`CaptureReport.collectives`)."""
        every = (name for program in self.programs for name in program.report.collectives)
        return tuple(dict.fromkeys(name.removeprefix(DECLARED) for name in every if name.startswith(DECLARED)))

    @property
    def code(self) -> int:
        """Bytes of all programs themselves."""
        return sum(program.report.code for program in self.programs)

    @property
    def largest(self) -> CompiledProgram:
        """The program that needs most beside weights and pool."""
        return max(self.programs, key=lambda program: program.beyond(self.resident))

    @property
    def resident(self) -> int:
        return self.sizes.plan.weight_bytes + self.pool

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name of all that a device must hold at once; where the compiler counts none, those that are known
        before: of what is at work, the results of one step that the plan counts."""
        if not self.counts_memory:
            plan = self.sizes.plan
            return {"weights": plan.weight_bytes, "KV pool": self.pool, "one step's results": plan.workspace_bytes}
        largest = self.largest
        return {
            "weights": self.sizes.plan.weight_bytes, "KV pool": self.pool,
            f"{largest.label} at work": largest.beyond(self.resident), "code": self.code,
        }  # fmt: skip

    @property
    def spare(self) -> int | None:
        """Bytes that stay free; below 0 where it does not fit, None where nobody counts."""
        return None if self.free is None else self.free - sum(self.parts.values())

    @property
    def room(self) -> int | None:
        """Pages of each group, with the null page, that fit beside all else."""
        page = sum(self.sizes.page_bytes)
        return None if self.spare is None or not page else max(0, (self.spare + self.pool) // page)

    def tokens(self, pages: int) -> int:
        """Tokens that so many pages hold; the null page holds none."""
        return max(0, pages - 1) * min(self.sizes.page_sizes, default=0)

    def require_fit(self) -> None:
        """Raises OutOfMemory that says by how much it does not fit, and what to change."""
        if self.spare is None or self.spare >= 0 or self.free is None:
            return
        room, pages = self.room or 0, max(self.sizes.pages, default=0)
        fewer = f"set cache.pages to at most {room}" if 2 <= room < pages else "use a smaller or quantized model"
        raise OutOfMemory(
            f"{breakdown(self.parts)} need {gib(sum(self.parts.values()))} but {gib(self.free)} of a device of "
            f"{self.topology} are free: {gib(-self.spare)} too much; {fewer}, more devices (--layout tp=N), or fewer "
            "tokens a step (scheduler.token_budget)"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; the plan by its hash."""
        room = self.room
        unknown, largest = dict.fromkeys(self.uncounted), self.largest.beyond(self.resident)
        counted = self.counts_memory
        return {
            "backend": self.plan.backend, "topology": self.topology, "plan": self.plan.hash, "dtype": self.dtype,
            "layout": dict(self.layout), "evidence": "compiled-only", "programs_of_the_run": self.listed,
            "programs": [
                {"program": each.label, "shape": asdict(each.shape), **asdict(each.report), **unknown}
                for each in self.programs
            ],
            "memory": {
                "total": self.total, "free": self.free, "weights": self.sizes.plan.weight_bytes, "kv_pool": self.pool,
                "largest_program": self.largest.label, "largest_at_work": largest if counted else None,
                "one_step": self.sizes.plan.workspace_bytes, "code": self.code if counted else None,
                "needed": sum(self.parts.values()), "spare": self.spare,
                "fits": None if self.spare is None else self.spare >= 0,
            },
            "pages": {
                "chosen": list(self.sizes.pages), "page_sizes": list(self.sizes.page_sizes),
                "page_bytes": list(self.sizes.page_bytes), "room": room,
                "room_tokens": None if room is None else self.tokens(room),
            },
            "seconds": sum(each.report.seconds for each in self.programs),
        }  # fmt: skip


def make_toolchain(info: BackendInfo, options: Mapping[str, Any], registry: Registry) -> Toolchain:
    """The backend's toolchain under a user's options. Raises InvalidValue where it has none, and for an option."""
    if not info.toolchain:
        able = ", ".join(each.name for each in registry.backends.values() if each.toolchain) or "none"
        raise InvalidValue(
            f"backend {info.name!r} has no toolchain to compile ahead of time; installed backends with one: {able}"
        )
    toolchain: Toolchain = load_attribute(info.toolchain)(validate_options(info, options))
    return toolchain


def compile_ahead(
    config: EngineConfig,
    topology: str,
    only: Sequence[str] = (),
    progress: Progress = lambda done, total, program: None,
    registry: Registry | None = None,
) -> Compiled:
    """Compile rank 0's programs, or those of `only` (labels or shell patterns of them), for a topology.

    The model needs no weights. Raises BackendError, ModelError, LayoutError, ConfigError, PlanError, ResourceError.
    """
    registry = registry or discover()
    if config.backend == "auto":
        raise InvalidValue("backend = 'auto': name the backend to compile for, as --backend NAME")
    toolchain = make_toolchain(registry.named(config.backend), config.backend_options, registry)
    setup = make_setup(
        config, registry=registry, start=lambda world: toolchain.start(topology, world),
        formats=(CONFIG_ALONE, *FORMATS),
    )  # fmt: skip
    planned = make_planned(config, setup, registry)
    chosen = _choose(planned, only)
    sized = sizes(config, setup, planned.plan)
    counted = setup.backend.memory.total_free()
    return Compiled(
        topology, planned.plan, setup.dtype, dict(setup.world.axes), sized, counted and counted[0],
        free_bytes(setup), len(planned.programs), _capture(setup, planned, sized.pages, chosen, progress),
    )  # fmt: skip


def label(spec: ProgramSpec) -> str:
    """A program's name with its bucket: "forward/t16-b1-r1-q16" for 16 tokens, a row, a row of logits, and queries of
    up to 16 tokens."""
    shape = spec.shape
    bucket = {"t": shape.tokens, "b": shape.rows, "r": shape.logits, "q": shape.max_query}
    return f"{spec.name}/{'-'.join(f'{letter}{size}' for letter, size in bucket.items() if size)}"


def _choose(planned: Planned, only: Sequence[str]) -> frozenset[str]:
    """The labels to compile. Raises InvalidValue for a pattern that none has."""
    labels = [label(spec) for spec, _ in planned.programs]
    for pattern in only:
        if not any(fnmatchcase(each, pattern) for each in labels):
            raise InvalidValue(f"no program has the name or pattern {pattern!r}; there are {', '.join(labels)}")
    return frozenset(each for each in labels if not only or any(fnmatchcase(each, pattern) for pattern in only))


def _capture(
    setup: Setup, planned: Planned, pages: Sequence[int], chosen: frozenset[str], progress: Progress
) -> tuple[CompiledProgram, ...]:
    session = setup.backend.session(setup.world.rank)
    try:
        session.load(setup.model.params(), setup.checkpoint, planned.packings)
        session.alloc_caches(setup.caches, pages, planned.plan.cache_layout)
        done: list[CompiledProgram] = []
        for spec, ops in planned.programs:
            if label(spec) in chosen:
                done.append(CompiledProgram(label(spec), spec.shape, _compile(setup, session, spec, ops)))
                progress(len(done), len(chosen), done[-1])
        return tuple(done)
    finally:
        session.close()


def _compile(setup: Setup, session: Session, spec: ProgramSpec, ops: PlannedOps) -> CaptureReport:
    try:
        return session.capture(spec.fn, spec.shape, spec.inputs, ops, spec.arrays, spec.host_outputs).report
    except LineshaftError:
        raise
    except Exception as error:
        raise PluginError(
            f"{label(spec)}: the compiler of backend {setup.info.name!r} fails with {one_line(error)}; -v shows where"
        ) from error
