"""The reference backend on the very steps that an engine made for another one, and how far the two are apart.

The steps hold the subject's own tokens, so the reference never goes another way: it is teacher-forced by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from lineshaft.config import EngineConfig
from lineshaft.layout import Degrees
from lineshaft.models import BuildContext
from lineshaft.plan import ProgramSpec
from lineshaft.registry import Registry
from lineshaft.runner.messages import StepMessage
from lineshaft.runner.programs import FORWARD, forward_function
from lineshaft.runner.setup import open_model
from lineshaft_conformance.harness.rig import Rig
from lineshaft_conformance.harness.watched import Step
from lineshaft_conformance.results import Deviation
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.ops.logits import argmax, sample
from lineshaft_contract.ops.spec import Tolerance, epsilon
from lineshaft_contract.problems import SampleProblem
from lineshaft_contract.reference.backend import NAME
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import HostStep, StepShape, forward_inputs

RULE = Tolerance()
"""The contract's rule; its K is the model's width, the reduction that makes the logits: what is lost before it shows in
the error of the reference run."""


class Reference:
    """A session of the reference backend with the programs of some shapes; every step is run in order on it."""

    def __init__(
        self,
        config: EngineConfig,
        registry: Registry,
        dtype: str,
        page_size: int,
        pages: Sequence[int],
        shapes: Iterable[StepShape],
    ) -> None:
        checkpoint, family = open_model(config, registry)
        subject = Subject(Target(NAME), registry)
        context = BuildContext(dtype, dtype, page_size, Degrees(), max_model_len=config.max_model_len)
        model = family.build(checkpoint.config, context)
        forward = forward_function(model)
        programs = [ProgramSpec(FORWARD, forward, shape, forward_inputs(shape)) for shape in dict.fromkeys(shapes)]
        self.depth = model.shape.hidden
        self.rig = Rig(
            subject, programs, params=model.params(), checkpoint=checkpoint, caches=model.caches(), pages=pages,
            uses=model.uses(), kernels=subject.backend.kernels(),  # its own alone, whatever plugins add
        )  # fmt: skip
        self.programs = {program.shape: program for program in self.rig.programs}

    def logits(self, message: StepMessage) -> HostArray:
        """float64 [R, V] of one step."""
        for copies in message.copies_by_group():
            self.rig.session.copy_pages(*copies)
        return self.programs[message.shape](message.forward).result("logits").astype(np.float64)


@dataclass(frozen=True)
class Compared:
    """One step beside the reference: what deviates most, which tokens the float64 logits decide, and what is wrong."""

    worst: Deviation
    decided: int
    rows: int
    wrong: str = ""


def compare_step(step: Step, exact: HostArray, run: HostArray, dtype: str, depth: int) -> Compared:
    """Every live row by itself, so that one wrong row is not averaged away among right ones.

    exact, run: float64 [R, V], the reference in float64 and in the executed dtype.
    """
    unit = epsilon(dtype) * math.sqrt(depth)
    found = [deviation(step.logits[r], exact[r], run[r], unit) for r in range(step.live)]
    wrong = [f"row {r}: {text}" for r, text in ((r, excess(found[r])) for r in range(step.live)) if text]
    decided = [r for r in range(step.live) if gap(exact[r]) > 2 * found[r].linf_allowed]
    own = step.logits.argmax(-1)
    wrong += [
        f"row {r}: the likeliest token is {own[r]}, the reference's is {exact[r].argmax()}"
        for r in decided
        if own[r] != exact[r].argmax()
    ]
    wrong += wrong_tokens(step, dtype)
    worst = max(found, key=lambda d: d.share)
    return Compared(worst, len(decided), step.live, "; ".join(wrong))


def deviation(got: HostArray, exact: HostArray, run: HostArray, unit: float) -> Deviation:
    """How far logits [V] are from the exact ones. Both they and the reference run are rounded to float32, as a step's
    result is."""
    off, seen = got.astype(np.float64) - exact, run.astype(np.float32).astype(np.float64) - exact
    return Deviation(
        "engine", "logits",
        rms(off), RULE.l2 * max(rms(seen), unit * rms(exact)),
        largest(off), RULE.linf * max(largest(seen), unit * largest(exact)),
    )  # fmt: skip


def excess(d: Deviation) -> str:
    """What is wrong with a deviation, or "". A NaN is within nothing."""
    if not d.l2 <= d.l2_allowed:
        return f"L2 error of the logits {d.l2:.3g} exceeds {d.l2_allowed:.3g}"
    if not d.linf <= d.linf_allowed:
        return f"Linf error of the logits {d.linf:.3g} exceeds {d.linf_allowed:.3g}"
    return ""


def gap(logits: HostArray) -> float:
    """By how much the likeliest token leads."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


def wrong_tokens(step: Step, dtype: str) -> list[str]:
    """Rows whose token is not the one that the subject's own logits, and the row's random number, give."""
    problem = SampleProblem(dtype="float32", rows=1, vocab=step.logits.shape[1])
    wrong = []
    for r in range(step.live):
        own, token = step.logits[r : r + 1], int(step.token_ids[r])
        greedy = step.choice.sampling is None or step.choice.sampling["temperature"][r] == 0
        if greedy:
            # float64 logits come as float32, where two may have become equal
            right = {int(i) for i in np.flatnonzero(own[0] == own[0].max())} if dtype == "float64" else set()
            right |= {int(argmax(problem, own)[0])}
        else:
            assert step.choice.sampling is not None
            right = drawn(problem, own, step.choice.sampling, r)
        if token not in right:
            wrong.append(f"row {r}: token {token}, its own logits give {' or '.join(map(str, sorted(right)))}")
    return wrong


def drawn(problem: SampleProblem, logits: HostArray, given: HostStep, row: int) -> set[int]:
    """The tokens that sampling may give: the sums run in float32 or wider, so borders move by V roundings at most."""
    slack = problem.vocab * epsilon("float32")
    found = set()
    for du, dp, dm in product((0, -slack, slack), repeat=3):
        params = {name: given[name][row : row + 1].astype(np.float64) for name in ("temperature", "top_p", "min_p")}
        params["top_p"] += dp if 0 < params["top_p"][0] < 1 else 0
        params["min_p"] += dm if params["min_p"][0] > 0 else 0
        params["top_k"] = given["top_k"][row : row + 1]
        u = np.clip(given["u"][row : row + 1].astype(np.float64) + du, 0, 1)
        found.add(int(sample(problem, logits, params, u)[0]))
    return found


def rms(x: HostArray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def largest(x: HostArray) -> float:
    return float(np.max(np.abs(x)))
