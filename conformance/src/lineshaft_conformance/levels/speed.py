"""L5: speed against a roofline that is measured through the backend, and as ratios of sizes; both in one process.

Times are the least of interleaved runs on one host thread, in the backend's preferred dtype; only ratios are judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

from lineshaft.engine import Engine
from lineshaft.runner.messages import ChoiceMessage, StepMessage
from lineshaft.sampling.params import SamplingParams
from lineshaft_conformance.checks import Check, Found, NotClaimed, require, rule_of
from lineshaft_conformance.evidence import interpreters
from lineshaft_conformance.harness.rig import kernel_names
from lineshaft_conformance.harness.stage import engine_config
from lineshaft_conformance.harness.timed import WIDTH, Timed, Timer
from lineshaft_conformance.harness.timing import TOO_MUCH, paired_ratio, patient
from lineshaft_conformance.harness.tiny import LLAMA, checkpoint
from lineshaft_conformance.harness.watched import WatchedExecutor
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops.spec import Size

GROWTH = 8
LEAST = 1 / 6
"""Share of its own roofline that a decode step reaches at least, and what it is made of: attend and linear. Engines
reach a half and more; three times less is the ratio at which every timed rule counts as broken."""
LEAST_OTHER = 1 / 20
"""The same for an op that is of little weight in a step."""

Make = Callable[[Timer, int], Timed]


def attend(timer: Timer, scale: int) -> Timed:
    """Decode rows whose keys are as many bytes as the roofline's own programs read, or `scale` eighths of that."""
    size = timer.page_size
    token = 2 * 8 * 64 * timer.element.itemsize
    pages = max(1, timer.nbytes * scale // (8 * 8 * token * size))
    return timer.decode(8, pages * size, pages, 1 + 8 * pages)


OPS: dict[str, Make] = {
    "attend": attend,
    "rms_norm": lambda timer, scale: timer.norm(timer.rows * scale // 8),
    "add": lambda timer, scale: timer.pointwise("add", 2, timer.rows * scale // 8),
    "silu_mul": lambda timer, scale: timer.pointwise("silu_mul", 1, timer.rows * scale // 8),
    "argmax": lambda timer, scale: timer.pointwise("argmax", 1, timer.rows * scale // 8),
    "linear": lambda timer, scale: timer.linear(32 * scale, WIDTH, WIDTH // 2),
}
"""Large problems by op; scale 8 is the whole, 1 an eighth."""


def more_pages(timer: Timer, scale: int) -> Timed:
    """A step's time does not depend on how many pages the cache has."""
    token = 2 * 8 * 64 * timer.element.itemsize
    return timer.decode(4, timer.page_size, 1, scale * timer.nbytes // (8 * token * timer.page_size))


def more_columns(timer: Timer, scale: int) -> Timed:
    """Nor on how long a context the page table has room for."""
    return timer.decode(8, timer.page_size, 32 * scale, 9)


def more_vocabulary(timer: Timer, scale: int) -> Timed:
    """Nor does looking up tokens depend on how many others there are."""
    return timer.embed(max(16, timer.rows * scale // 8))


UNUSED: dict[str, Make] = {"pages": more_pages, "columns": more_columns, "vocabulary": more_vocabulary}


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    yield Check("L5/speed/roofline/decode", patient(decode_step), "A decode step comes near its roofline.", limit=180.0)
    for op, make in OPS.items():
        rule = f"{op} comes near its roofline."
        run = patient(partial(near, make, LEAST if op in ("attend", "linear") else LEAST_OTHER))
        yield Check(f"L5/speed/roofline/{op}", run, rule, op, shape_class="roofline", limit=180.0)
    for op, make in OPS.items():
        rule = f"Eight times the work takes less than {TOO_MUCH:g} x 8 times as long."
        run = patient(partial(grows, make, TOO_MUCH * GROWTH))
        yield Check(f"L5/speed/growth/{op}", run, rule, op, shape_class="growth", limit=180.0)
    for what, make in UNUSED.items():
        run = patient(partial(grows, make, TOO_MUCH))
        yield Check(f"L5/speed/unused/{what}", run, rule_of(make), shape_class="unused", limit=180.0)


def timer_of(subject: Subject) -> Timer:
    """One timer for all checks of a subject."""
    kept: Timer = subject.keep("timer", lambda: Timer(subject, subject.capabilities.dtypes[0]))
    return kept


def require_no_interpreter(subject: Subject) -> None:
    """Raises NotClaimed where an interpreter runs kernels: what it takes for one has nothing to do with a device."""
    for switch in interpreters(subject.target.options, os.environ):
        raise NotClaimed(f"{switch} is set: an interpreter's times say nothing of a roofline")


def near(make: Make, least: float, subject: Subject, seed: int) -> Found:
    """An op's time beside its roofline."""
    require_no_interpreter(subject)
    timer = timer_of(subject)
    with closing(make(timer, 8)) as timed:
        return judged(timer, timed, least)


def judged(timer: Timer, timed: Timed, least: float) -> Found:
    bound, taken = timer.bound(timed)
    share = bound / taken
    require(
        share >= least,
        f"it takes {taken * 1e3:.3g} ms, {1 / share:.3g} times the {bound * 1e3:.3g} ms that this backend's own "
        f"copy_pages and linear allow; at most {1 / least:g} times is",
    )
    return Found(timed.kernels, notes=(f"{timer.dtype}: {taken * 1e3:.3g} ms, {share:.2f} of the roofline",))


def grows(make: Make, limit: float, subject: Subject, seed: int) -> Found:
    """The same at one and at eight times the size."""
    timer = timer_of(subject)
    with closing(make(timer, 1)) as small, closing(make(timer, 8)) as large:
        ratio = paired_ratio(small.run, large.run)
        require(ratio < limit, f"eight times the size takes {ratio:.3g} times as long; less than {limit:g} is allowed")
        return Found(large.kernels, notes=(f"{timer.dtype}: eight times the size takes {ratio:.2f} times as long",))


def decode_step(subject: Subject, seed: int) -> Found:
    """A decode step of one row of a model whose weights are far more than a step's other costs: it reads each once."""
    require_no_interpreter(subject)
    timer = timer_of(subject)
    model = checkpoint(subject, "large model", large_model(timer), seed)
    config = engine_config(subject, model, timer.dtype, timer.page_size, max_model_len=64, **{"cache.pages": 70})
    watched = WatchedExecutor(subject, config)
    with Engine(config, registry=subject.registry, executor=watched) as engine:
        engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        while engine.has_work:
            engine.step()
        step: StepMessage = watched.steps[-1].message
        worker = watched.worker

        def run() -> None:
            worker.submit(step)
            worker.choose(ChoiceMessage())
            worker.collect()

        timed = Timed(
            timer.empty.rig, run, engine.plan.weight_bytes,
            kernels=kernel_names(engine.plan),
        )  # fmt: skip
        return judged(timer, timed, LEAST)


def large_model(timer: Timer) -> dict[str, Any]:
    """A Llama of at least as many bytes as the roofline's own programs move, in few layers."""
    hidden = 512
    while 26 * hidden * hidden * timer.element.itemsize < timer.nbytes and hidden < 4096:
        hidden *= 2
    return {
        **LLAMA, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 2, "vocab_size": 1024,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64,
    }  # fmt: skip
