"""The GPUs that kernels are compiled for: facts of each, as a table. Knows no kernel, and imports no Triton."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from lineshaft_contract.errors import InvalidValue

KIB: Final = 1024
FN: Final = "float8_e4m3fn"
FNUZ: Final = "float8_e4m3fnuz"
SHORT: Final = MappingProxyType(
    {"bfloat16": "bf16", "float16": "f16", FN: "fp8", FNUZ: "fp8", "int8": "i8", "float32": "", "float64": ""}
)
"""What operands of each dtype are called in the name of a class of matrix instructions; "": they use none."""


@dataclass(frozen=True)
class Target:
    """One generation of GPUs.

    name       "sm90", "gfx942": as the compilers call it
    warp       threads that run in step
    shared     bytes of shared memory (LDS) that one block may take
    unit       the matrix instructions that large tiles use: mma, wgmma, tcgen05, mfma or wmma
    fp8        the dtype of eight bits that its matrix instructions read as float8 e4m3; "": none
    sm_shared  bytes of shared memory of a multiprocessor (a compute unit of CDNA, a work-group processor of RDNA)
    sm_warps   warps that a multiprocessor holds at most
    sm_registers  registers of 32 bits of a multiprocessor; 0 where the compiler tells the occupancy itself
    """

    name: str
    vendor: Literal["nvidia", "amd"]
    warp: int
    shared: int
    unit: str
    fp8: str
    sm_shared: int
    sm_warps: int
    sm_registers: int = 0

    def expects(self, dtype: str, unit: str = "") -> str:
        """The class of matrix instructions by which a tile of `dtype` operands is multiplied here, as "wgmma.bf16"; ""
        for operands that the vector units multiply. `unit`: another than this target's best, as for small tiles."""
        kind = SHORT[dtype]
        return f"{unit or self.unit}.{kind}" if kind else ""


def _nvidia(name: str, block_kib: int, sm_kib: int, unit: str, fp8: str, warps: int) -> Target:
    return Target(name, "nvidia", 32, block_kib * KIB, unit, fp8, sm_kib * KIB, warps, 65536)


TARGETS: Final = MappingProxyType(
    {
        target.name: target
        for target in (
            _nvidia("sm80", 163, 164, "mma", "", 64),
            _nvidia("sm89", 99, 100, "mma", FN, 48),
            _nvidia("sm90", 227, 228, "wgmma", FN, 64),
            _nvidia("sm100", 227, 228, "tcgen05", FN, 64),
            _nvidia("sm120", 99, 100, "mma", FN, 48),
            Target("gfx90a", "amd", 64, 64 * KIB, "mfma", "", 64 * KIB, 32),
            Target("gfx942", "amd", 64, 64 * KIB, "mfma", FNUZ, 64 * KIB, 32),
            Target("gfx950", "amd", 64, 160 * KIB, "mfma", FN, 160 * KIB, 32),
            Target("gfx1100", "amd", 32, 64 * KIB, "wmma", "", 128 * KIB, 64),
            Target("gfx1201", "amd", 32, 64 * KIB, "wmma", FN, 128 * KIB, 64),
        )
    }
)
"""Memory sizes: CUDA C++ Programming Guide, "Compute Capabilities"; AMD's instruction set manuals of CDNA and RDNA."""

CORES: Final = MappingProxyType(
    {
        "sm80": 108, "sm89": 142, "sm90": 132, "sm100": 148, "sm120": 188,
        "gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96, "gfx1201": 64,
    }
)  # fmt: skip
"""Multiprocessors (compute units) of the largest product of a target."""


def targets_of(vendor: str) -> tuple[str, ...]:
    """The names of one vendor's targets."""
    return tuple(target.name for target in TARGETS.values() if target.vendor == vendor)


def find_target(name: str, vendor: str) -> Target:
    """The target of a device, by the name that its driver or a user gives: "sm90", "sm_90a", "gfx942:sramecc+:xnack-".

    A device of a family that is listed stands for the nearest older listed one of its major version ("sm86" is built
    as sm80), since code of that one runs on it; AMD's are exact. Raises InvalidValue for any other.
    """
    plain = name.partition(":")[0].replace("_", "").lower()
    plain = re.sub(r"^(sm\d+)[af]$", r"\1", plain)
    if plain in TARGETS and TARGETS[plain].vendor == vendor:
        return TARGETS[plain]
    known = targets_of(vendor)
    if vendor == "nvidia" and re.fullmatch(r"sm\d{2,3}", plain):
        number = int(plain[2:])
        older = [each for each in known if int(each[2:]) // 10 == number // 10 and int(each[2:]) <= number]
        if older:
            return TARGETS[older[-1]]
    raise InvalidValue(f"there are no kernels for the GPU {name!r}; there are for {', '.join(known)}")


def kernels_for_any(names: Sequence[str], vendor: str) -> str:
    """Why there are kernels for none of these devices; "" where there are for one or more."""
    reasons = []
    for name in names:
        try:
            find_target(name, vendor)
        except InvalidValue as error:
            reasons.append(str(error))
        else:
            return ""
    return "; ".join(dict.fromkeys(reasons)) + "; choose another backend"
