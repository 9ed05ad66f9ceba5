"""How long a step takes on a modelled device. Knows how much work a step is, not which requests are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lineshaft_bench.simulator.device import Device
from lineshaft_bench.simulator.model import ModelFigures

Seen = tuple[int, float]
"""Tokens whose keys and values are read, and (query, key) pairs."""


class Load(NamedTuple):
    """The work of one step."""

    rows: int  # sequences
    tokens: int  # computed, of decode and prefill together
    context: int  # tokens whose keys and values are read, over all rows
    pairs: float  # (query, key) pairs that attend
    logits: int  # rows whose next token is sampled
    longest: int = 1  # tokens of a row
    swapped: int = 0  # tokens whose keys and values go to the host or come back
    seen: Mapping[int, Seen] = {}  # within each window of the model, in the place of `context` and `pairs`


class StepCost(Protocol):
    """Gives the seconds of a step."""

    def seconds(self, load: Load) -> float: ...


@dataclass(frozen=True)
class Roofline:
    """The larger of memory time and arithmetic time (Williams, 2009), then communication, swaps and host time."""

    model: ModelFigures
    device: Device
    dtype: str = "bfloat16"
    ranks: int = 1  # tensor-parallel; `model` holds one rank's share

    def seconds(self, load: Load) -> float:
        """One step, host time included."""
        device, host = self.device, self.device.host_s + load.rows * self.device.host_row_s
        swaps = load.swapped * self.model.kv_bytes / device.host_link_bytes_per_s
        busy = self.busy(load) + device.launch_s + self.communication(load) + swaps
        return max(busy, host) if device.overlap else busy + host

    def busy(self, load: Load) -> float:
        """Seconds of the memory or the arithmetic, whichever is slower."""
        model, device = self.model, self.device
        moved = model.weights_read(load.tokens)
        work = load.tokens * model.token_flops + load.logits * model.logit_flops
        for group in model.groups:
            context, pairs = load.seen[group.window] if group.window else (load.context, load.pairs)
            moved += group.kv_bytes * (context + load.tokens)
            work += group.pair_flops * pairs
        return max(moved / device.bandwidth, work / device.flops(self.dtype))

    def communication(self, load: Load) -> float:
        """Two all-reduces a layer, each of which moves 2 (n - 1) / n of the activations through every link."""
        if self.ranks == 1:
            return 0.0
        calls, model, device = 2 * self.model.layers, self.model, self.device
        moved = load.tokens * model.hidden * model.itemsize * 2 * (self.ranks - 1) / self.ranks
        return calls * (device.link_latency_s + moved / device.link_bytes_per_s)


@dataclass(frozen=True)
class Linear:
    """Seconds as a fitted sum: a constant and a price for each part of the work."""

    step_s: float
    row_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0
    pair_s: float = 0.0
    logit_s: float = 0.0

    def seconds(self, load: Load) -> float:
        """One step."""
        return (
            self.step_s + self.row_s * load.rows + self.token_s * load.tokens + self.context_s * load.context
            + self.pair_s * load.pairs + self.logit_s * load.logits
        )  # fmt: skip
