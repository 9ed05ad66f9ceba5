"""The CPU backend: what it says of itself and of its memory, and its composites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lineshaft_contract.backends import World
from lineshaft_cpu.backend import create
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
