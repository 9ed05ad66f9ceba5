"""Calls of a tape that become one: found by what they are and by who reads their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

from lineshaft_cpu.engine.arrays import TapeArray
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
    return Counter(key for call in tape.calls for key in {id(array.buffer) for array in call.reads})


def between(first: Call | HostCall | None, second: Call | HostCall) -> list[TapeArray]:
    """What the first call writes and the second reads: it is there no more once they are one."""
    read = {id(array.buffer) for array in second.reads}
    return [array for array in (first.writes if first else ()) if id(array.buffer) in read]


def handed_on(first: Call, second: Call, field: str, readers: Mapping[int, int]) -> bool:
    """Whether `first` writes the whole of what `second`, and no other call, reads as its `field`."""
    given = second.fields.get(field)
    if not isinstance(given, TapeArray) or readers[id(given.buffer)] != 1:
        return False
    return given.dense and any(given.buffer is out.buffer and given.size == out.size for out in first.writes)


def gated_product(first: Call, second: Call, readers: Mapping[int, int]) -> Call | None:
    """A product whose halves of columns are gate and up, and silu(gate) * up of them."""
    if "gate" not in first.fields or first.fields["gate"] or second.op != "silu_mul":
        return None
    width = second.fields["width"]
    if width % PANEL or 2 * width != first.fields["n"] or not handed_on(first, second, "x", readers):
        return None
    fields = {**first.fields, "out": second.fields["out"], "out_stride": width, "gate": width}
    return Call(first.job, fields, first.reads, second.writes, "linear+silu_mul", first.scratch)


def ordered_result(first: Call, second: Call, readers: Mapping[int, int]) -> Call | None:
    """A result that is written in the order of tiles, and the copy that would bring it there."""
    if second.op != "order" or "ordered" not in first.fields or not handed_on(first, second, "x", readers):
        return None
    if first.fields["out"].buffer is not second.fields["x"].buffer or second.fields["x_stride"] != second.fields["k"]:
        return None
    if row_width(first) != second.fields["k"]:
        return None
    if first.fields.get("splits", 1) > 1 or ("splits" in first.fields and first.fields["live"] is None):
        return None  # what joins parts of a context, or clears rows that have none, writes rows
    out = second.fields["out"]
    writes = tuple(out if array.buffer is first.fields["out"].buffer else array for array in first.writes)
    return Call(first.job, {**first.fields, "out": out, "ordered": 1}, first.reads, writes, first.op, first.scratch)


def row_width(call: Call) -> int:
    """Values of a row that a norm, a product or attention writes."""
    fields = call.fields
    if "q_heads" in fields:
        return int(fields["q_heads"] * fields["v_dim"])
    return int(fields["width"] if "width" in fields else fields["out_stride"])


def turned_product(first: Call, second: Call, readers: Mapping[int, int]) -> Call | None:
    """A product whose columns are heads of queries, keys and values, and the rotation that writes them to pages."""
    if first.op != "linear" or "rope" not in first.fields or second.op != "rope_write_kv":
        return None
    if first.fields["live"] is None and second.fields["live"] is not None:
        return None  # padding tokens have no place to be written to
    made, job = first.writes[0], second.fields
    heads, dim, size = (job["q_heads"], job["k_heads"], job["k_heads"]), job["head_dim"], made.itemsize
    places = [sum(heads[:i]) * dim * size for i in range(3)]
    parts = [job[name] for name in ("q", "k", "v")]
    if dim % PANEL or sum(heads) * dim != first.fields["n"] or readers[id(made.buffer)] != 1:
        return None
    if any(part is None or part.buffer is not made.buffer for part in parts) or [x.offset for x in parts] != places:
        return None
    panels = dim // PANEL
    grain = -(-first.fields["grain"] // panels) * panels
    fields = {**first.fields, "rope": second, "grain": grain}
    reads = (*first.reads, *(x for x in second.reads if x.buffer is not made.buffer))
    return Call(first.job, fields, reads, (*first.writes, *second.writes), "linear+rope_write_kv", first.scratch)


def quantized_product(first: Call, second: Call, readers: Mapping[int, int]) -> Call | None:
    """The codes of few rows, and the product of them: each thread makes them anew, which costs less than to wait."""
    if "codes" not in first.fields or first.fields["rows"] > FEW_ROWS or not handed_on(first, second, "x", readers):
        return None
    made = {id(array.buffer) for array in first.writes}
    if any(readers[key] != 1 for key in made):
        return None
    fields = {**second.fields, "quantize": first, "x": first.fields["x"], "tokens": None}
    reads = (*first.reads, *(array for array in second.reads if id(array.buffer) not in made))
    scratch = second.scratch + sum(lines(array.size * array.itemsize) for array in first.writes)
    return Call(second.job, fields, reads, second.writes, "quantize+linear", scratch)


def normed_product(first: Call, second: Call, readers: Mapping[int, int]) -> Call | None:
    """A norm of few rows, and the product of them: each thread norms them anew, which costs less than to wait."""
    if first.op not in ("rms_norm", "add_rms_norm") or "norm" not in second.fields or first.fields["inner"] != 1:
        return None
    if first.fields["rows"] > FEW_ROWS or not handed_on(first, second, "x", readers):
        return None
    if row_width(first) != second.fields["k"]:
        return None
    x = second.fields["x"]
    rest = tuple(array for array in first.writes if array.buffer is not x.buffer)
    scratch = second.scratch + lines(2 * x.size * x.itemsize)
    fields = {**second.fields, "norm": first, "x": None}
    reads = (*first.reads, *(array for array in second.reads if array.buffer is not x.buffer))
    return Call(second.job, fields, reads, (*second.writes, *rest), f"{first.op}+{second.op}", scratch)


def lines(nbytes: int) -> int:
    """Bytes of the whole lines of a cache that so many take."""
    return -(-nbytes // 64) * 64


FEW_ROWS = 8
Pattern = Callable[[Call, Call, Mapping[int, int]], Call | None]
PATTERNS: Final[Mapping[str, Pattern]] = MappingProxyType(
    {
        "linear+silu_mul": gated_product,
        "result+order": ordered_result,
        "linear+rope_write_kv": turned_product,
        "quantize+linear": quantized_product,
        "norm+linear": normed_product,
    }
)
"""Each looks at two calls that follow one another, and gives the one that stands for both, or None."""
