"""The tiling rules of the chips: lanes, sublanes, memories and what each generation lacks, as pure functions.

It imports no array library, so that a configuration can be checked before anything is compiled. A rule returns None, or
a reason that says what was given, what the chip wants and the nearest size that works.
"""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.contract.problems import itemsize

LANES = 128
"""Values of the last dim of a tile; arrays are padded up to it."""

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """One generation. Memories are in bytes per core; `cores` is how many cores one program runs on together.

    `fp8` says whether the matrix unit takes eight-bit floats. Without it they are still read, and widened first.
    """

    name: str
    vmem: int
    smem: int
    cores: int = 1
    fp8: bool = True


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", vmem=16 * MIB, smem=MIB, fp8=False),
        Chip("v5e", vmem=128 * MIB, smem=MIB),
        Chip("v5p", vmem=64 * MIB, smem=MIB, cores=2),
        Chip("v6e", vmem=128 * MIB, smem=MIB),
        Chip("tpu7x", vmem=64 * MIB, smem=MIB),
    )
}


def chip(name: str) -> Chip:
    """The generation called `name`. Raises ValueError for one that is not known, with those that are."""
    if name not in CHIPS:
        raise ValueError(f"chip {name!r} is not known; the known ones are {', '.join(CHIPS)}")
    return CHIPS[name]


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
