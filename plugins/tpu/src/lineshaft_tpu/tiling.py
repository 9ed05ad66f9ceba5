"""The tiling rules of the chips: lanes, sublanes and memories, as pure functions.

It imports no array library, so that a configuration can be checked before anything is compiled. A rule returns None, or
a reason that says what was given, what the chip wants and the nearest size that works.
"""

from __future__ import annotations

from lineshaft_contract.problems import itemsize
from lineshaft_tpu.chips import MIB, Chip

LANES = 128
"""Values of the last dim of a tile; arrays are padded up to it."""


def sublanes(dtype: str) -> int:
    """Rows of a tile of `dtype`: 8 of four bytes, 16 of two, 32 of one."""
    return 32 // itemsize(dtype)


def padded(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def nearest(size: int, multiple: int) -> tuple[int, ...]:
    """The multiples just below and above `size`; only the latter where the former would be 0."""
    below = size // multiple * multiple
    return (below, below + multiple) if below else (multiple,)


def multiple_reason(what: str, size: int, multiple: int, rule: str) -> str | None:
    """None if `size` is a multiple, else "`what` `size`: `rule`" and the nearest sizes that are."""
    if size > 0 and size % multiple == 0:
        return None
    sizes = nearest(size, multiple)
    verb = "nearest are" if len(sizes) > 1 else "nearest is"
    return f"{what} {size}: {rule}; the {verb} {' and '.join(map(str, sizes))}"


def page_size_reason(page_size: int, kv_dtype: str) -> str | None:
    """Pages of whole tiles: so many tokens that none shares a tile with another page."""
    rows = sublanes(kv_dtype)
    rule = f"pages of {kv_dtype} come in multiples of {rows} tokens on this chip"
    return multiple_reason("page_size", page_size, rows, rule)


def lanes_reason(what: str, size: int) -> str | None:
    """Dims that kernels cut into tiles come in whole lanes."""
    return multiple_reason(what, size, LANES, f"this kernel takes multiples of {LANES} lanes")


def memory_reason(what: str, memory: str, needed: int, usable: int, fix: str) -> str | None:
    """None if `needed` bytes are `usable`, else "`what` needs so much of `memory`" and what works (`fix`)."""
    if needed <= usable:
        return None
    return f"{what} needs {needed / MIB:.2f} MiB of {memory}, of which {usable / MIB:.2f} MiB are usable; {fix}"


def usable_vmem(where: Chip) -> int:
    """Bytes of VMEM that one kernel may take; the rest is left to what runs around it."""
    return where.vmem * 3 // 4


def usable_smem(where: Chip) -> int:
    """Bytes of SMEM for a kernel's scalars; the compiler keeps some for itself."""
    return where.smem - 16 * 1024
