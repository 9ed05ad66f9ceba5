"""How far a replay may be from its recording at each op, and how far it is.

Both run the same steps with the same token ids, so they differ by roundings alone, which pile up from op to op.
Rounding to nearest is off by eps / sqrt(12) of a value in the RMS, where eps is that of the executed dtype, and a
reduction of length K adds up to sqrt(K) roundings of the accumulation dtype. Roundings are independent, so that their
squares add:

    unit_i   = sqrt(sum over calls j <= i of the step of (eps(executed)^2 + K_j eps(accumulation)^2) / 12)
    L2 (RMS) differ by at most 2 * 3 * unit_i * RMS of the recorded output
    Linf     differ by at most 2 * 5 * unit_i * largest magnitude of the recorded output

3 and 5 are c of the ops' own rule (`OpSpec.tolerance`), 2 stands for two runs that round differently, K is
`tolerance.depth(problem)`. A later step starts anew: what it reads of earlier steps are keys and values of the same
layer, made of as many roundings.

This takes it that no op makes an error larger than it comes in. Most do not, but a softmax between two equal scores
does, at some head of some step. Hence the recording measures it: it runs the generation again with weights that are off
by a random rounding each (`shaken`), and where an output moved by more than unit_i * RMS, that takes its place in both
rules. Without the recorded tensors the RMS is estimated from sketches, which is allowed three standard deviations more.

Integers must be equal, but for the ids of an argmax: ids whose logits lie as near as the logits may differ are a tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lineshaft_conformance.trace.digests import SPREAD, Digest, Distance, digest, estimate, exact
from lineshaft_conformance.trace.store import Kept
from lineshaft_conformance.trace.watch import Call, Result
from lineshaft_contract.ops.spec import epsilon
from lineshaft_contract.sessions import HostArray

RUNS = 2
"""Runs whose roundings add up: the recorded one and the replayed one."""


@dataclass(frozen=True)
class Compared:
    """One output of one call of one step. `ratio` is the error over what is allowed: above 1 is beyond tolerance."""

    step: int
    call: int
    name: str  # in the forward
    output: str
    op: str
    layer: int | None
    problem: str
    recorded_kernel: str
    kernel: str
    ratio: float
    what: str  # how far it is, in words

    @property
    def beyond(self) -> bool:
        return self.ratio > 1

    @property
    def place(self) -> str:
        """Where it is, in words."""
        layer = "outside the layers" if self.layer is None else f"layer {self.layer}"
        return f"step {self.step}, {layer}, op {self.op} (call {self.call}, output {self.output})"

    def to_json(self) -> dict[str, Any]:
        ratio = self.ratio if math.isfinite(self.ratio) else None
        return {**asdict(self), "ratio": ratio, "beyond": self.beyond}


class Allowance:
    """The roundings of one step so far."""

    def __init__(self) -> None:
        self._squares = 0.0

    def add(self, call: Call) -> float:
        """Count a call's own roundings; returns unit_i."""
        dtype = call.problem.dtype
        accumulate = "float64" if dtype == "float64" else call.op.accumulate
        depth = max(call.op.tolerance.depth(call.problem), 1)
        self._squares += (rounding(dtype) ** 2 + depth * rounding(accumulate) ** 2) / 12
        return math.sqrt(self._squares)


def rounding(dtype: str) -> float:
    """eps of a float dtype; integers are not rounded."""
    return 0.0 if dtype.startswith(("int", "uint", "bool")) else epsilon(dtype)


def compare(
    step: int,
    result: Result,
    unit: float,
    recorded: Mapping[str, Kept],
    tensors: Mapping[str, HostArray],
    facts: Mapping[str, Any],
    chosen: HostArray,
) -> list[Compared]:
    """The outputs of one call against their digests, and against `tensors` where these were kept.

    `facts` is the recorded call, `chosen` the ids that the recorded step chose.
    """
    found = []
    for output, array in result.outputs.items():
        if result.given is not None:
            ratio, what = compare_ids(chosen, array, result.given, unit * RUNS * result.call.op.tolerance.l2)
        elif (before := recorded.get(output)) is None:
            ratio, what = math.inf, "the recording has no such output"
        else:
            ratio, what = compare_output(before, array, unit, result.call, tensors.get(output))
        found.append(
            Compared(
                step, result.index, result.call.noted.name, output, result.call.op.name, result.call.noted.layer,
                result.call.problem.describe(), facts["kernel"], result.call.kernel, ratio, what,
            )
        )  # fmt: skip
    return found


def compare_output(
    kept: Kept, array: HostArray, unit: float, call: Call, tensor: HostArray | None
) -> tuple[float, str]:
    """(error over allowed error, in words) of one output."""
    before = kept.digest
    if (before.dtype, before.shape) != (array.dtype.name, array.shape):
        return math.inf, f"{array.dtype.name}{list(array.shape)} instead of {before.dtype}{list(before.shape)}"
    after = digest(array)
    if (after.nan, after.inf) != (before.nan, before.inf):
        return math.inf, f"{after.nan} NaN and {after.inf} inf instead of {before.nan} and {before.inf}"
    if after.sha256 == before.sha256:
        return 0.0, "equal"
    if array.dtype.kind in "iub":
        return math.inf, "integers differ"
    rule, unit = call.op.tolerance, max(unit, over(kept.sensitivity, before.rms))
    if tensor is None:
        return measured(estimate(before, after), before, unit * RUNS * rule.l2 * SPREAD, math.inf, "about ")
    return measured(exact(tensor, array), before, unit * RUNS * rule.l2, unit * RUNS * rule.linf, "")


def measured(distance: Distance, before: Digest, l2: float, linf: float, about: str) -> tuple[float, str]:
    """The worse of both norms; `l2` and `linf` are what is allowed relative to the recorded output."""
    ratio = over(distance.rms, l2 * before.rms)
    what = f"RMS error {about}{distance.rms:.3g}, allowed {l2 * before.rms:.3g}, RMS of the output {before.rms:.3g}"
    if over(distance.largest, linf * before.top) > ratio:
        ratio = over(distance.largest, linf * before.top)
        what = f"largest error {distance.largest:.3g}, allowed {linf * before.top:.3g}, largest value {before.top:.3g}"
    return ratio, what


def compare_ids(chosen: HostArray, ids: HostArray, logits: HostArray, relative: float) -> tuple[float, str]:
    """Ids of an argmax over `logits`, the replay's own: another id is a tie if its logit lies near enough."""
    if chosen.shape != ids.shape:
        return math.inf, f"{len(ids)} ids instead of {len(chosen)}"
    values, worst, what = logits.astype(np.float64), 0.0, "equal"
    allowed = relative * float(np.sqrt(np.mean(np.square(values))))
    for row in np.flatnonzero(chosen != ids):
        mine, other = int(ids[row]), int(chosen[row])
        if mine < 0 or other < 0:
            return math.inf, f"row {row} chooses {mine} instead of {other} (-1: the logits are NaN)"
        gap = abs(float(values[row, mine] - values[row, other]))
        if over(gap, allowed) >= worst:
            worst = over(gap, allowed)
            what = f"row {row} chooses {mine} instead of {other}, whose logit is {gap:.3g} apart, allowed {allowed:.3g}"
    return worst, what


def over(error: float, allowed: float) -> float:
    """error / allowed; 0 for no error or an unknown one, infinite where none is allowed."""
    if not error > 0:
        return 0.0
    return error / allowed if allowed > 0 else math.inf
