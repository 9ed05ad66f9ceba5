"""Looks for TPU chips on the PCI bus and for the packages that drive them; imports neither JAX nor libtpu."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lineshaft_contract.backends import Probe

PCI = Path("/sys/bus/pci/devices")
VENDOR = "0x1ae0"
CHIPS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
"""Names of chips by PCI device id."""

WITHOUT_TPU = {"platform": "cpu"}


def probe() -> Probe:
    """Usable where a chip is on the bus and libtpu is installed. Under `platform = "cpu"` JAX alone is enough."""
    if find_spec("jax") is None:
        return Probe(False, "JAX is not installed; run `pip install ./kits/jax` in a checkout of lineshaft")
    devices = tuple(f"TPU {name}" for name in chips(PCI))
    if not devices:
        return Probe(False, NO_TPU, unless=WITHOUT_TPU)
    if find_spec("libtpu") is None:
        return Probe(False, NO_LIBTPU, devices, unless=WITHOUT_TPU)
    return Probe(True, "JAX and libtpu are installed", devices, unless=WITHOUT_TPU)


NO_TPU = (
    'there is no TPU on the PCI bus; to run on JAX\'s CPU platform set platform = "cpu" under [backend_options], '
    "to compile for a TPU use `lineshaft compile`"
)


NO_LIBTPU = "libtpu is not installed; run `pip install './plugins/tpu[libtpu]'` in a checkout of lineshaft"


def chips(root: Path) -> Iterator[str]:
    """The name of each TPU chip that the kernel lists."""
    for device in sorted(root.glob("*")):
        if text(device / "vendor") == VENDOR and (name := CHIPS.get(text(device / "device"))):
            yield name


def text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
