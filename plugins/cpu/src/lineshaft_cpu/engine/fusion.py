"""Calls of a tape that become one: found by what they are and by who reads their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

from lineshaft_cpu.engine.arrays import Buffer, TapeArray
from lineshaft_cpu.engine.tape import Call, HostCall, Tape

PANEL = 32


def fuse(tape: Tape, kept: Collection[int]) -> Counter[str]:
    """Replace what can be fused on the tape; `kept` are the ids of buffers that leave the program.

    Returns how often each pattern was found.
    """
    found: Counter[str] = Counter()
    for name, pattern in PATTERNS.items():
        readers = readers_of(tape)
        calls: list[Call | HostCall] = []
        for call in tape.calls:
            before = calls[-1] if calls else None
            made = pattern(before, call, readers) if isinstance(before, Call) and isinstance(call, Call) else None
            if made is None or any(id(array.buffer) in kept for array in between(before, call)):
                calls.append(call)
                continue
            calls[-1] = made
            found[name] += 1
        tape.calls = calls
    return found


def readers_of(tape: Tape) -> Counter[int]:
    """How many calls read each buffer, by id."""
    return Counter(id(array.buffer) for call in tape.calls for array in call.reads)


def between(first: Call | HostCall | None, second: Call | HostCall) -> list[TapeArray]:
    """What the first call writes and the second reads: it is there no more once they are one."""
    read = {id(array.buffer) for array in second.reads}
    return [array for array in (first.writes if first else ()) if id(array.buffer) in read]


def handed_on(first: Call, second: Call, field: str, readers: Mapping[int, int]) -> Buffer | None:
    """The buffer that `first` writes whole and `second` alone reads, as its `field`; None if there is none."""
    given = second.fields.get(field)
    if not isinstance(given, TapeArray) or len(first.writes) != 1 or readers[id(given.buffer)] != 1:
        return None
    same = given.buffer is first.writes[0].buffer and given.dense and given.size == first.writes[0].size
    return given.buffer if same else None


def gated_product(first: Call, second: Call, readers: Mapping[int, int]) -> Call | None:
    """A product whose halves of columns are gate and up, and silu(gate) * up of them."""
    if "gate" not in first.fields or first.fields["gate"] or second.op != "silu_mul":
        return None
    width = second.fields["width"]
    if handed_on(first, second, "x", readers) is None or not isinstance(width, int) or width % PANEL:
        return None
    out = second.writes[0]
    fields = {**first.fields, "out": out, "out_stride": width, "gate": width}
    return Call(first.job, fields, first.reads, (out,), "linear+silu_mul", first.scratch)


Pattern = Callable[[Call, Call, Mapping[int, int]], Call | None]
PATTERNS: Final[Mapping[str, Pattern]] = MappingProxyType({"linear+silu_mul": gated_product})
"""Each looks at two calls that follow one another, and gives the one that stands for both, or None."""
