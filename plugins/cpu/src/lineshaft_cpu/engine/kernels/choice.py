"""Choosing tokens from logits (`native/choice.h`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lineshaft_contract.problems import SampleProblem
from lineshaft_cpu.engine.kernels.common import (
    EXTENT,
    Field,
    Job,
    Recipe,
    TapeArray,
    c_int,
    c_int64,
    c_void_p,
    copied,
    dense,
    extent,
    narrow,
    recipe,
    tail_of,
)
from lineshaft_cpu.native import Native

BAND, SPAN, WIDEST = 1024, 1024, 16
"""As in choice.h: values sorted to find where a filter ends, values summed at once, and values of the widest vector."""
_ARGMAX = (
    *EXTENT, ("grain", c_int64), ("x", c_void_p), ("out", c_void_p), ("width", c_int64), ("stride", c_int64),
    ("narrow", c_int),
)  # fmt: skip
_FILTERS = ("temperature", "top_p", "min_p", "u", "top_k")
ARGMAX = Job("argmax", _ARGMAX)
SAMPLE = Job("sample", (*_ARGMAX, *((name, c_void_p) for name in _FILTERS)))
LOGPROBS = Job(
    "logprobs",
    (
        *EXTENT, ("grain", c_int64), *((name, c_void_p) for name in ("x", "ids", "chosen", "top_ids", "top")),
        *((name, c_int64) for name in ("width", "stride", "k", "band", "narrow")),
    ),
)  # fmt: skip
APPLY = Job(
    "apply",
    (
        *EXTENT, ("grain", c_int64), *((name, c_void_p) for name in ("x", "out", "mask", "ids", "scale", "bias")),
        *((name, c_int64) for name in ("width", "stride", "words", "edits", "narrow")),
    ),
)  # fmt: skip


def recipes(native: Native) -> Iterator[Recipe]:
    yield recipe("argmax", "argmax", bind_argmax)
    yield recipe("sample", "sample", bind_sample)
    yield recipe("logprobs", "logprobs", bind_logprobs)
    yield recipe("apply_logits", "apply_logits", bind_apply, handles=frozenset({"mask", "edits"}))


def scratch(vocab: int, band: int) -> int:
    """Bytes in which a thread ranks a row: its values and weights, two bands of places and the sum of each span."""
    padded = -(-vocab // WIDEST) * WIDEST
    return 8 * padded + 16 * band + 8 * -(-vocab // SPAN)


def rows_of(tape: Any, logits: TapeArray) -> TapeArray:
    """logits [R, V], whose rows have no gaps."""
    return logits if tail_of(logits) >= logits.shape[1] else copied(tape, logits)


def by_row(x: TapeArray, out: TapeArray) -> dict[str, Field]:
    """The fields of a choice from each row of x [R, V]."""
    return {
        **extent(x, x.shape[0]), "grain": 1, "x": x, "out": out, "width": x.shape[1], "stride": x.strides[0],
        "narrow": narrow(x.dtype),
    }  # fmt: skip


def bind_argmax(problem: SampleProblem, session: Any) -> Any:
    def argmax(logits: TapeArray) -> TapeArray:
        """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
        tape = session.tape
        x = rows_of(tape, logits)
        out = tape.new((x.shape[0],), "int32", x.live)
        tape.add(ARGMAX, "argmax", (x,), (out,), by_row(x, out))
        return out

    return argmax


def bind_sample(problem: SampleProblem, session: Any) -> Any:
    def sample(logits: TapeArray, params: Mapping[str, TapeArray], u: TapeArray) -> TapeArray:
        """logits [R, V], {temperature, top_p, min_p: f32[R], top_k: int32[R]}, u f32[R, 1] -> int32[R]; -1 for a row
        with a NaN or without a kept token."""
        tape = session.tape
        x = rows_of(tape, logits)
        given = {name: dense(tape, u if name == "u" else params[name]) for name in _FILTERS}
        out = tape.new((x.shape[0],), "int32", x.live)
        tape.add(
            SAMPLE, "sample", (x, *given.values()), (out,), by_row(x, out) | given, scratch(problem.vocab, BAND)
        )  # fmt: skip
        return out

    return sample


def bind_logprobs(problem: SampleProblem, session: Any) -> Any:
    def logprobs(logits: TapeArray, ids: TapeArray, k: int) -> tuple[TapeArray, TapeArray, TapeArray]:
        """logits [R, V], ids int32[R] -> log-softmax (chosen f32[R], top_ids int32[R, k], top f32[R, k]), descending,
        ties to the lowest id; an id of -1 is read as 0."""
        tape, band = session.tape, max(k, BAND)
        x, ids = rows_of(tape, logits), dense(tape, ids)
        rows = x.shape[0]
        chosen, top_ids, top = (
            tape.new(shape, dtype, x.live)
            for shape, dtype in (((rows,), "float32"), ((rows, k), "int32"), ((rows, k), "float32"))
        )
        fields = {
            **extent(x, rows), "grain": 1, "x": x, "ids": ids, "chosen": chosen, "top_ids": top_ids, "top": top,
            "width": problem.vocab, "stride": x.strides[0], "k": k, "band": band, "narrow": narrow(x.dtype),
        }  # fmt: skip
        tape.add(LOGPROBS, "logprobs", (x, ids), (chosen, top_ids, top), fields, scratch(problem.vocab, band))
        return chosen, top_ids, top

    return logprobs


def bind_apply(problem: SampleProblem, session: Any) -> Any:
    def apply_logits(
        logits: TapeArray,
        *,
        mask: TapeArray | None = None,
        edit_ids: TapeArray | None = None,
        edit_scale: TapeArray | None = None,
        edit_bias: TapeArray | None = None,
    ) -> TapeArray:
        """logits [R, V] with edits (ids int32[R, K], scale and bias f32[R, K]), then -inf where the mask
        uint32[R, ceil(V / 32)] is clear -> [R, V], rounded once."""
        tape = session.tape
        x = rows_of(tape, logits)
        out = tape.new(x.shape, x.dtype, x.live)
        named = {"mask": mask, "ids": edit_ids, "scale": edit_scale, "bias": edit_bias}
        given = {name: None if array is None else dense(tape, array) for name, array in named.items()}
        fields = {
            **by_row(x, out), **given, "words": -(-problem.vocab // 32),
            "edits": 0 if edit_ids is None else edit_ids.shape[1],
        }  # fmt: skip
        tape.add(APPLY, "apply_logits", [x, *(y for y in given.values() if y is not None)], (out,), fields)
        return out

    return apply_logits
