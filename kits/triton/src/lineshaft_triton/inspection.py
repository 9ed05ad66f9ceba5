"""Reads what a compiler made of a kernel: registers, memory, occupancy and the classes of matrix instructions.

Works on texts alone (PTX, amdgcn, what cuobjdump prints): knows no kernel, and imports no Triton.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lineshaft_contract.errors import ContractViolation
from lineshaft_triton.targets import Target

PTX_PRODUCT = re.compile(r"\b(wgmma\.mma_async|mma)(?:\.sp(?:::\w+)?)?\.sync\S*|\btcgen05\.mma\b\S*\.kind::(\w+)[^;]*")
PTX_TYPE = re.compile(r"\.(bf16|f16|f32|f64|tf32|e4m3|e5m2|e2m1|s8|u8|s4|u4|b1|s32)\b")
AMD_PRODUCT = re.compile(
    r"\bv_(mfma|wmma|smfmac|swmmac)(?:_scale)?_[a-z]+\d+_\d+x\d+x\d+_?([a-z]\w*?\d+)(?=_|\b)[^\n]*"
)
KINDS: Mapping[str, str] = {
    "e4m3": "fp8", "e5m2": "bf8", "e2m1": "fp4", "s8": "i8", "u8": "i8", "s4": "i4", "u4": "i4", "iu8": "i8",
    "iu4": "i4", "xf32": "tf32",
}  # fmt: skip
"""What operands are called here, where an instruction set has a word of its own."""
EXACT = frozenset({"f32", "f64"})
"""Operands that lose nothing: they may be multiplied by matrix instructions that nobody expected."""
TCGEN05_HALVES: Mapping[int, str] = {0: "f16", 1: "bf16"}
TCGEN05_SMALL: Mapping[int, str] = {0: "fp8", 1: "bf8", 3: "fp6", 4: "bf6", 5: "fp4"}
AMD_SMALL: Mapping[int, str] = {0: "fp8", 1: "bf8", 2: "fp6", 3: "bf6", 4: "fp4"}
RESERVED = 1024
"""Bytes of shared memory that the driver takes of each block, from sm80 on (CUDA C++ Programming Guide)."""
SIMDS = 4
"""Units that run warps in what `Target.sm_warps` counts: a compute unit of CDNA, a work-group processor of RDNA."""


@dataclass(frozen=True)
class Code:
    """What one compiled kernel takes and holds.

    registers  of 32 bits of a thread; AMD's vector registers with the accumulation registers among them
    scalars    AMD's scalar registers of a warp, 0 elsewhere
    spills     registers that did not fit and went elsewhere, where the compiler tells them from other local memory
    stack      bytes of local memory of a thread
    shared     bytes of shared memory (LDS) of a block
    occupancy  warps that a multiprocessor holds, by registers and shared memory
    classes    of matrix instructions, as `Target.expects` spells them, sorted
    """

    registers: int
    scalars: int
    spills: int
    stack: int
    shared: int
    occupancy: int
    classes: tuple[str, ...]


def read_ptx(text: str) -> tuple[str, ...]:
    """The classes of matrix instructions in PTX."""
    return tuple(sorted({_ptx_class(found, text) for found in PTX_PRODUCT.finditer(text)}))


def _ptx_class(found: re.Match[str], text: str) -> str:
    kind = found[2]
    if kind:
        return f"tcgen05.{_tcgen05_operand(kind, found[0], text)}"
    operand = PTX_TYPE.findall(found[0])[1]  # the first type is the accumulator's
    return f"{'wgmma' if found[1].startswith('wgmma') else 'mma'}.{KINDS.get(operand, operand)}"


def _tcgen05_operand(kind: str, call: str, text: str) -> str:
    """The first operand's type: in the kind, or in bits 7 to 9 of the instruction descriptor, the last register but one
    (PTX ISA, "tcgen05 instruction descriptor"); the kind itself where no constant is moved there."""
    values = {"f16": TCGEN05_HALVES, "f8f6f4": TCGEN05_SMALL, "mxf8f6f4": TCGEN05_SMALL}.get(kind)
    if values is None:
        return kind
    register = re.findall(r"%r\d+", call)[-1]
    moved = {int(value) for value in re.findall(rf"mov\.b32\s+{register},\s+(-?\d+);", text)}
    operands = {values.get(value >> 7 & 7, "") for value in moved}
    return operands.pop() or kind if len(operands) == 1 else f"kind::{kind}"


def read_amdgcn(text: str) -> tuple[str, ...]:
    """The classes of matrix instructions in AMD's assembly; sparse ones count as their dense likes."""
    found = set()
    for match in AMD_PRODUCT.finditer(text):
        unit = {"smfmac": "mfma", "swmmac": "wmma"}.get(match[1], match[1])
        operand = match[2]
        if operand.startswith("f8f6f4"):
            chosen = re.search(r"\bcbsz:(\d)", match[0])
            operand = AMD_SMALL[int(chosen[1]) if chosen else 0]
        found.add(f"{unit}.{KINDS.get(operand, operand)}")
    return tuple(sorted(found))


def nvidia_code(target: Target, ptx: str, usage: str, shared: int, warps: int) -> Code:
    """`usage` is what `cuobjdump -res-usage` prints; `shared` and `warps` are what the launch asks for."""
    took = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if not {"REG", "STACK", "LOCAL"} <= took.keys():
        raise ContractViolation(f"cuobjdump tells no registers: {' '.join(usage.split())[:200]!r}; update Triton")
    blocks = _blocks(target, shared + RESERVED, warps)
    by_registers = target.sm_registers // (_up(max(1, took["REG"]), 8) * target.warp) // SIMDS * SIMDS
    occupancy = min(blocks, by_registers // warps) * warps
    return Code(took["REG"], 0, 0, took["STACK"] + took["LOCAL"], shared, occupancy, read_ptx(ptx))


def amd_code(target: Target, amdgcn: str, shared: int, warps: int) -> Code:
    """From the text alone, which tells registers, spills and how many warps of them a SIMD holds."""
    took = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+_(?:count|size)):\s*(\d+)$", amdgcn, re.M)}
    told = re.search(r"^; Occupancy: (\d+)$", amdgcn, re.M)
    if told is None or not {"vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"} <= took.keys():
        raise ContractViolation("the assembly tells no registers or no occupancy; update Triton")
    shared = max(shared, took.get("group_segment_fixed_size", 0))
    blocks = min(_blocks(target, shared, warps), int(told[1]) * SIMDS // warps)
    spills = took["vgpr_spill_count"] + took["sgpr_spill_count"]
    stack = took.get("private_segment_fixed_size", 0)
    return Code(
        took["vgpr_count"], took["sgpr_count"], spills, stack, shared, blocks * warps, read_amdgcn(amdgcn)
    )  # fmt: skip


def _blocks(target: Target, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds by its shared memory, its warps and, at half as many, its block slots."""
    by_shared = target.sm_shared // shared if shared else target.sm_warps
    return min(by_shared, target.sm_warps // warps, target.sm_warps // 2)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def unexpected(found: Iterable[str], expects: str) -> tuple[list[str], list[str]]:
    """The classes that are missing, and those that are there and should not be. `expects` holds one, or several joined
    by "+". Products of f32 and f64 operands lose nothing, and may always be there."""
    wanted = set(expects.split("+")) - {""}
    there = set(found)
    further = {name for name in there - wanted if name.rpartition(".")[2] not in EXACT}
    return sorted(wanted - there), sorted(further)
