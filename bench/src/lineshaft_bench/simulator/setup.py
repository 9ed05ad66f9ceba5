"""What a simulation is made of: a scheduler and a cache of the size that a device has room for. Knows no trace."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.cache.pool import pages_for, pages_in_window
from lineshaft.errors import OutOfMemory
from lineshaft.runner.sizing import shares
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
    pages: tuple[int, ...]  # of each cache group, with the null page
    page_size: int = 16
    windows: tuple[int, ...] = (0,)  # of each cache group; 0: none
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
            [GroupSpec(pages, self.page_size, window) for pages, window in zip(self.pages, self.windows, strict=True)],
            prefix_caching=self.prefix_caching, watermark=self.watermark,
            chunk=self.limits.chunk, eviction=contender.eviction, swap_pages=contender.swap_pages,
        )  # fmt: skip
        scheduler = Scheduler(self.limits, cache, contender.policy)
        return Simulation(scheduler, cache, cost, overlap=self.overlap, max_tokens=self.max_tokens, keep=keep)


def pages_that_fit(
    model: ModelFigures, device: Device, limits: Limits, page_size: int, fraction: float
) -> tuple[int, ...]:
    """Pages of each group for which a device has room beside the weights, at most what the limits can use. Raises
    OutOfMemory where one request does not fit."""
    needed = pages_per_request(model, limits, page_size)
    page_bytes = [max(1, round(group.kv_bytes * page_size)) for group in model.groups]
    free = int(device.memory_bytes * fraction - model.weight_bytes)
    pages = shares(max(0, free), page_bytes, [1 + limits.max_rows * count for count in needed])
    if any(count < 2 for count in pages):
        raise OutOfMemory(
            f"weights of {model.weight_bytes / 1e9:.2f} GB leave no page of {fraction:.0%} of the device's "
            f"{device.memory_bytes / 1e9:.2f} GB; take a smaller model, more ranks (--tp) or another device"
        )
    return tuple(pages)


def pages_per_request(model: ModelFigures, limits: Limits, page_size: int) -> list[int]:
    """The most pages that one request holds in each group."""
    whole = pages_for(limits.max_model_len, page_size)
    return [
        min(whole, pages_in_window(group.window, page_size, limits.chunk)) if group.window else whole
        for group in model.groups
    ]
