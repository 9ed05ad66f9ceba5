"""AMD's GPUs as the kernel driver lists them under /sys/class/kfd, for which no library is needed.

Fields: Linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c, and `gfx_target_version` as 10000 * major + 100 * minor +
stepping.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lineshaft_triton.probing import described, listed, whole_number

NODES = Path("class/kfd/kfd/topology/nodes")
FRAME_BUFFER = ("1", "2")
"""Heap types of a GPU's own memory: what the host can map of it, and the rest."""
TEXT = 96
"""Most characters that are told of a text."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: `arch` is "gfx942", or the driver's own words where they are no number; `memory` in bytes, 0 where it is
    unknown."""

    name: str
    uuid: str
    arch: str
    memory: int

    @property
    def text(self) -> str:
        return described(self.name, self.arch, self.memory)


def read_gpus(sys: Path) -> list[Gpu]:
    """All GPUs that the kernel driver lists, in its order, which is HIP's; `sys` is /sys. Nodes that this process may
    not read are left out; one whose kind is not told keeps its place."""
    return [gpu for node in nodes(sys) if (gpu := _gpu(sys, node)) is not None]


def nodes(sys: Path) -> list[Path]:
    """The folders of processors and GPUs, in the order of their numbers."""
    numbered = [(number, name) for name in listed(sys / NODES) if (number := whole_number(name)) is not None]
    return [sys / NODES / name for _, name in sorted(numbered)]


def _gpu(sys: Path, node: Path) -> Gpu | None:
    facts = properties(node / "properties")
    written = facts.get("gfx_target_version", "0")
    version = whole_number(written)
    if version == 0:  # a processor
        return None
    arch = f"gfx_target_version {written[:TEXT]!r}" if version is None else arch_of(version)
    uuid = f"GPU-{whole_number(facts.get('unique_id', '')) or 0:016x}"
    return Gpu(_product(sys, facts) or "AMD GPU", uuid, arch, _memory(node))


def _memory(node: Path) -> int:
    """Bytes of a GPU's own memory; 0 where a part of them is not told."""
    banks = [properties(node / "mem_banks" / name / "properties") for name in listed(node / "mem_banks")]
    sizes = [whole_number(bank.get("size_in_bytes", "")) for bank in banks if bank.get("heap_type") in FRAME_BUFFER]
    return sum(size or 0 for size in sizes) if None not in sizes else 0


def _product(sys: Path, facts: dict[str, str]) -> str:
    minor = whole_number(facts.get("drm_render_minor", ""))
    if minor is None:
        return ""
    name = _text(sys / "class/drm" / f"renderD{minor}" / "device/product_name")
    return " ".join("".join(each if each.isprintable() else " " for each in name).split())[:TEXT]


def arch_of(version: int) -> str:
    """gfx_target_version as compilers write it: 90402 is gfx942, 90010 gfx90a, 110000 gfx1100."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def properties(path: Path) -> dict[str, str]:
    """Lines of "name value"."""
    pairs = (line.split(maxsplit=1) for line in _text(path).splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
