"""Starting a backend: which GPU a rank takes, what is registered for it, and what is said where it cannot start. What
torch says of GPUs is faked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lineshaft.errors import BackendUnavailable, InvalidValue, LayoutError
from lineshaft_contract.backends import World
from lineshaft_contract.problems import KVProblem
from lineshaft_cuda import backend as cuda
from lineshaft_cuda.options import CudaOptions
from lineshaft_rocm import backend as rocm
from lineshaft_rocm.options import RocmOptions
from lineshaft_torch.fake import UNTOLD, FakeDevice
from lineshaft_torch.host_memory import HostMemory
from lineshaft_triton import starting
from lineshaft_triton.backend import GpuBackend, capabilities_of, installed
from lineshaft_triton.targets import TARGETS

TWO = World(1, (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2)))


class Device(FakeDevice):
    """Stands in for a TorchDevice, and so counts as a real one where it is given to a backend."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch see so many GPUs of one kind."""

    def see(count: int = 2, capability: tuple[int, int] = (9, 0), arch: str = "gfx942:sramecc+:xnack-") -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(gcnArchName=arch))
        monkeypatch.setattr(starting, "TorchDevice", Device)

    return see


@pytest.mark.parametrize(
    ("capability", "target"),
    [((9, 0), "sm90"), ((8, 6), "sm89"), ((8, 9), "sm89"), ((10, 3), "sm100"), ((12, 1), "sm120")],
)
def test_the_gpu_that_is_there_is_the_target(
    gpus: Callable[..., None], capability: tuple[int, int], target: str
) -> None:
    gpus(capability=capability)
    made = cuda.create(CudaOptions(), World())
    assert made.target.name == target and made.layer.number == 0  # type: ignore[attr-defined]


def test_amds_gpus_are_known_by_name(gpus: Callable[..., None]) -> None:
    gpus(arch="gfx1201")
    assert rocm.create(RocmOptions(), World()).target.name == "gfx1201"


def test_a_gpu_without_kernels_is_refused_with_those_there_are(gpus: Callable[..., None]) -> None:
    gpus(capability=(7, 5), arch="gfx906:sramecc-")
    with pytest.raises(InvalidValue, match=r"'sm75'; there are for sm80, sm89, sm90, sm100, sm120"):
        cuda.create(CudaOptions(), World())
    with pytest.raises(InvalidValue, match=r"'gfx906:sramecc-'; there are for gfx90a, gfx942"):
        rocm.create(RocmOptions(), World())


def test_each_rank_takes_a_gpu_of_its_own(gpus: Callable[..., None]) -> None:
    gpus(count=4)
    assert cuda.create(CudaOptions(), TWO).layer.number == 1  # type: ignore[attr-defined]
    assert cuda.create(CudaOptions(devices=(3, 0)), TWO).layer.number == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("devices", "says"),
    [((), "2 ranks, one on a GPU each, and 1 are visible"), ((0,), "devices names 1"), ((0, 5), "devices names GPU 5")],
)
def test_fewer_gpus_than_ranks_are_refused(gpus: Callable[..., None], devices: tuple[int, ...], says: str) -> None:
    gpus(count=1)
    with pytest.raises(LayoutError, match=says):
        cuda.create(CudaOptions(devices=devices), TWO)


def test_a_driver_that_torch_cannot_start_is_said(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's age is what a fake says."""
    gpus()

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(BackendUnavailable, match=r"too old \(found version 11040\). Please update.*interpret = true"):
        cuda.create(CudaOptions(), World())


def test_a_torch_for_other_devices_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(BackendUnavailable, match="built without CUDA"):
        cuda.create(CudaOptions(), World())
    with pytest.raises(BackendUnavailable, match="built without ROCm"):
        rocm.create(RocmOptions(), World())


@pytest.mark.parametrize(("text", "devices"), [("0,1", (0, 1)), ("[2, 0]", (2, 0)), ("3", (3,)), ("", ()), ("[]", ())])
def test_devices_may_be_text_as_variables_and_the_command_line_have_it(text: str, devices: tuple[int, ...]) -> None:
    assert CudaOptions.model_validate({"devices": text}).devices == devices
    with pytest.raises(ValidationError, match="valid integer"):
        CudaOptions.model_validate({"devices": f"{text},a"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"program": "jit"}, "graph"), ({"devices": (0, 0)}, "twice"), ({"devices": (-1,)}, "greater than or equal"),
        ({"interpret": True, "devices": (0,)}, "with interpret = true there are none"),
        ({"target": "sm80"}, "target is for interpret"), ({"interpret": True, "target": "sm75"}, "'sm80'"),
        ({"interpret": True, "target": "gfx942"}, "'sm80'"), ({"attention_memory_mib": 0}, "greater than"),
        ({"program": "eager", "overlap_communication": True}, "needs recorded calls"), ({"pages": 3}, "not permitted"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CudaOptions(**options)


@pytest.mark.parametrize(
    ("target", "flavour"),
    [
        ("sm80", None), ("sm89", "float8_e4m3fn"), ("sm90", "float8_e4m3fn"), ("sm100", "float8_e4m3fn"),
        ("sm120", "float8_e4m3fn"), ("gfx90a", None), ("gfx942", "float8_e4m3fnuz"), ("gfx950", "float8_e4m3fn"),
        ("gfx1100", None), ("gfx1201", "float8_e4m3fn"),
    ],
)  # fmt: skip
def test_pages_hold_the_floats_of_eight_bits_that_the_target_reads(target: str, flavour: str | None) -> None:
    eight = [dtype for dtype in capabilities_of(TARGETS[target]).kv_dtypes if dtype.startswith("float8")]
    assert eight == ([flavour] if flavour else [])


def interpreted() -> GpuBackend:
    return GpuBackend("cuda", CudaOptions(interpret=True), World(), TARGETS["sm90"], FakeDevice(), cuda.libraries)


def test_products_of_the_vendor_compete_with_this_kits_on_a_device_alone() -> None:
    real = GpuBackend("cuda", CudaOptions(), World(), TARGETS["sm90"], SimpleNamespace(), cuda.libraries)  # type: ignore[arg-type]
    assert not interpreted().real and real.real
    found = [recipe("cuda") for recipe in installed(cuda.libraries(TARGETS["sm90"]))]
    (cublas,) = [made for made in found if "cublas" in made.name]
    assert cublas.tunable and cublas.priority == 20 and cublas.layout == "dense"


def test_memory_is_that_of_the_device_and_under_the_interpreter_the_hosts() -> None:
    total, free = interpreted().memory.total_free() or (0, 0)
    assert 0 < free <= total < UNTOLD and total == (HostMemory().total_free() or (0, 0))[0]
    layer = SimpleNamespace(memory=lambda: (80, 70), synchronize=lambda: None)
    real = GpuBackend("cuda", CudaOptions(), World(), TARGETS["sm90"], layer, cuda.libraries)  # type: ignore[arg-type]
    assert real.memory.total_free() == (80, 70)
    problem = KVProblem(dtype="bfloat16", kv_dtype="bfloat16", kv_heads=2, qk_dim=64, v_dim=64, page_size=16)
    assert real.memory.page_bytes(problem) == problem.page_bytes
