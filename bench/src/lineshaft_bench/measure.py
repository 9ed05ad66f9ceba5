"""Runs a workload on our engine and on its peers in turns, and sums up what was seen beside what is possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lineshaft.config import EngineConfig
from lineshaft.registry import discover
from lineshaft.scheduler import Limits
from lineshaft_bench.bounds import Bounds
from lineshaft_bench.convert import folder_for_peers
from lineshaft_bench.figures import FIGURES, Ran
from lineshaft_bench.peers.client import BOUNDS, OURS, Peer
from lineshaft_bench.simulator.cost import Roofline, StepCost
from lineshaft_bench.simulator.device import Device
from lineshaft_bench.simulator.model import ModelFigures, model_figures
from lineshaft_bench.simulator.setup import Setting, pages_per_request
from lineshaft_bench.stats import Spread
from lineshaft_bench.traces import Arrival
from lineshaft_bench.workloads import AT_ONCE, Round, Workload, workload
from lineshaft_contract.host import usable_cpus

BOUND = "bound"
SHARES = {
    "tpot_over_read": "TPOT over the read of a token's weights",
    "share_of_peak": "share of the peak arithmetic",
}
"""What a request alone gives against the bounds of its round: by decoding, and by a prompt with one token out."""
SETTLE_S = 0.3
"""Before each turn: threads of the engine before wait in a loop for more work, up to 0.2 s by their libraries' default,
and would compete with the next."""
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
    """All engines on one workload, with the machine's bounds as they were in each round.

    `bound` is each round on a machine without any cost but memory and arithmetic at those rates.
    """

    workload: str
    engines: Mapping[str, Measured]
    bounds: Sequence[Bounds]
    bound: Sequence[Mapping[str, float]]
    model: ModelFigures

    @property
    def others(self) -> list[str]:
        """The peers."""
        return [name for name in self.engines if name != OURS]

    def of_bound(self, name: str) -> Spread | None:
        """A figure of the bound, over the rounds."""
        return spread_of([each.get(name) for each in self.bound])

    def ratio(self, name: str, other: str) -> Spread | None:
        """A figure of ours over another engine's, or over the bound's, of the same round; over the rounds."""
        ours = [each.get(name) for each in self.engines[OURS].rounds]
        theirs = [each.get(name) for each in (self.bound if other == BOUND else self.engines[other].rounds)]
        return spread_of([a / b if a and b else None for a, b in zip(ours, theirs, strict=True)])

    def best_peer(self, name: str) -> str | None:
        """The peer with the best median of a figure."""
        found = {other: figures[name].median for other in self.others
                 if name in (figures := self.engines[other].figures)}  # fmt: skip
        choose = min if FIGURES[name][1] == "less" else max
        return choose(found, key=lambda other: found[other]) if found else None

    def over_bounds(self, engine: str) -> dict[str, Spread]:
        """SHARES of an engine against the bounds of the same round, where the workload has them."""
        found: dict[str, list[float | None]] = {name: [] for name in SHARES}
        for ran, bounds in zip(self.engines[engine].ran, self.bounds, strict=True):
            alone = len(ran.jobs) == 1
            if alone and ran.tpot:
                found["tpot_over_read"].append(ran.tpot[0] * bounds.read_bytes_per_s / self.model.weights_read(1))
            if alone and ran.jobs[0].out == 1:
                rate = self.model.prompt_flops(len(ran.jobs[0].prompt)) / ran.ttft[0]
                found["share_of_peak"].append(rate / bounds.flops_per_s)
        return {name: spread for name, values in found.items() if (spread := spread_of(values))}

    def to_json(self) -> dict[str, Any]:
        """Everything but the moments of single tokens."""
        ratios = {
            other: {name: asdict(spread) for name in FIGURES if (spread := self.ratio(name, other))}
            for other in (BOUND, *self.others)
        }
        return {
            "workload": self.workload, "bounds": [asdict(each) for each in self.bounds],
            "bound": [dict(each) for each in self.bound], "token_bytes": self.model.weights_read(1),
            "engines": {name: engine.to_json() for name, engine in self.engines.items()}, "ratios": ratios,
            "best_peer": {name: best for name in FIGURES if (best := self.best_peer(name))},
            "over_bounds": {
                name: {share: asdict(spread) for share, spread in self.over_bounds(name).items()}
                for name in self.engines
            },
        }  # fmt: skip


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """Of the values that there are."""
    there = [value for value in values if value is not None]
    return Spread.of(there) if there else None


@dataclass(frozen=True)
class Bench:
    """What to measure: our configuration, the peers with their environments and models, and how often."""

    config: EngineConfig
    peers: Sequence[str]
    environments: Mapping[str, Path]
    models: Mapping[str, str]  # of a peer, where it is not ours
    scratch: Path
    rounds: int | None = None  # None: as many as the workload says
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
            machine = stack.enter_context(self._start(BOUNDS))
            settings = {"dtype": self.config.dtype, "quantization": self.config.quantization}
            model = model_figures(self.config.model, discover(), tp=self.config.layout.tp, **settings)
            machine.ask("load", **settings, threads=self.threads, size=model.dense_bytes,
                        library=loaded[OURS]["library"])  # fmt: skip
            works = [workload(name, loaded[OURS]["vocab"], self.rounds) for name in names]
            return [self._measure(work, machine, engines, loaded, model, tell) for work in works]

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
        self, work: Workload, machine: Peer, engines: Mapping[str, Peer], loaded: Mapping[str, Any],
        model: ModelFigures, tell: Told,
    ) -> Comparison:  # fmt: skip
        """Rounds of: the machine, ours, and each peer, one after the other."""
        found, bounds = {engine: Measured(loaded[engine]) for engine in engines}, []
        for engine in engines.values():
            engine.run(work.warmup)
        for number, jobs in enumerate(work.rounds, 1):
            tell(f"{work.name}: round {number} of {len(work.rounds)}")
            time.sleep(SETTLE_S)
            bounds.append(Bounds(**machine.ask("measure")))
            for key, engine in engines.items():
                time.sleep(SETTLE_S)
                found[key].ran.append(engine.run(jobs))
                found[key].rounds.append(found[key].ran[-1].figures())
        for key, engine in engines.items():
            found[key].peak_bytes = engine.ask("memory")["peak_bytes"]
        found[OURS].facts = engines[OURS].ask("facts")
        bound = [self._bound(jobs, each, model).figures() for jobs, each in zip(work.rounds, bounds, strict=True)]
        return Comparison(work.name, found, bounds, bound, model)

    def _bound(self, jobs: Round, bounds: Bounds, model: ModelFigures) -> Ran:
        """A round, simulated under our limits with nothing but the rates that were measured in it."""
        dtype: str = self.config.dtype
        device = Device(
            memory_bytes=1e15, memory_bytes_per_s=bounds.read_bytes_per_s, flops_per_s={dtype: bounds.flops_per_s}
        )
        settings, size = self.config.scheduler, self.config.cache.page_size or 16
        limits = Limits(settings.token_budget, settings.max_rows, model.context)
        pages = tuple(1 + limits.max_rows * count for count in pages_per_request(model, limits, size))
        windows = tuple(group.window for group in model.groups)
        setting = Setting(limits, pages, size, windows, self.config.cache.prefix_caching)
        return simulated(jobs, setting, Roofline(model, device, dtype))


def simulated(jobs: Round, setting: Setting, cost: StepCost) -> Ran:
    """A round as a simulation runs it; each id is a segment of its own, so that what is shared is shared."""
    simulation = setting.simulation(cost, keep=True)
    order = sorted(range(len(jobs)), key=lambda n: jobs[n].at)
    simulation.run([Arrival(jobs[n].at, tuple((id, 1) for id in jobs[n].prompt), jobs[n].out) for n in order])
    assert simulation.stamps is not None
    stamps = {n: simulation.stamps[place] for place, n in enumerate(order)}
    return Ran(jobs, [stamps[n] for n in range(len(jobs))])
