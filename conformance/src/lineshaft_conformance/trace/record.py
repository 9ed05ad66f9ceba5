"""Makes a trace: a greedy generation on the real engine, then the same steps once more with every op watched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft.config import EngineConfig
from lineshaft.registry import Registry, discover
from lineshaft.runner.messages import StepMessage
from lineshaft.runner.setup import Setup, make_setup
from lineshaft.runner.worker import Progress, silent
from lineshaft_conformance.trace.digests import digest, estimate
from lineshaft_conformance.trace.generation import generate, pages_used, shapes_of
from lineshaft_conformance.trace.shaken import Shaken
from lineshaft_conformance.trace.store import Kept, Writer, writing
from lineshaft_conformance.trace.watch import Call, Rerun, Result, live_logits
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.weights import Checkpoint

EDGE_ROWS = 4
SHAKES = 2
"""Runs with other roundings, of which the one that moves an output most says how sensitive it is."""


def record(
    out: Path,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    eos_ids: frozenset[int] = frozenset(),
    full: bool = False,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> int:
    """Record a greedy generation for prompts of token ids into the folder `out`.

    Returns the number of steps in which the watched run chose another token than the generation did: watching should
    change nothing, and on a backend that fuses ops it may. Raises TraceError, and what `Engine` raises.
    """
    registry = registry or discover()
    with writing(out, full=full) as writer:
        made = generate(config, registry, prompts, max_tokens, eos_ids, progress)
        setup = make_setup(config, registry)
        shapes, pages, changed = shapes_of(made.steps), pages_used(made.steps), 0

        def rerun_of(checkpoint: Checkpoint) -> Rerun:
            shaken = dataclasses.replace(setup, checkpoint=checkpoint)
            return Rerun(shaken, config, registry, shapes, pages, progress)

        with rerun_of(setup.checkpoint) as rerun:
            for index, (step, ids) in enumerate(zip(made.steps, made.token_ids, strict=True)):
                progress("digesting", index, len(made.steps))
                chosen = keep_step(writer, index, step, rerun.run(step))
                changed += not np.array_equal(chosen, ids[: len(chosen)])
            calls = [[described(call) for call in rerun.calls[shape]] for shape in shapes]
        for seed in range(SHAKES):
            with rerun_of(Shaken(setup.checkpoint, setup.dtype, seed)) as rerun:
                for index, step in enumerate(made.steps):
                    progress(f"shaking {seed + 1} of {SHAKES}", index, len(made.steps))
                    feel_step(writer, index, rerun.run(step))
        header = {
            **facts(config, setup), "pages": pages, "changed_by_watching": changed, "calls": calls,
            "shapes": [dataclasses.asdict(shape) for shape in shapes],
            "steps": [shapes.index(step.shape) for step in made.steps],
        }  # fmt: skip
        writer.finish(json.loads(json.dumps(header)))
    return changed


def keep_step(writer: Writer, index: int, step: StepMessage, results: Iterator[Result]) -> HostArray:
    """Write one step, and return the ids that it chose."""
    outputs: dict[str, HostArray] = {}
    chosen: HostArray = np.zeros(0, np.int32)
    for result in results:
        for name, array in result.outputs.items():
            writer.kept[index, result.index, name] = Kept(digest(array))
            if writer.full:
                outputs[f"{result.index}.{name}"] = array
        if result.given is not None:
            chosen = result.outputs["0"]
    assert len(chosen) == live_logits(step.forward), "every forward ends with an argmax over its logits"
    writer.add_step(index, step, chosen, outputs)
    return chosen


def feel_step(writer: Writer, index: int, results: Iterator[Result]) -> None:
    """Note how far a shaken run moved each output of a step."""
    for result in results:
        for name, array in result.outputs.items():
            kept = writer.kept[index, result.index, name]
            kept.sensitivity = max(kept.sensitivity, estimate(kept.digest, digest(array)).rms)


def facts(config: EngineConfig, setup: Setup) -> dict[str, Any]:
    """What was run, in words that another machine understands."""
    return {
        "lineshaft": version("lineshaft"),
        "backend": setup.info.name,
        "dtype": setup.dtype,
        "page_size": setup.page_sizes[0] if setup.page_sizes else None,
        "model": config.model,
        "fingerprint": fingerprint(setup.checkpoint),
        "config": config.model_dump(mode="json", exclude_unset=True),
    }


def described(call: Call) -> dict[str, Any]:
    return {
        "name": call.noted.name, "op": call.op.name, "layer": call.noted.layer, "problem": call.problem.describe(),
        "kernel": call.kernel,
    }  # fmt: skip


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over a checkpoint's configuration, and the name, shape, first and last rows of each of its tensors."""
    found = hashlib.sha256(json.dumps(dict(checkpoint.config), sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.names()):
        shape = checkpoint.shape(name)
        found.update(f"{name}{list(shape)}".encode())
        rows = shape[0] if shape else 0
        edge = EDGE_ROWS if len(shape) > 1 else rows  # a vector is read whole
        for start, stop in ((0, min(edge, rows)), (max(0, rows - edge), rows)):
            for part, array in sorted(checkpoint.rows(name, start, stop).arrays.items()):
                found.update(part.encode() + np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes())
    return found.hexdigest()
