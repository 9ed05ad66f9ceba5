"""What the probes of both vendors look at beside the hardware: which PyTorch and Triton are installed, and which
devices a user leaves visible. Imports neither PyTorch nor Triton."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lineshaft_contract.backends import Probe

OLDEST_TORCH = (2, 9)
INTERPRETED = {"interpret": "true"}
INSTEAD = (
    "choose a backend that `lineshaft backends` shows as usable; or set interpret = true under [backend_options], "
    "which runs the kernels in Triton's interpreter, for checks; or compile for a GPU that is not here by "
    "`lineshaft kernels compile --backend {}`"
)


@dataclass(frozen=True)
class TorchBuild:
    """The installed PyTorch as its file `version.py` tells: versions of what it was built with, "" for none."""

    version: str
    cuda: str
    hip: str

    @property
    def old(self) -> bool:
        return numbers(self.version)[:2] < OLDEST_TORCH


def torch_build() -> TorchBuild | None:
    """The installed PyTorch, or None; read as text."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return TorchBuild(*(_assigned(text, name) for name in ("__version__", "cuda", "hip")))


def _assigned(text: str, name: str) -> str:
    found = re.search(rf"""^{name}\b[^=\n]*=\s*['"]([^'"]*)['"]""", text, re.MULTILINE)
    return found[1] if found else ""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "12.8" is (12, 8), "2.13.0+cpu" (2, 13, 0)."""
    found = re.match(r"\d{1,9}(?!\d)(\.\d{1,9}(?!\d))*", version, re.ASCII)
    return tuple(map(int, found[0].split("."))) if found else ()


def whole_number(text: str) -> int | None:
    """The number of up to 64 bits that digits of ASCII write; None for anything else."""
    found = re.fullmatch(r"0*(\d{1,20})", text, re.ASCII)
    return int(found[1]) if found else None


def described(name: str, arch: str, memory: int) -> str:
    """A GPU for a reader; `memory` in bytes, 0 where it is unknown."""
    return f"{name} ({arch}, {f'{memory / 2**30:.0f} GiB' if memory else 'memory unknown'})"


def listed(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def interpreter_missing(torch: TorchBuild | None) -> str:
    """What is not installed of all that even interpreted kernels need; "" if nothing is."""
    if torch is None:
        return "PyTorch is not installed; run `pip install torch`"
    if torch.old:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"PyTorch {torch.version} is installed, and {oldest} is the oldest that is supported; update it"
    if find_spec("triton") is None:
        own = f"the one that PyTorch {torch.version} names among its requirements"
        return f"Triton is not installed; {f'install {own}' if torch.hip else 'run `pip install triton`'}"
    return ""


def no_device(backend: str, found: str, torch: TorchBuild | None) -> Probe:
    """The probe of a machine without a device; `found`: what was looked for, and what was there."""
    missing = interpreter_missing(torch)
    unless = {} if missing else INTERPRETED
    return Probe(False, f"{found}; {INSTEAD.format(backend)}{missing and f' ({missing})'}", unless=unless)


def visible(setting: str | None, count: int, uuids: Sequence[str]) -> list[int]:
    """The numbers of the devices that a variable such as CUDA_VISIBLE_DEVICES leaves, in its order.

    setting: a list of numbers below `count` and of beginnings of `uuids`; None where it is not set, and all `count` are
    left. As in the drivers, the first entry that names no device ends the list, and one named twice leaves none.
    """
    if setting is None:
        return list(range(count))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        fitting = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        number = whole_number(entry)
        if number is not None:
            fitting = [number] if number < count else []
        if len(fitting) != 1:
            break
        chosen += fitting
    return chosen if len(set(chosen)) == len(chosen) else []
