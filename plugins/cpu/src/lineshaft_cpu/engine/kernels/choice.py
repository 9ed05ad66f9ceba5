"""Choosing tokens from logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lineshaft_contract.problems import SampleProblem
from lineshaft_cpu.engine.kernels.common import (
    EXTENT,
    Job,
    Recipe,
    TapeArray,
    c_int,
    c_int64,
    c_void_p,
    copied,
    extent,
    narrow,
    recipe,
    tail_of,
)
from lineshaft_cpu.native import Native

ARGMAX = Job(
    "argmax",
    (
        *EXTENT, ("grain", c_int64), ("x", c_void_p), ("out", c_void_p), ("width", c_int64), ("stride", c_int64),
        ("narrow", c_int),
    ),
)  # fmt: skip


def recipes(native: Native) -> Iterator[Recipe]:
    yield recipe("argmax", "argmax", bind_argmax)


def bind_argmax(problem: SampleProblem, session: Any) -> Any:
    def argmax(logits: TapeArray) -> TapeArray:
        """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
        tape = session.tape
        x = logits if tail_of(logits) >= problem.vocab else copied(tape, logits)
        out = tape.new((x.shape[0],), "int32", x.live)
        fields = {
            **extent(x, x.shape[0]), "grain": 1, "x": x, "out": out, "width": problem.vocab, "stride": x.strides[0],
            "narrow": narrow(x.dtype),
        }  # fmt: skip
        tape.add(ARGMAX, "argmax", (x,), (out,), fields)
        return out

    return argmax
