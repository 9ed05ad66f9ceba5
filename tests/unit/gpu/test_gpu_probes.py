"""What the probes of cuda and rocm say of machines with GPUs and without, and what they must not import or do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.gpu.conftest import Nvml

from lineshaft.errors import InvalidValue
from lineshaft_contract.backends import Probe
from lineshaft_cuda import probe as cuda
from lineshaft_cuda.nvml import NvmlError, read_driver
from lineshaft_rocm import probe as rocm
from lineshaft_rocm.topology import arch_of
from lineshaft_triton import probing
from lineshaft_triton.probing import TorchBuild, numbers, torch_build, visible
from lineshaft_triton.targets import find_target

CUDA_TORCH = TorchBuild("2.10.0+cu128", "12.8", "")
ROCM_TORCH = TorchBuild("2.10.0+rocm7.0", "", "7.0.51831")
CPU_TORCH = TorchBuild("2.10.0+cpu", "", "")
Installed = Callable[..., None]


# ---- what is visible -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        (None, [0, 1, 2]), ("", []), ("-1", []), ("1", [1]), ("2,0", [2, 0]), (" 1 , 2 ", [1, 2]), ("0,-1,2", [0]),
        ("1,7,0", [1]), ("abc", []), ("0,0", []), ("GPU-b", [1]), ("GPU-b,0", [1, 0]), ("GPU-", []), ("GPU-x,0", []),
        ("MIG-", [3]), ("3", []), (",0", []), ("1.0", []), ("01", [1]), ("\u0661", []), ("0,\u0661", [0]), ("\xb2", []),
    ],
)  # fmt: skip
def test_a_variable_leaves_what_the_driver_would_leave(setting: str | None, left: list[int]) -> None:
    assert visible(setting, 3, ["GPU-a1", "GPU-b2", "GPU-a3", "MIG-9"]) == left


@pytest.mark.parametrize(("setting", "left"), [("9" * 5000, []), ("1," + "9" * 5000, [1]), ("0" * 5000 + "1", [1])])
def test_a_number_of_any_length_is_read(setting: str, left: list[int]) -> None:
    assert visible(setting, 3, ["GPU-a1", "GPU-b2", "GPU-a3"]) == left


# ---- cuda ------------------------------------------------------------------------------------------------------------


def on(library: str, **more: Path) -> Probe:
    return cuda.probe(cuda.Machine(library=library, **more))


def test_the_management_library_tells_of_driver_and_gpus(nvml: Nvml) -> None:
    driver = read_driver(nvml(gpus=2, arch="10.3", cuda=13010), ["MIG-5", "MIG-6"])
    assert (driver.version, driver.cuda) == ("555.42", (13, 1))
    assert [gpu.text for gpu in driver.gpus] == ["Fake GPU 0 (sm103, 80 GiB)", "Fake GPU 1 (sm103, 80 GiB)"]
    assert [(gpu.uuid, gpu.arch, gpu.memory >> 30) for gpu in driver.slices] == [("MIG-5", "sm103", 10)]


def test_a_gpu_with_driver_and_software_is_usable(nvml: Nvml, installed: Installed) -> None:
    installed(CUDA_TORCH)
    found = on(nvml())
    assert found == Probe(
        True,
        "driver 555.42, CUDA 12.4",
        ("Fake GPU 0 (sm90, 80 GiB)", "Fake GPU 1 (sm90, 80 GiB)"),
        unless={"interpret": "true"},
    )


@pytest.mark.parametrize(
    ("setting", "numbers"), [("1", [1]), ("GPU-1", [1]), ("1,0", [1, 0]), ("MIG-5", [0]), ("", []), ("-1", [])]
)
def test_only_visible_gpus_count(
    nvml: Nvml, installed: Installed, monkeypatch: pytest.MonkeyPatch, setting: str, numbers: list[int]
) -> None:
    installed(CUDA_TORCH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    found = on(nvml())
    assert [name.split()[2] for name in found.devices] == [str(number) for number in numbers]
    assert found.usable == bool(numbers)
    assert numbers or f"CUDA_VISIBLE_DEVICES = {setting!r} hides" in found.reason


@pytest.mark.parametrize(
    ("build", "triton", "says"),
    [
        (None, True, "PyTorch is not installed"),
        (TorchBuild("2.8.0", "12.8", ""), True, "2.9 is the oldest"),
        (CUDA_TORCH, False, "Triton is not installed; run `pip install triton`"),
        (CPU_TORCH, True, "2.10.0+cpu is built without CUDA"),
        (ROCM_TORCH, True, "is built without CUDA"),
        (TorchBuild("2.11.0+cu130", "13.0", ""), True, "CUDA up to 12.4, and PyTorch 2.11.0+cu130 is built with CUDA"),
    ],
)
def test_what_does_not_fit_the_driver_is_said(
    nvml: Nvml, installed: Installed, build: TorchBuild | None, triton: bool, says: str
) -> None:
    """The driver's age comes from the library of `nvml_stub.c`, which stands in for a machine's."""
    installed(build, triton)
    found = on(nvml(cuda=12040))
    assert not found.usable and says in found.reason and found.devices
    complete = build is not None and not build.old and triton
    assert found.runs_with({"interpret": True}) == complete
    assert not found.runs_with({})


@pytest.mark.parametrize(("build", "enough"), [("12.8", True), ("12.0", True), ("11.8", True), ("13.0", False)])
def test_a_driver_runs_what_is_built_for_its_major_version_or_an_older_one(
    nvml: Nvml, installed: Installed, build: str, enough: bool
) -> None:
    installed(TorchBuild("2.10.0", build, ""))
    assert on(nvml(cuda=12040)).usable == enough


def test_a_gpu_that_there_are_no_kernels_for_is_named_with_those_there_are(nvml: Nvml, installed: Installed) -> None:
    installed(CUDA_TORCH)
    found = on(nvml(arch="7.5"))
    assert not found.usable
    assert "'sm75'" in found.reason and "sm80, sm89, sm90, sm100, sm120" in found.reason


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        (True, True),
        ("YES", True),
        (1, True),
        ("maybe", True),
        (False, False),
        ("off", False),
        ("0", False),
        ("", False),
    ],
)
def test_a_switch_in_place_of_a_gpu_is_on_unless_it_is_off(given: object, runs: bool) -> None:
    probe = Probe(False, "no GPU", unless={"interpret": "true"})
    assert probe.runs_with({"interpret": given}) == runs and not probe.runs_with({})


def test_without_a_gpu_the_reason_says_what_was_looked_for_and_what_to_choose(tmp_path: Path) -> None:
    found = on("libnothing-of-this-name.so", dev=tmp_path, module=tmp_path / "version")
    assert not found.usable and found.runs_with({"interpret": "true"})
    for word in (
        f"{tmp_path}/nvidia*: none",
        "is absent",
        "libnothing",
        "`lineshaft backends` shows as usable",
        "interpret = true",
        "kernels compile",
    ):
        assert word in found.reason
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").touch()
    seen = on("libnothing-of-this-name.so", dev=tmp_path, module=tmp_path / "version")
    assert "nvidia0; driver" in seen.reason and "is there" in seen.reason and "container" in seen.reason


def test_a_driver_that_does_not_answer_is_quoted(nvml: Nvml, tmp_path: Path) -> None:
    with pytest.raises(NvmlError, match=r"nvmlInit_v2 failed: Driver Not Loaded"):
        read_driver(nvml(fail=9))
    assert "Driver Not Loaded" in on(nvml(fail=9), dev=tmp_path).reason


def test_a_library_without_the_functions_is_an_old_driver() -> None:
    with pytest.raises(NvmlError, match="no nvmlInit_v2: the driver is too old"):
        read_driver("libc.so.6")


def test_a_machine_with_the_driver_and_no_gpu(nvml: Nvml, installed: Installed) -> None:
    installed(CUDA_TORCH)
    assert "lists no GPU" in on(nvml(gpus=0)).reason


def test_a_gpu_whose_memory_is_not_told_is_usable(
    nvml: Nvml, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of GPUs that have the host's memory for their own, and of one that is cut into slices."""
    installed(CUDA_TORCH)
    monkeypatch.setenv("NVML_STUB", "nvmlDeviceGetMemoryInfo=3")
    found = on(nvml(gpus=1, arch="12.1"))
    assert (found.usable, found.devices) == (True, ("Fake GPU 0 (sm121, memory unknown)",))
    monkeypatch.setenv("NVML_STUB", "nvmlDeviceGetMemoryInfo@0=4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")
    found = on(nvml())
    assert (found.usable, found.devices) == (True, ("Fake GPU 0 (sm90, 10 GiB)",))


HANDLE = "GPU 0 (nvmlDeviceGetHandleByIndex_v2 failed: GPU is lost)"
KIND = "Fake GPU 0 (nvmlDeviceGetCudaComputeCapability failed: GPU is lost)"
SECOND = "Fake GPU 1 (sm90, 80 GiB)"


@pytest.mark.parametrize(
    ("setting", "left"), [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("0", [0]), ("GPU-1", [1]), ("2", [])]
)
@pytest.mark.parametrize(
    ("stub", "lost"),
    [("nvmlDeviceGetHandleByIndex_v2@0=15", HANDLE), ("nvmlDeviceGetCudaComputeCapability@0=15", KIND)],
)
def test_a_lost_gpu_keeps_its_number_and_hides_no_other(
    nvml: Nvml,
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    stub: str,
    lost: str,
    setting: str | None,
    left: list[int],
) -> None:
    installed(CUDA_TORCH)
    monkeypatch.setenv("NVML_STUB", stub)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    found = on(nvml())
    assert found.devices == tuple((lost, SECOND)[number] for number in left)
    assert found.usable == (1 in left)
    assert found.runs_with({"interpret": True})
    assert "was found" not in found.reason
    assert found.usable or lost in found.reason


@pytest.mark.parametrize(
    ("stub", "devices", "says"),
    [
        ("nvmlDeviceGetHandleByUUID=15", ("MIG-5 (nvmlDeviceGetHandleByUUID failed: GPU is lost)",), "GPU is lost"),
        ("nvmlDeviceGetHandleByUUID=6", (), "= 'MIG-5' hides all"),
        ("nvmlDeviceGetCudaComputeCapability=15 nvmlDeviceGetName=15", ("MIG-5 (nvmlDeviceGet",), "GPU is lost"),
    ],
)
def test_a_slice_that_cannot_be_asked_is_told_from_one_that_is_not_there(
    nvml: Nvml, installed: Installed, monkeypatch: pytest.MonkeyPatch, stub: str, devices: tuple[str, ...], says: str
) -> None:
    installed(CUDA_TORCH)
    monkeypatch.setenv("NVML_STUB", stub)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")
    found = on(nvml())
    assert not found.usable and says in found.reason
    assert len(found.devices) == len(devices)
    assert all(device.startswith(start) for device, start in zip(found.devices, devices, strict=True))


FUNCTIONS = (
    "nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetDeviceHandleFromMigDeviceHandle",
    "nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability",
)  # fmt: skip
NEEDED = ("nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_query_that_fails_takes_with_it_only_what_it_tells(
    nvml: Nvml, installed: Installed, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """With a status that NVML has no words for."""
    installed(CUDA_TORCH)
    monkeypatch.setenv("NVML_STUB", f"{function}=999")
    for setting in ("0,1", "MIG-5", "GPU-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        found = on(nvml())
        assert found.runs_with({"interpret": True})
        assert ("was found" in found.reason) == (function == "nvmlDeviceGetCount_v2")
        if setting == "0,1":
            assert found.usable == (function not in NEEDED)
            assert found.usable or f"{function} failed: status 999" in found.reason


@pytest.mark.parametrize("lacks", [*FUNCTIONS, "nvmlInit_v2", "nvmlShutdown", "nvmlErrorString"])
def test_a_library_without_one_function_is_no_reason_to_raise(nvml: Nvml, installed: Installed, lacks: str) -> None:
    installed(CUDA_TORCH)
    found = on(nvml(lacks=lacks))
    assert found.runs_with({"interpret": True})
    assert found.usable == (lacks not in (*NEEDED, "nvmlInit_v2", "nvmlSystemGetCudaDriverVersion_v2"))
    assert found.usable or f"NVML has no {lacks}" in found.reason


@pytest.mark.parametrize("status", [9, 999])
def test_a_failure_without_words_is_told_by_its_number(nvml: Nvml, tmp_path: Path, status: int) -> None:
    assert f"failed: status {status}" in on(nvml(fail=status, lacks="nvmlErrorString"), dev=tmp_path).reason
    assert "failed: status 999" in on(nvml(fail=999), dev=tmp_path).reason


def test_a_driver_without_its_library_of_cuda_is_refused(
    nvml: Nvml, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(CUDA_TORCH)
    monkeypatch.setenv("NVML_STUB", "nvmlSystemGetCudaDriverVersion_v2=12")
    found = on(nvml())
    assert not found.usable and "Shared Library Not Found" in found.reason and "`compute`" in found.reason
    monkeypatch.setenv("NVML_STUB", "nvmlSystemGetCudaDriverVersion_v2=999 nvmlSystemGetDriverVersion=999")
    assert on(nvml()).reason == "driver unknown, CUDA unknown"
    monkeypatch.delenv("NVML_STUB")
    assert on(nvml(cuda=0)).reason == on(nvml(cuda=-1)).reason == "driver 555.42, CUDA unknown"


def test_a_slice_whose_name_is_no_text_is_not_there(
    nvml: Nvml, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(CUDA_TORCH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.fsdecode(b"MIG-\xff"))
    found = on(nvml())
    assert not found.usable and found.reason.encode() and "hides all that NVML lists" in found.reason


# ---- rocm ------------------------------------------------------------------------------------------------------------


def kernel_driver(root: Path, *versions: int, product: str = "") -> rocm.Machine:
    """A machine whose driver lists a processor and GPUs of these versions, in folders."""
    (root / "kfd").touch()
    for number, version in enumerate((0, *versions)):
        node = root / "class/kfd/kfd/topology/nodes" / str(number)
        (node / "mem_banks/0").mkdir(parents=True)
        facts = f"simd_count 304\ngfx_target_version {version}\ndrm_render_minor {127 + number}\nunique_id {number}\n"
        (node / "properties").write_text(facts)
        (node / "mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {192 << 30}\nflags 0\n")
        device = root / f"class/drm/renderD{127 + number}/device"
        device.mkdir(parents=True)
        if product:
            (device / "product_name").write_text(f"{product}\n")
    return rocm.Machine(root / "kfd", root)


@pytest.mark.parametrize(
    ("version", "arch"),
    [
        (90010, "gfx90a"),
        (90402, "gfx942"),
        (90500, "gfx950"),
        (110000, "gfx1100"),
        (120001, "gfx1201"),
        (90006, "gfx906"),
    ],
)
def test_the_drivers_number_is_the_compilers_name(version: int, arch: str) -> None:
    assert arch_of(version) == arch


def test_amd_gpus_are_found_without_any_library(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH)
    found = rocm.probe(kernel_driver(tmp_path, 90402, 90402, product="MI300X"))
    assert found.usable and found.devices == ("MI300X (gfx942, 192 GiB)",) * 2
    assert "7.0.51831" in found.reason


@pytest.mark.parametrize(("setting", "left"), [("1", 1), ("0,1", 2), ("GPU-0000000000000002", 1), ("", 0), ("-1", 0)])
def test_only_visible_amd_gpus_count(
    tmp_path: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch, setting: str, left: int
) -> None:
    installed(ROCM_TORCH)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", setting)
    found = rocm.probe(kernel_driver(tmp_path, 90402, 90402))
    assert (len(found.devices), found.usable) == (left, bool(left))
    assert left or "HIP_VISIBLE_DEVICES" in found.reason


@pytest.mark.parametrize(
    ("versions", "build", "says"),
    [
        ((90402,), CPU_TORCH, "2.10.0+cpu is built without ROCm"),
        ((90402,), CUDA_TORCH, "is built without ROCm"),
        ((90006,), ROCM_TORCH, "gfx90a, gfx942, gfx950, gfx1100, gfx1201"),
        ((), ROCM_TORCH, "`lineshaft backends` shows as usable"),
        ((90402,), None, "PyTorch is not installed"),
    ],
)
def test_the_reason_why_an_amd_gpu_is_not_usable(
    tmp_path: Path, installed: Installed, versions: tuple[int, ...], build: TorchBuild | None, says: str
) -> None:
    installed(build)
    found = rocm.probe(kernel_driver(tmp_path, *versions))
    assert not found.usable and says in found.reason


def test_pytorch_for_rocm_brings_a_triton_of_its_own(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH, triton=False)
    found = rocm.probe(kernel_driver(tmp_path, 90402))
    assert not found.usable and not found.runs_with({"interpret": True})
    assert "the one that PyTorch 2.10.0+rocm7.0 names" in found.reason and "pip install triton" not in found.reason


def test_a_display_without_kernels_beside_a_gpu_with_them_does_not_matter(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH)
    assert rocm.probe(kernel_driver(tmp_path, 110000, 100306)).usable


def test_a_device_that_may_not_be_opened_is_said(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH)
    machine = kernel_driver(tmp_path, 90402)
    machine.kfd.unlink()
    assert "groups `render` and `video`" in rocm.probe(machine).reason


@pytest.mark.parametrize("name", rocm.OTHERS)
def test_a_variable_that_renumbers_devices_elsewhere_is_refused(
    tmp_path: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    installed(ROCM_TORCH)
    machine = kernel_driver(tmp_path, 90402, 90402)
    monkeypatch.setenv(name, "1")
    found = rocm.probe(machine)
    assert not found.usable and f"{name} = '1'" in found.reason
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")  # the same on both levels, as launchers write it
    assert rocm.probe(machine).usable


def test_what_the_driver_keeps_from_a_process_is_no_gpu(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH)
    machine = kernel_driver(tmp_path, 90402, 90402)
    (tmp_path / "class/kfd/kfd/topology/nodes/1/properties").write_text("")
    assert len(rocm.probe(machine).devices) == 1


@pytest.mark.parametrize(
    ("facts", "devices"),
    [
        ("gfx_target_version abc\n", ("AMD GPU (gfx_target_version 'abc', 192 GiB)",)),
        ("gfx_target_version 90402 extra\n", ("AMD GPU (gfx_target_version '90402 extra', 192 GiB)",)),
        ("gfx_target_version -5\n", ("AMD GPU (gfx_target_version '-5', 192 GiB)",)),
        ("gfx_target_version 90402\nunique_id zz\n", ("AMD GPU (gfx942, 192 GiB)",)),
        ("gfx_target_version 90402\ndrm_render_minor ../..\n", ("AMD GPU (gfx942, 192 GiB)",)),
        ("\0\xff", ()),
    ],
)
def test_one_bad_node_hides_no_other_gpu_and_keeps_its_number(
    tmp_path: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch, facts: str, devices: tuple[str, ...]
) -> None:
    installed(ROCM_TORCH)
    machine = kernel_driver(tmp_path, 90402, 90500)
    (tmp_path / "class/kfd/kfd/topology/nodes/1/properties").write_text(facts)
    whole = "AMD GPU (gfx950, 192 GiB)"
    found = rocm.probe(machine)
    assert found.usable and found.devices == (*devices, whole)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", str(len(devices)))
    assert rocm.probe(machine).devices == (whole,)


def test_a_gpu_of_an_untold_kind_or_size_says_so(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH)
    machine = kernel_driver(tmp_path, 90402)
    node = tmp_path / "class/kfd/kfd/topology/nodes/1"
    (node / "mem_banks/0/properties").write_text("heap_type 1\nsize_in_bytes x\n")
    assert rocm.probe(machine).devices == ("AMD GPU (gfx942, memory unknown)",)
    (node / "properties").write_text("gfx_target_version abc\n")
    found = rocm.probe(machine)
    assert not found.usable and "'abc'" in found.reason and "gfx90a, gfx942" in found.reason
    assert found.runs_with({"interpret": True})


def test_a_folder_that_is_no_number_is_no_node(tmp_path: Path, installed: Installed) -> None:
    installed(ROCM_TORCH)
    machine = kernel_driver(tmp_path, 90402)
    nodes = tmp_path / "class/kfd/kfd/topology/nodes"
    for name in ("0abc", "\u0663", os.fsdecode(b"2\xff")):
        shutil.copytree(nodes / "1", nodes / name)
    assert len(rocm.probe(machine).devices) == 1


def spoil(path: Path, how: bytes | str) -> None:
    """Put in the place of a file or a folder: bytes, or what the word says."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if isinstance(how, bytes):
        path.write_bytes(how)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)


def spoilt(root: Path, place: str, how: bytes | str) -> Probe:
    """What is found of two GPUs once something is put in a place of the driver's folder."""
    machine = kernel_driver(root, 90402, 90500, product="Fake")
    spoil(root / place, how)
    return rocm.probe(machine)


NUMBERS = st.one_of(st.integers().map(str), st.text(), st.just("9" * 5000), st.just("\0"))
FIELDS = ("gfx_target_version", "unique_id", "drm_render_minor", "size_in_bytes", "heap_type")
LINES = st.dictionaries(st.sampled_from(FIELDS), NUMBERS).map(
    lambda facts: "".join(f"{name} {value}\n" for name, value in facts.items()).encode(errors="replace")
)
SPOILT = st.one_of(st.binary(max_size=200), LINES, st.sampled_from(["folder", "loop", "missing"]))
OF_ONE_GPU = (
    "class/kfd/kfd/topology/nodes/1/properties", "class/kfd/kfd/topology/nodes/1/mem_banks/0/properties",
    "class/kfd/kfd/topology/nodes/1/mem_banks", "class/kfd/kfd/topology/nodes/1", "class/drm/renderD128",
    "class/drm/renderD128/device", "class/drm/renderD128/device/product_name",
)  # fmt: skip
OF_ALL = ("class/kfd/kfd/topology/nodes", "class/kfd/kfd/topology", "class/drm", "class", "kfd")


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.sampled_from(OF_ONE_GPU), SPOILT)
def test_no_file_of_one_gpu_makes_a_probe_raise_or_hides_another(
    tmp_path_factory: pytest.TempPathFactory, place: str, how: bytes | str
) -> None:
    found = spoilt(tmp_path_factory.mktemp("sys"), place, how)
    assert found.devices[-1:] == ("Fake (gfx950, 192 GiB)",)
    assert all(device.encode().decode().isprintable() for device in found.devices)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.sampled_from(OF_ALL), SPOILT)
def test_no_folder_of_the_driver_makes_a_probe_raise(
    tmp_path_factory: pytest.TempPathFactory, place: str, how: bytes | str
) -> None:
    root = tmp_path_factory.mktemp("sys")
    found = spoilt(root, place, how)
    assert found.usable or found.reason
    assert on("libnothing-of-this-name.so", dev=root / place, module=root / place / "version").reason


# ---- both ------------------------------------------------------------------------------------------------------------


def test_the_installed_pytorch_is_read_and_not_imported() -> None:
    import torch

    found = torch_build()
    assert found is not None
    assert (found.version, found.cuda, found.hip) == (
        torch.__version__,
        torch.version.cuda or "",
        torch.version.hip or "",
    )


def test_a_version_file_of_any_build_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(probing, "find_spec", lambda name: type("Spec", (), {"origin": str(package / "__init__.py")}))
    assert torch_build() is None
    for text, build in (
        ("__version__ = '2.9.1+cu128'\ncuda: Optional[str] = '12.8'\nhip: X = None\n", ("2.9.1+cu128", "12.8", "")),
        ('__version__ = "2.9.0"\ncuda = None\nhip = "6.4.43482"\n', ("2.9.0", "", "6.4.43482")),
        ("", ("", "", "")),
    ):  # fmt: skip
        (package / "version.py").write_text(text)
        assert torch_build() == TorchBuild(*build)
    for how in (b"__version__ = '\xff'\ncuda = '\xd9\xa1'\n", b"\0" * 99, "folder", "loop"):
        spoil(package / "version.py", how)
        assert cuda.probe().reason and rocm.probe().reason


def test_a_version_is_compared_by_numbers() -> None:
    assert numbers("2.10.0+cu128") == (2, 10, 0) and numbers("nightly") == ()
    assert numbers("\u0662.10") == numbers("9" * 5000) == () and numbers("2." + "9" * 5000) == (2,)
    assert [TorchBuild(version, "", "").old for version in ("2.8.9", "2.9.0", "2.10.0a0", "3.0")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(("name", "vendor"), [("sm75", "nvidia"), ("gfx906", "amd"), ("sm90", "amd"), ("", "nvidia")])
def test_an_unknown_architecture_lists_those_that_are_known(name: str, vendor: str) -> None:
    with pytest.raises(InvalidValue, match=r"there are for (sm80|gfx90a), "):
        find_target(name, vendor)


NOT_IMPORTED = """
import sys, time
began = time.process_time()
import lineshaft_{name}
from lineshaft.registry import discover
from lineshaft.errors import BackendUnavailable
try:
    discover().select("{name}")
except BackendUnavailable as error:
    print(error)
print(sorted({{"torch", "triton", "lineshaft_torch", "amdsmi", "pynvml"}} & set(sys.modules)))
print(time.process_time() - began)
"""


@pytest.mark.parametrize("name", ["cuda", "rocm"])
@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))) or Path("/dev/kfd").exists(), reason="has a GPU")
def test_a_named_backend_without_its_gpu_fails_soon_and_imports_no_tensor_library(name: str) -> None:
    code = NOT_IMPORTED.format(name=name)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    said, imported, seconds = done.stdout.strip().splitlines()
    assert said.startswith(f"backend '{name}' is not usable here: no ") and "interpret = true" in said
    assert imported == "[]"
    assert float(seconds) < 1  # of the processor, which the machine may give to others meanwhile
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("module", [cuda, rocm])
def test_a_probe_takes_no_time(module: object) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        module.probe()  # type: ignore[attr-defined]
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.05


@pytest.mark.parametrize(
    ("name", "tiles", "fp8"),
    [("sm90a", "sm90", True), ("sm_87", "sm80", False), ("sm86", "sm89", False), ("sm103", "sm100", True)],
)
def test_a_gpu_beside_the_listed_ones_takes_tiles_that_fit(name: str, tiles: str, fp8: bool) -> None:
    """sm86 has the shared memory of sm89, and no floats of eight bits."""
    found = find_target(name, "nvidia")
    assert (found.name, bool(found.fp8)) == (tiles, fp8)
