"""AMD's GPUs as the kernel driver lists them under /sys/class/kfd, for which no library is needed.

Fields: Linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c, and `gfx_target_version` as 10000 * major + 100 * minor +
stepping.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NODES = Path("class/kfd/kfd/topology/nodes")
FRAME_BUFFER = ("1", "2")
"""Heap types of a GPU's own memory: what the host can map of it, and the rest."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: `arch` is "gfx942", `memory` in bytes."""

    name: str
    uuid: str
    arch: str
    memory: int

    @property
    def text(self) -> str:
        return f"{self.name} ({self.arch}, {self.memory / 2**30:.0f} GiB)"


def read_gpus(sys: Path) -> list[Gpu]:
    """All GPUs that the kernel driver lists, in its order, which is HIP's; `sys` is /sys. Nodes that this process may
    not read are left out."""
    nodes = sorted((sys / NODES).glob("[0-9]*"), key=lambda path: int(path.name))
    return [gpu for node in nodes if (gpu := _gpu(sys, node)) is not None]


def _gpu(sys: Path, node: Path) -> Gpu | None:
    facts = properties(node / "properties")
    version = int(facts.get("gfx_target_version", "0"))
    if not version:  # a processor
        return None
    banks = [properties(path) for path in sorted(node.glob("mem_banks/*/properties"))]
    memory = sum(int(bank.get("size_in_bytes", "0")) for bank in banks if bank.get("heap_type") in FRAME_BUFFER)
    product = sys / "class/drm" / f"renderD{facts.get('drm_render_minor', '')}" / "device/product_name"
    uuid = f"GPU-{int(facts.get('unique_id', '0')):016x}"
    return Gpu(_text(product).strip() or "AMD GPU", uuid, arch_of(version), memory)


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
