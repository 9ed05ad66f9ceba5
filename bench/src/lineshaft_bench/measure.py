"""Runs a workload on our engine and on its peers in turns, and sums up what was seen beside what is possible."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from lineshaft.config import EngineConfig
from lineshaft.registry import Registry, discover
from lineshaft.scheduler import Limits
from lineshaft_bench.bounds import Bounds
from lineshaft_bench.convert import folder_for_peers
from lineshaft_bench.figures import FIGURES, Ran
from lineshaft_bench.peers.client import OURS, Peer
from lineshaft_bench.simulator.cost import Roofline, StepCost
from lineshaft_bench.simulator.device import Device
from lineshaft_bench.simulator.model import model_figures
from lineshaft_bench.simulator.setup import Setting, pages_per_request
from lineshaft_bench.stats import Spread
from lineshaft_bench.traces import Arrival
from lineshaft_bench.workloads import AT_ONCE, Round, Workload, workload
from lineshaft_contract.host import usable_cpus

BOUND = "bound"
Told = Callable[[str], None]


@dataclass
class Measured:
    """One engine on one workload: the figures of each round, and what it said of itself."""

    loaded: Mapping[str, Any]
    rounds: list[dict[str, float]] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    peak_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Spread]:
        """FIGURES over the rounds, and tokens per second and GB of memory."""
        found = {name: Spread.of([each[name] for each in self.rounds]) for name in self.rounds[0]}
        rate, gigabytes = found["output_tokens_per_s"], self.peak_bytes / 1e9 or 1.0
        found["output_tokens_per_s_gb"] = Spread(*(value / gigabytes for value in asdict(rate).values()))
        return found

    def to_json(self) -> dict[str, Any]:
        figures = {name: asdict(spread) for name, spread in self.figures.items()}
        return {
            **self.loaded, "peak_bytes": self.peak_bytes, **self.facts, "figures": figures, "rounds": self.rounds,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All engines on one workload; `bound` is the workload on a machine without any cost but memory and arithmetic."""

    workload: str
    engines: Mapping[str, Measured]
    bounds: Bounds
    bound: Mapping[str, float]

    def ratio(self, name: str, other: str) -> float | None:
        """Ours over another engine's, or over the bound: the median over the rounds of a figure's ratios."""
        ours = [each.get(name) for each in self.engines[OURS].rounds]
        if other == BOUND:
            theirs = [self.bound.get(name)] * len(ours)
        else:
            theirs = [each.get(name) for each in self.engines[other].rounds]
        found = [a / b for a, b in zip(ours, theirs, strict=True) if a and b]
        return statistics.median(found) if found else None

    def to_json(self) -> dict[str, Any]:
        others = [BOUND, *(name for name in self.engines if name != OURS)]
        return {
            "workload": self.workload, "bounds": asdict(self.bounds), "bound": dict(self.bound),
            "engines": {name: engine.to_json() for name, engine in self.engines.items()},
            "ratios": {other: {name: self.ratio(name, other) for name in FIGURES} for other in others},
        }  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What to measure: our configuration, the peers with their environments and models, and how often."""

    config: EngineConfig
    peers: Sequence[str]
    environments: Mapping[str, Path]
    models: Mapping[str, str]  # of a peer, where it is not ours
    scratch: Path
    repeat: int = 1
    timeline: str = ""

    @property
    def threads(self) -> int:
        """Of every engine, and of the bounds."""
        return self.config.threads or usable_cpus()

    def run(self, names: Sequence[str], tell: Told) -> list[Comparison]:
        """Measure these workloads, one after the other. Raises PeerError, and what an engine raises."""
        with ExitStack() as stack:
            engines = {name: stack.enter_context(self._start(name)) for name in (OURS, *self.peers)}
            longest = max(workload(name, 1 << 20).longest for name in names)
            loaded = {}
            for name, engine in engines.items():
                tell(f"loading {name}")
                loaded[name] = self._load(engine, longest)
            works = [workload(name, loaded[OURS]["vocab"], self.repeat) for name in names]
            found = [self._measure(work, engines, loaded, tell) for work in works]
            dtype = loaded[OURS]["precision"]
            bounds = Bounds(**engines[OURS].ask("bounds", threads=self.threads, dtype=dtype))
        figures = [self._bound(work, bounds, discover()) for work in works]
        return [Comparison(*parts) for parts in zip(names, found, repeat(bounds), figures, strict=False)]

    def _start(self, name: str) -> Peer:
        return Peer(name, self.environments.get(name), self.threads, self.scratch / f"{name}.log")

    def _load(self, engine: Peer, longest: int) -> dict[str, Any]:
        longest += 64  # an engine may refuse to fill its context to the end
        if engine.name == OURS:
            config = {"max_model_len": longest, **self.config.model_dump(mode="json", exclude_unset=True)}
            return engine.ask("load", config=config | {"threads": self.threads}, timeline=self.timeline)
        model = self.models.get(engine.name) or str(
            folder_for_peers(self.config.model, self.config.dtype, self.scratch)
        )
        rows = min(AT_ONCE, self.config.scheduler.max_rows)
        return engine.ask(
            "load", model=str(model), dtype=self.config.dtype, threads=self.threads, rows=rows, longest=longest
        )

    def _measure(
        self, work: Workload, engines: Mapping[str, Peer], loaded: Mapping[str, Any], tell: Told
    ) -> dict[str, Measured]:
        found = {engine: Measured(loaded[engine]) for engine in engines}
        for engine in engines.values():
            engine.run(work.warmup)
        for number, jobs in enumerate(work.rounds, 1):
            tell(f"{work.name}: round {number} of {len(work.rounds)}")
            for key, engine in engines.items():
                found[key].ran.append(engine.run(jobs))
                found[key].rounds.append(found[key].ran[-1].figures())
        for key, engine in engines.items():
            found[key].peak_bytes = engine.ask("memory")["peak_bytes"]
        found[OURS].facts = engines[OURS].ask("facts")
        return found

    def _bound(self, work: Workload, bounds: Bounds, registry: Registry) -> dict[str, float]:
        """The workload's last round, simulated under our limits with nothing but the measured rates."""
        dtype = bounds.dtype
        model = model_figures(self.config.model, registry, dtype, self.config.layout.tp)
        flops = {dtype: bounds.flops_per_s}
        device = Device(memory_bytes=1e15, memory_bytes_per_s=bounds.read_bytes_per_s, flops_per_s=flops)
        settings, size = self.config.scheduler, self.config.cache.page_size or 16
        limits = Limits(settings.token_budget, settings.max_rows, model.context)
        pages = tuple(1 + limits.max_rows * count for count in pages_per_request(model, limits, size))
        windows = tuple(group.window for group in model.groups)
        setting = Setting(limits, pages, size, windows, self.config.cache.prefix_caching)
        cost = Roofline(model, device, dtype)
        return simulated(work.rounds[-1], setting, cost).figures()


def simulated(jobs: Round, setting: Setting, cost: StepCost) -> Ran:
    """A round as a simulation runs it; each id is a segment of its own, so that what is shared is shared."""
    simulation = setting.simulation(cost, keep=True)
    order = sorted(range(len(jobs)), key=lambda n: jobs[n].at)
    simulation.run([Arrival(jobs[n].at, tuple((id, 1) for id in jobs[n].prompt), jobs[n].out) for n in order])
    assert simulation.stamps is not None
    stamps = {n: simulation.stamps[place] for place, n in enumerate(order)}
    return Ran(jobs, [stamps[n] for n in range(len(jobs))])
