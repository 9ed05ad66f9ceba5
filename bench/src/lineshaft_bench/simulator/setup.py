"""What a simulation is made of: a scheduler and a cache of the size that a device has room for. Knows no trace."""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.errors import InvalidValue, OutOfMemory
from lineshaft.scheduler import Limits, Scheduler
from lineshaft_bench.simulator.cost import StepCost
from lineshaft_bench.simulator.device import Device
from lineshaft_bench.simulator.loop import Outcome, Simulation
from lineshaft_bench.simulator.model import ModelFigures
from lineshaft_bench.traces import Trace

POLICIES = ("fifo",)


@dataclass(frozen=True)
class Setting:
    """The engine's settings that a simulation obeys."""

    limits: Limits
    pages: int  # with the null page
    page_size: int = 16
    prefix_caching: bool = True
    watermark: float = 0.01
    overlap: bool = False  # whether a step is scheduled while the one before runs

    def run(self, trace: Trace, cost: StepCost, policy: str) -> Outcome:
        """Simulate the trace under a policy of admission. Raises InvalidValue for an unknown one."""
        return self.simulation(cost, policy).run(trace.arrivals)

    def simulation(self, cost: StepCost, policy: str, *, keep: bool = False) -> Simulation:
        """One that is ready to run."""
        if policy not in POLICIES:
            raise InvalidValue(f"policy {policy!r}: known are {', '.join(POLICIES)}")
        groups = [GroupSpec(self.pages, self.page_size)]
        cache = CacheManager(groups, prefix_caching=self.prefix_caching, watermark=self.watermark)
        return Simulation(Scheduler(self.limits, cache), cache, cost, overlap=self.overlap, keep=keep)


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
