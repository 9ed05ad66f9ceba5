"""The functions that become programs: the forward of each bucket, and sampling over its logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lineshaft.models import Model
from lineshaft.plan import ProgramSpec
from lineshaft.sampling.pack import EDITS
from lineshaft_contract.sessions import Cache, StepFunction, Tree
from lineshaft_contract.steps import (
    ArraySpec,
    HostStep,
    InputField,
    InputLayout,
    StepInputs,
    StepShape,
    edit_inputs,
    forward_inputs,
    mask_inputs,
    sample_inputs,
)
from lineshaft_contract.weights import Array

FORWARD, SAMPLE, LOGPROBS = "forward", "sample", "logprobs"
TYPICAL, MASK, EDIT = "sample_typical", "mask", "edit"
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


def adjust_function(
    ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: dict[str, Array]
) -> Outputs:
    """Masked or edited logits [R, V], which stay on the device, and their greedy token_ids int32 [R]."""
    logits = ops.apply_logits(arrays["logits"], **step.arrays)
    return {"logits": logits, "token_ids": ops.argmax(logits)}, caches


def program_of(host: HostStep) -> str:
    """The program that takes a sampling or adjusting step."""
    if "u" in host.views:
        return TYPICAL if "typical_p" in host.views else SAMPLE
    return MASK if "mask" in host.views else f"{EDIT}_{host['edit_ids'].shape[1]}"


def logprobs_function(top: int) -> StepFunction:
    """Log-probabilities of the chosen ids and of the `top` likeliest."""

    def logprobs(ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: dict[str, Array]) -> Outputs:
        chosen, top_ids, best = ops.logprobs(arrays["logits"], step.arrays["ids"], top)
        return {"chosen": chosen, "top_ids": top_ids, "top": best}, caches

    return logprobs


def all_programs(
    model: Model, shapes: Sequence[StepShape], dtype: str, top: int, extras: bool = False
) -> list[ProgramSpec]:
    """Every program of a run: a forward per bucket, largest first so that arenas are sized once, then sampling per
    distinct number of logit rows. `extras` adds what only some requests need, as far as the backend takes it."""
    forward = forward_function(model)
    programs = [
        ProgramSpec(FORWARD, forward, shape, forward_inputs(shape), host_outputs=frozenset({"token_ids"}))
        for shape in reversed(shapes)
    ]
    for rows in sorted({shape.logits for shape in shapes}, reverse=True):
        programs += _over_logits(rows, model.shape.vocab, dtype, top, extras)
    return programs


def _over_logits(rows: int, vocab: int, dtype: str, top: int, extras: bool) -> Iterator[ProgramSpec]:
    """Those of one number of rows; the extra ones named by `optional` as `SamplingParams.extras` names what needs
    them."""
    shape = StepShape(tokens=0, rows=rows, pages=(), logits=rows, max_query=0)
    logits, ids = {"logits": ArraySpec((rows, vocab), dtype)}, frozenset({"token_ids"})
    yield ProgramSpec(SAMPLE, sample_function, shape, sample_inputs(rows), logits, ids)
    if top:
        chosen = InputLayout([InputField("ids", "int32", (rows,))])
        outputs = frozenset({"chosen", "top_ids", "top"})
        yield ProgramSpec(LOGPROBS, logprobs_function(min(top, vocab)), shape, chosen, logits, outputs)
    if extras:
        yield ProgramSpec(TYPICAL, sample_function, shape, sample_inputs(rows, True), logits, ids, "typical_p")
        yield ProgramSpec(MASK, adjust_function, shape, mask_inputs(rows, vocab), logits, ids, "mask")
        for width in EDITS:
            yield ProgramSpec(f"{EDIT}_{width}", adjust_function, shape, edit_inputs(rows, width), logits, ids, "edits")
