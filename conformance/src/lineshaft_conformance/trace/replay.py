"""Runs a trace's steps on a backend and finds where its ops first differ from the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft.config import EngineConfig, make_config
from lineshaft.registry import Registry, discover
from lineshaft.runner.messages import StepMessage
from lineshaft.runner.setup import Setup, make_setup
from lineshaft.runner.worker import Progress, silent
from lineshaft_conformance.trace.compare import Allowance, Compared, compare
from lineshaft_conformance.trace.errors import TraceError
from lineshaft_conformance.trace.record import described, fingerprint
from lineshaft_conformance.trace.store import Kept, Trace, read
from lineshaft_conformance.trace.watch import Rerun, live_tokens
from lineshaft_contract.backends import Backend, Capabilities
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import StepShape

Change = Callable[[Backend], Backend]


@dataclass(frozen=True)
class Replayed:
    """What a replay found: every output compared, in the order in which they were computed."""

    recorded: str  # backend
    backend: str
    full: bool
    compared: tuple[Compared, ...]

    @property
    def first(self) -> Compared | None:
        """The first output beyond tolerance."""
        return next((found for found in self.compared if found.beyond), None)

    def worst(self, count: int) -> list[Compared]:
        """Of each call of the forward its worst output over all steps; the `count` largest ratios."""
        calls: dict[tuple[int, str], Compared] = {}
        for found in self.compared:
            key = (found.call, found.output)
            if key not in calls or found.ratio > calls[key].ratio:
                calls[key] = found
        return sorted(calls.values(), key=lambda found: -found.ratio)[:count]


def replay(
    folder: Path,
    backend: str,
    backend_options: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    threads: int | None = None,
    change: Change = lambda backend: backend,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Replayed:
    """Replay the trace in `folder`; `change` may break the backend on purpose, `model` says where the model is now.

    Raises TraceError for a trace that is damaged, of another model, or beyond what the backend claims to take, and what
    starting a backend raises.
    """
    trace, registry = read(folder), registry or discover()
    config = config_of(trace, backend, backend_options or {}, model, threads)
    setup = make_setup(config, registry)
    setup = replace(setup, backend=change(setup.backend))
    check_same_model(trace, setup)
    check_claims(backend, setup.backend.capabilities, trace.steps)
    shapes, pages = trace.shapes, trace.header["pages"]
    found: list[Compared] = []
    with Rerun(setup, config, registry, shapes, pages, progress) as rerun:
        for shape in shapes:
            check_same_calls(trace, shape, [described(call) for call in rerun.calls[shape]])
        for index in range(len(trace.steps)):
            progress("replaying", index, len(trace.steps))
            found += compare_step(trace, index, rerun)
    return Replayed(str(trace.header["backend"]), setup.info.name, trace.full, tuple(found))


def compare_step(trace: Trace, index: int, rerun: Rerun) -> Iterator[Compared]:
    """Every output of one step, in order."""
    step, allowance, full = trace.steps[index], Allowance(), trace.outputs(index)
    calls = trace.calls(step.shape)
    for result in rerun.run(step):
        recorded: dict[str, Kept] = {}
        tensors: dict[str, HostArray] = {}
        for output in result.outputs:
            key = (index, result.index, output)
            if key in trace.kept:
                recorded[output] = trace.kept[key]
            if (name := f"{result.index}.{output}") in full:
                tensors[output] = full[name]
        unit = allowance.add(result.call)
        yield from compare(index, result, unit, recorded, tensors, calls[result.index], trace.chosen[index])


def config_of(
    trace: Trace, backend: str, options: Mapping[str, Any], model: str | None, threads: int | None
) -> EngineConfig:
    """The recorded configuration on another backend; what concerns the recorded one alone is left out."""
    header = trace.header
    given = {key: value for key, value in header["config"].items() if key not in ("kernels", "executor")}
    given |= {"model": model or header["model"], "backend": backend, "dtype": header["dtype"]}
    given["backend_options"] = dict(options)
    given["cache"] = {**given.get("cache", {}), "page_size": header["page_size"]}
    if threads is not None:
        given["threads"] = threads
    return make_config(**given)


def check_same_model(trace: Trace, setup: Setup) -> None:
    found, wanted = fingerprint(setup.checkpoint), trace.header["fingerprint"]
    if found != wanted:
        raise TraceError(
            f"the model is not the recorded one (fingerprint {found[:16]}, recorded {wanted[:16]}): give the recorded "
            "model with --model, or record anew"
        )


def check_same_calls(trace: Trace, shape: StepShape, calls: Sequence[Mapping[str, Any]]) -> None:
    """Raises TraceError if the forward calls other ops than it did."""
    names = ("name", "op", "layer", "problem")
    before = [[call[name] for name in names] for call in trace.calls(shape)]
    after = [[call[name] for name in names] for call in calls]
    if before != after:
        where = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        raise TraceError(
            f"the forward differs from the recorded one at call {where} of {len(before)}: the trace is of lineshaft "
            f"{trace.header['lineshaft']}, or a plugin's model family changed; record anew"
        )


def check_claims(backend: str, can: Capabilities, steps: Sequence[StepMessage]) -> None:
    """Raises TraceError for steps that the backend never said it takes."""
    for index, step in enumerate(steps):
        lengths = np.diff(step.forward["query_starts"])[np.diff(step.forward["query_starts"]) > 0]
        prefills, tokens = int(np.sum(lengths > 1)), live_tokens(step.forward)
        shape = step.shape
        apart = shape.max_query > 1 and not can.mixed_steps  # a bucket of prompts alone: the table is for decodes
        tables = (("tokens", shape.tokens, can.token_buckets), ("rows", shape.rows, None if apart else can.row_buckets))
        refused = [f"a bucket of {n} {what}" for what, n, table in tables if table is not None and n not in table]
        if can.max_query is not None and lengths.max(initial=0) > can.max_query:
            refused.append(f"a query of {lengths.max()} tokens")
        if can.max_prefill_rows is not None and prefills > can.max_prefill_rows:
            refused.append(f"{prefills} prefill rows")
        if not can.mixed_steps and 0 < prefills < len(lengths):
            refused.append("prefill and decode in one step")
        if refused:
            raise TraceError(
                f"step {index} ({tokens} tokens) has {', '.join(refused)}, which backend {backend!r} does not claim to "
                "take; record with limits that it does (--set scheduler.token_budget, scheduler.max_rows), or there"
            )
