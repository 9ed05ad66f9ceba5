"""What a simulation is made of: a scheduler and a cache of the size that a device has room for. Knows no trace."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.errors import OutOfMemory
from lineshaft.scheduler import Limits, Policy, Scheduler
from lineshaft_bench.simulator.cost import StepCost
from lineshaft_bench.simulator.device import Device
from lineshaft_bench.simulator.loop import Outcome, Simulation
from lineshaft_bench.simulator.model import ModelFigures
from lineshaft_bench.traces import Trace


@dataclass(frozen=True)
class Contender:
    """What is compared: how the scheduler chooses among requests, and which page the cache gives up first."""

    policy: Policy = field(default_factory=Policy)
    eviction: str = "lru"
    swap_pages: int = 0  # on the host


@dataclass(frozen=True)
class Setting:
    """The engine's settings that a simulation obeys."""

    limits: Limits
    pages: int  # with the null page
    page_size: int = 16
    prefix_caching: bool = True
    watermark: float = 0.01
    overlap: bool = False  # whether a step is scheduled while the one before runs
    max_tokens: int | None = None  # what requests ask for; None: exactly what they generate

    def run(self, trace: Trace, cost: StepCost, contender: Contender | None = None) -> Outcome:
        """Simulate the trace."""
        return self.simulation(cost, contender).run(trace.arrivals)

    def simulation(self, cost: StepCost, contender: Contender | None = None, *, keep: bool = False) -> Simulation:
        """One that is ready to run."""
        contender = contender or Contender()
        cache = CacheManager(
            [GroupSpec(self.pages, self.page_size)], prefix_caching=self.prefix_caching, watermark=self.watermark,
            chunk=self.limits.chunk, eviction=contender.eviction, swap_pages=contender.swap_pages,
        )  # fmt: skip
        scheduler = Scheduler(self.limits, cache, contender.policy)
        return Simulation(scheduler, cache, cost, overlap=self.overlap, max_tokens=self.max_tokens, keep=keep)


def pages_that_fit(model: ModelFigures, device: Device, page_size: int, fraction: float) -> int:
    """Pages for which a device has room beside the weights. Raises OutOfMemory where there is not even one."""
    free = device.memory_bytes * fraction - model.weight_bytes
    pages = int(free / (model.kv_bytes * page_size)) if model.kv_bytes else 2
    if pages < 2:
        raise OutOfMemory(
            f"weights of {model.weight_bytes / 1e9:.2f} GB leave no page of {fraction:.0%} of the device's "
            f"{device.memory_bytes / 1e9:.2f} GB; take a smaller model, more ranks (--tp) or another device"
        )
    return pages
