"""The TPU plugin without a TPU: what the probe sees, which options and topologies are allowed, what errors tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lineshaft.errors import BackendUnavailable, InvalidValue, LayoutError
from lineshaft_contract.backends import World
from lineshaft_contract.problems import KVProblem
from lineshaft_jax.memory import RankMemory, device_memory
from lineshaft_tpu import devices, probe
from lineshaft_tpu.backend import TpuBackend, create
from lineshaft_tpu.chips import CHIPS, chip_of_kind, parse_topology
from lineshaft_tpu.options import TpuOptions
from lineshaft_tpu.toolchain import TpuToolchain


def bus(root: Path, *found: tuple[str, str]) -> Path:
    """A PCI bus with devices of (vendor, device)."""
    for number, (vendor, device) in enumerate(found):
        folder = root / f"0000:00:{number:02x}.0"
        folder.mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    return root


def test_the_probe_names_each_chip_and_nothing_else_of_the_vendor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [("0x8086", "0x0063"), ("0x1ae0", "0x0042")]
    root = bus(tmp_path, ("0x1ae0", "0x0063"), *others, ("0x1ae0", "0x006f"))
    monkeypatch.setattr(probe, "PCI", root)
    found = probe.probe()
    assert found.usable and found.devices == ("TPU v5e", "TPU v6e")


@pytest.mark.parametrize(
    ("missing", "chips", "says"),
    [("jax", 1, "kits/jax"), ("libtpu", 1, "libtpu"), ("", 0, 'platform = "cpu"'), ("libtpu", 0, "no TPU")],
)
def test_the_probe_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, chips: int, says: str
) -> None:
    monkeypatch.setattr(probe, "PCI", bus(tmp_path, *[("0x1ae0", "0x0062")] * chips))
    monkeypatch.setattr(probe, "find_spec", lambda name: None if name == missing else object())
    found = probe.probe()
    assert not found.usable and says in found.reason
    assert found.runs_with({"platform": "cpu"}) == (missing != "jax")
    assert not found.runs_with({"platform": "tpu"}) and not found.runs_with({})


@pytest.mark.parametrize(
    "options",
    [
        {"platform": "gpu"}, {"interpret": True}, {"detect_races": True, "platform": "cpu"}, {"chip": "v99"},
        {"cache_dir": ""}, {"attention_memory_mib": 0}, {"pages": 3},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TpuOptions(**options)


def test_a_generation_alone_is_as_large_as_the_layout_needs() -> None:
    assert [parse_topology("v5e", ranks).name for ranks in (1, 2, 5, 16)] == [
        "v5e:1x1",
        "v5e:2x2",
        "v5e:2x4",
        "v5e:4x4",
    ]
    assert parse_topology("tpu7x", 8).name == "tpu7x:2x2x1"


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("v5e:1x1", "v5e:1x1", 1), ("v5e:2x4", "v5e:2x4", 8), ("v5p:2x2x1", "v5p:2x2x1", 4), ("v6e", "v6e:1x1", 1),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8), ("tpu7x", "tpu7x:1x1x1", 2),
    ],
)  # fmt: skip
def test_a_topology_is_a_generation_and_a_shape(text: str, name: str, count: int) -> None:
    found = parse_topology(text)
    assert (found.name, found.devices) == (name, count)


@pytest.mark.parametrize(
    "text",
    ["", "v5", "v5e:", "v5e:2", "v5e:2x2x1", "v5p:2x2", "v5e:0x4", "v5e:-1x4", "v5e:2xx4", "v5e:2x4x", "V5E:2x4"],
)
def test_what_is_no_topology_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidValue, match=r"written like \w+:\d"):
        parse_topology(text)


@pytest.mark.parametrize("text", ["v5e:64x64", "v6e:1x257", "v4:16x16x17", "v5p:400x400x400", "tpu7x:9999x9999x9999"])
def test_a_topology_larger_than_any_is_refused_before_its_compiler_dies(text: str) -> None:
    with pytest.raises(InvalidValue, match=rf"{text}.* at most \d+"):
        parse_topology(text)


def test_a_topology_leaves_no_log_behind(tmp_path: Path) -> None:
    script = "from lineshaft_tpu.chips import parse_topology; from lineshaft_tpu.devices import topology_devices; "
    script += "print(len(topology_devices(parse_topology('v5e:2x2'))))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment["TPU_LOG_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4"], done.stderr
    assert not list(tmp_path.iterdir())


def test_a_chip_is_known_by_the_name_that_jax_gives_it() -> None:
    assert [chip_of_kind(chip.kind) for chip in CHIPS.values()] == list(CHIPS.values())
    with pytest.raises(InvalidValue, match="TPU v2"):
        chip_of_kind("TPU v2")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The TPU is already in use by process with pid 4242. Not attempting to load libtpu.so", "4242"),
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile. Run $ rm /x/libtpu_lockfile", "in use"),
        ("Unable to initialize backend 'tpu': no devices", 'platform = "cpu"'),
    ],
)
def test_a_tpu_that_does_not_start_is_explained(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(platform: str) -> list[Any]:
        raise RuntimeError(said)

    monkeypatch.setattr(devices.jax, "devices", busy)
    with pytest.raises(BackendUnavailable, match=told):
        create(TpuOptions(cache_dir="off"), World())


def test_a_host_with_fewer_tpus_than_ranks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.jax, "devices", lambda platform: [object()] * 2)
    axes = (("dp", 2), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2))
    with pytest.raises(LayoutError, match=r"4 ranks.* 2 TPU"):
        create(TpuOptions(cache_dir="off"), World(rank=2, axes=axes, ranks=2))


def test_programs_of_other_options_are_others(tmp_path: Path) -> None:
    """Kernels of one name say what else they are made for, and those that look for races are never kept."""
    shared: dict[str, Any] = {"platform": "cpu", "interpret": True, "cache_dir": str(tmp_path / "programs")}
    runs: tuple[dict[str, Any], ...] = ({}, {"detect_races": True}, {"chip": "v5p"}, {"attention_memory_mib": 1})
    backends = [create(TpuOptions(**shared, **more), World()) for more in runs]
    made = [[(kernel.name, dict(kernel.options)) for kernel in backend.kernels()] for backend in backends]
    assert all(made.count(each) == 1 for each in made)
    assert [backend.store is None for backend in backends] == [False, True, False, False]


def test_compiling_ahead_interprets_nothing() -> None:
    toolchain = TpuToolchain(TpuOptions(platform="cpu", interpret=True))
    (attend,) = [k for k in toolchain.start("v5e:1x1", World()).kernels() if k.name == "pallas_attend"]
    assert attend.options == {"chip": "v5e", "run": "compiled"}


def test_compiling_ahead_needs_libtpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="libtpu"):
        TpuToolchain(TpuOptions()).start("v5e:1x1", World())
    assert isinstance(create(TpuOptions(platform="cpu", cache_dir="off"), World()), TpuBackend)


def test_a_layout_that_a_topology_cannot_hold_is_refused() -> None:
    axes = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 16))
    with pytest.raises(LayoutError, match=r"16 ranks.* 8 devices"):
        TpuToolchain(TpuOptions()).start("v5e:2x4", World(axes=axes, ranks=16))


def test_a_shape_that_the_compiler_refuses_is_an_error_of_the_user() -> None:
    with pytest.raises(InvalidValue, match="v5e:3x5"):
        TpuToolchain(TpuOptions()).start("v5e:3x5", World())


class Device:
    """A device with so many bytes in use."""

    def __init__(self, used: int | None) -> None:
        self.used = used

    def memory_stats(self) -> dict[str, int] | None:
        return None if self.used is None else {"bytes_limit": 1000, "bytes_in_use": self.used}


def test_the_fullest_device_counts() -> None:
    assert device_memory([Device(100), Device(700)]) == (1000, 300)
    assert device_memory([Device(100), Device(None)]) is None


def test_pages_are_counted_with_their_padding() -> None:
    problem = KVProblem(dtype="bfloat16", kv_heads=2, qk_dim=64, v_dim=64, page_size=16, kv_dtype="bfloat16")
    assert RankMemory(lambda: None, 1).page_bytes(problem) == problem.page_bytes
    assert RankMemory(lambda: None, 128).page_bytes(problem) == 2 * problem.page_bytes
