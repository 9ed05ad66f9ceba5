"""A cost model from measured steps: a time for each bucket, and prices of what varies within one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft.executors import Executor, Forwarding
from lineshaft.plan.plan import make_shape
from lineshaft.runner.buckets import Need, fit
from lineshaft.runner.messages import Sizes, StepMessage
from lineshaft_bench.errors import DeviceError
from lineshaft_bench.simulator.cost import Linear, Load
from lineshaft_contract.steps import StepShape

ROUNDS, OUTLIER = 3, 4.0
"""Fits, each of which leaves out samples whose error is so many times the median."""
PLAIN = {"row_s": "rows", "token_s": "tokens", "context_s": "context", "pair_s": "pairs"}
"""Prices of the plain model, and what they are for."""

Array = np.ndarray[Any, np.dtype[np.float64]]
Bucket = tuple[int, int, int]
"""Tokens, rows and longest query of a step's static shape."""
SLOPES = ("context", "pairs")
"""Parts of the load whose price is the same in every bucket."""


@dataclass(frozen=True)
class Sample:
    """One measured step."""

    bucket: Bucket
    load: Load
    seconds: float


def bucket_of(shape: StepShape) -> Bucket:
    return shape.tokens, shape.rows, shape.max_query


class Watching(Forwarding):
    """An executor that notes the load of every step on its way to another executor; `sizes` is what that found."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.sizes: Sizes = inner.size()[0]
        self.seen: list[tuple[Bucket, Load]] = []

    def submit(self, steps: Sequence[StepMessage]) -> None:
        self.seen.append((bucket_of(steps[0].shape), load_in(steps[0])))
        self.inner.submit(steps)


def load_in(step: StepMessage) -> Load:
    """The work of a packed step, padding left out."""
    context = step.forward["context_lens.0"].astype(np.int64)
    counts = np.diff(step.forward["query_starts"]).astype(np.int64)
    live = context > 0
    context, counts = context[live], counts[live]
    pairs = counts * (2 * context - counts + 1) / 2
    return Load(len(counts), int(counts.sum()), int(context.sum()), float(pairs.sum()), 0, int(counts.max(initial=0)))


@dataclass(frozen=True)
class Fitted:
    """Seconds of a step: of its bucket, and of what it attends to; of a bucket that was not seen, what `plain` says."""

    buckets: Mapping[Bucket, float]
    slopes: Mapping[str, float]
    plain: Linear
    shapes: tuple[StepShape, ...]  # of the engine, smallest first

    def seconds(self, load: Load) -> float:
        """One step, in the bucket that the engine would take."""
        need = Need(load.tokens, load.rows, load.logits, load.longest)
        return self.seconds_in(bucket_of(fit(self.shapes, need)), load)

    def seconds_in(self, bucket: Bucket, load: Load) -> float:
        """One step in this bucket."""
        base = self.buckets.get(bucket)
        if base is None:
            return self.plain.seconds(padded(load, bucket))
        return base + sum(price * float(getattr(load, name)) for name, price in self.slopes.items())


def padded(load: Load, bucket: Bucket) -> Load:
    """The load with the bucket's tokens and rows."""
    return load._replace(tokens=bucket[0], rows=bucket[1])


def fit_cost(samples: Sequence[Sample], shapes: Sequence[StepShape]) -> Fitted:
    """The model of least relative error, without negative prices; outliers are left out. Needs at least one sample."""
    kept = list(samples)
    for _ in range(ROUNDS):
        found = _fit(kept, tuple(shapes))
        errors = np.array([abs(found.seconds_in(s.bucket, s.load) / s.seconds - 1) for s in kept])
        kept = [s for s, error in zip(kept, errors, strict=True) if error <= max(OUTLIER * np.median(errors), 0.02)]
    return _fit(kept, tuple(shapes))


def _fit(samples: Sequence[Sample], shapes: tuple[StepShape, ...]) -> Fitted:
    seconds = np.array([sample.seconds for sample in samples])
    buckets = sorted({sample.bucket for sample in samples})
    slopes = [[getattr(sample.load, name) for name in SLOPES] for sample in samples]
    in_bucket = [[sample.bucket == bucket for bucket in buckets] for sample in samples]
    prices = least(np.hstack([np.array(in_bucket, float), np.array(slopes, float)]), seconds)
    loads = [padded(sample.load, sample.bucket) for sample in samples]
    plain = least(np.array([[1.0, *(getattr(load, name) for name in PLAIN.values())] for load in loads]), seconds)
    return Fitted(
        dict(zip(buckets, prices, strict=False)),
        dict(zip(SLOPES, prices[len(buckets) :], strict=True)),
        Linear(plain[0], **dict(zip(PLAIN, plain[1:], strict=True))),
        shapes,
    )


def least(columns: Array, seconds: Array) -> list[float]:
    """Prices of the columns, none below 0, with the least squares of relative errors."""
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    used, prices = np.ones(columns.shape[1], bool), np.zeros(columns.shape[1])
    while used.any():
        matrix = columns[:, used] / scale[used] / seconds[:, None]
        prices[:] = 0.0
        prices[used] = np.linalg.lstsq(matrix, np.ones(len(seconds)), rcond=None)[0]
        if (prices >= 0).all():
            break
        used &= prices >= 0
    return [float(price) for price in np.maximum(prices, 0.0) / scale]


def to_json(cost: Fitted) -> dict[str, Any]:
    """What `from_json` reads."""
    return {
        "buckets": [[*bucket, seconds] for bucket, seconds in cost.buckets.items()],
        "slopes": dict(cost.slopes), "plain": asdict(cost.plain), "shapes": [asdict(shape) for shape in cost.shapes],
    }  # fmt: skip


def read_cost(file: Path) -> Fitted:
    """A cost model as `to_json` made it. Raises DeviceError."""
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        buckets = {(int(t), int(r), int(q)): float(seconds) for t, r, q, seconds in made["buckets"]}
        shapes = tuple(make_shape(shape) for shape in made["shapes"])
        slopes = {name: float(made["slopes"][name]) for name in SLOPES}
        return Fitted(buckets, slopes, Linear(**made["plain"]), shapes)
    except OSError as error:
        raise DeviceError(
            f"{file}: {error.strerror}; give a file that benchmarks/validate_simulator.py wrote"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeviceError(f"{file}: it holds no cost model: {type(error).__name__}: {error}") from error
