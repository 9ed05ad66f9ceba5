"""What the probes of cuda and rocm say of machines with GPUs and without, and what they must not import or do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
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
        ("MIG-", [3]), ("3", []), (",0", []), ("1.0", []),
    ],
)  # fmt: skip
def test_a_variable_leaves_what_the_driver_would_leave(setting: str | None, left: list[int]) -> None:
    assert visible(setting, 3, ["GPU-a1", "GPU-b2", "GPU-a3", "MIG-9"]) == left


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


def test_without_a_gpu_the_reason_says_what_was_looked_for_and_what_to_choose(tmp_path: Path) -> None:
    found = on("libnothing-of-this-name.so", dev=tmp_path, module=tmp_path / "version")
    assert not found.usable and found.runs_with({"interpret": "true"})
    for word in (
        f"{tmp_path}/nvidia*: none",
        "is absent",
        "libnothing",
        '"cpu"',
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
        ((), ROCM_TORCH, 'choose backend = "cpu"'),
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


def test_a_version_is_compared_by_numbers() -> None:
    assert numbers("2.10.0+cu128") == (2, 10, 0) and numbers("nightly") == ()
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
began = time.perf_counter()
import lineshaft_{name}
from lineshaft.registry import discover
from lineshaft.errors import BackendUnavailable
try:
    discover().select("{name}")
except BackendUnavailable as error:
    print(error)
print(sorted({{"torch", "triton", "lineshaft_torch", "amdsmi", "pynvml"}} & set(sys.modules)))
print(time.perf_counter() - began)
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
    assert float(seconds) < 1 and time.monotonic() - began < 5


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
