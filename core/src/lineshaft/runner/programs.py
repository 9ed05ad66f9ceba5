"""The functions that become programs: the forward of each bucket, and sampling over its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lineshaft.contract.sessions import Cache, StepFunction, Tree
from lineshaft.contract.steps import (
    ArraySpec,
    InputField,
    InputLayout,
    StepInputs,
    StepShape,
    forward_inputs,
    sample_inputs,
)
from lineshaft.contract.weights import Array
from lineshaft.models import Model
from lineshaft.plan import ProgramSpec

FORWARD, SAMPLE, LOGPROBS = "forward", "sample", "logprobs"
Outputs = tuple[dict[str, Array], list[Cache]]


def forward_function(model: Model) -> StepFunction:
    """logits [R, V], which stay on the device, and the greedy token_ids int32 [R]."""

    def forward(ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: dict[str, Array]) -> Outputs:
        logits, written = model.forward(ops, weights, caches, step)
        return {"logits": logits, "token_ids": ops.argmax(logits)}, written

    return forward


def sample_function(
    ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: dict[str, Array]
) -> Outputs:
    """token_ids int32 [R] drawn from logits [R, V]."""
    return {"token_ids": ops.sample(arrays["logits"], step.arrays, step.arrays["u"])}, caches


def logprobs_function(top: int) -> StepFunction:
    """Log-probabilities of the chosen ids and of the `top` likeliest."""

    def logprobs(ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: dict[str, Array]) -> Outputs:
        chosen, top_ids, best = ops.logprobs(arrays["logits"], step.arrays["ids"], top)
        return {"chosen": chosen, "top_ids": top_ids, "top": best}, caches

    return logprobs


def all_programs(model: Model, shapes: Sequence[StepShape], dtype: str, top: int) -> list[ProgramSpec]:
    """Every program of a run: a forward per bucket, largest first so that arenas are sized once, then sampling per
    distinct number of logit rows."""
    vocab = model.shape.vocab
    forward = forward_function(model)
    programs = [
        ProgramSpec(FORWARD, forward, shape, forward_inputs(shape), host_outputs=frozenset({"token_ids"}))
        for shape in reversed(shapes)
    ]
    for rows in sorted({shape.logits for shape in shapes}, reverse=True):
        shape = StepShape(tokens=0, rows=rows, pages=(), logits=rows, max_query=0)
        logits = {"logits": ArraySpec((rows, vocab), dtype)}
        programs.append(
            ProgramSpec(SAMPLE, sample_function, shape, sample_inputs(rows), logits, frozenset({"token_ids"}))
        )
        if top:
            ids = InputLayout([InputField("ids", "int32", (rows,))])
            outputs = frozenset({"chosen", "top_ids", "top"})
            programs.append(ProgramSpec(LOGPROBS, logprobs_function(min(top, vocab)), shape, ids, logits, outputs))
    return programs
