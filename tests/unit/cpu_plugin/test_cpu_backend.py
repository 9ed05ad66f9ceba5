"""The CPU backend: what it says of itself and of its memory, and its composites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lineshaft_contract.backends import World
from lineshaft_contract.errors import Unsupported
from lineshaft_cpu.backend import NativeBackend, TorchBackend, create, note
from lineshaft_cpu.options import CpuOptions
from lineshaft_torch.host_memory import HostMemory

GIB = 2**30


def test_sessions_take_their_threads_from_the_world() -> None:
    before = torch.get_num_threads()
    try:
        session = create(CpuOptions(program="eager", functional=True), World(threads=1)).session(0)
        assert torch.get_num_threads() == 1
        assert session.options.program == "eager" and session.options.functional
        session.close()
    finally:
        torch.set_num_threads(before)


OF_TORCH: dict[str, tuple[dict[str, Any], World, str]] = {
    "several workers": ({}, World(axes=(("tp", 2),)), "one worker, not 2"),
    "eager": ({"program": "eager"}, World(), "program = 'eager' is of the torch engine"),
    "memory": ({"attention_memory_mib": 1}, World(), "attention_memory_mib = 1 is of the torch engine"),
    "functional": ({"functional": True}, World(), "functional = True is of the torch engine"),
    "no kernels": ({"native": "off"}, World(), "switched off"),
}


@pytest.mark.parametrize(("options", "world", "why"), OF_TORCH.values(), ids=OF_TORCH)
def test_the_native_engine_is_taken_where_it_can_be(options: dict[str, Any], world: World, why: str) -> None:
    assert isinstance(create(CpuOptions(), World()), NativeBackend)
    assert isinstance(create(CpuOptions(engine="torch"), World()), TorchBackend)
    taken = create(CpuOptions(**options), world)
    assert isinstance(taken, TorchBackend)
    (note,) = taken.capabilities.notes
    assert note.startswith("engine torch: ") and why in note
    with pytest.raises(Unsupported, match=why.replace("(", r"\(")):
        create(CpuOptions(engine="native", **options), world)


def test_a_plan_names_the_level_that_runs_and_those_that_are_only_compiled() -> None:
    (said,) = create(CpuOptions(native="portable"), World()).capabilities.notes
    assert said.startswith("engine native, level portable")
    assert note("avx2", ()) == "engine native, level avx2"
    assert note("avx2", ("amx", "avx512")) == "engine native, level avx2; compiled, not executed here: amx, avx512"


def test_options_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="program"):
        CpuOptions(program="graph")
    with pytest.raises(ValidationError, match="thread"):
        CpuOptions(thread=3)


def test_kernels_have_unique_names_and_the_memory_budget_of_the_options() -> None:
    kernels = create(CpuOptions(engine="torch", attention_memory_mib=1), World()).kernels()
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    from lineshaft_contract.problems import AttendProblem

    problem = AttendProblem(
        dtype="float32", kv_dtype="float32", q_heads=8, kv_heads=8, qk_dim=64, v_dim=64, page_size=16, scale=1.0,
        tokens=256, rows=1, pages=16, max_query=256,
    )  # fmt: skip
    portable = next(kernel for kernel in kernels if kernel.name == "torch_attend")
    assert "exceed its budget of 1 MiB" in str(portable.supports(problem))


def machine(folder: Path, total: int, free: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {free // 1024} kB\n")
    return path


def test_memory_is_the_machines_without_a_control_group(tmp_path: Path) -> None:
    assert HostMemory(machine(tmp_path, 8 * GIB, 6 * GIB), tmp_path).total_free() == (8 * GIB, 6 * GIB)


def test_a_control_groups_limit_counts_without_file_pages_it_can_drop(tmp_path: Path) -> None:
    meminfo = machine(tmp_path, 8 * GIB, 6 * GIB)
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert HostMemory(meminfo, tmp_path).total_free() == (4 * GIB, 2 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert HostMemory(meminfo, tmp_path).total_free() == (8 * GIB, 6 * GIB)


def test_an_old_control_group_without_a_limit_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(str(GIB))
    meminfo = machine(tmp_path, 8 * GIB, 6 * GIB)
    assert HostMemory(meminfo, tmp_path).total_free() == (8 * GIB, 6 * GIB)


def test_a_system_that_does_not_tell_gives_none(tmp_path: Path) -> None:
    assert HostMemory(tmp_path / "nothing", tmp_path).total_free() is None
