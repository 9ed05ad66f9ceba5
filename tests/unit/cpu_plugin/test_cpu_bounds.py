"""The loops of `native/bounds.c`: they read what they say, name their instructions, and refuse in words."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lineshaft.errors import Unsupported
from lineshaft_cpu import native
from lineshaft_cpu.bounds import KINDS, arithmetic, read_seconds

RUNS = [level for level in native.LEVELS if native.reason(level) is None]
SIZE = 64 * mmap.PAGESIZE
BY_LEVEL = {"amx": "AMX TDPBF16PS", "avx512_bf16": "VDPBF16PS", "avx512": "float32 FMA", "avx2": "float32 FMA"}


def resident(file: Path) -> int:
    """Bytes of a mapped file that this process has touched, as Linux tells."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(file)))
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])


@pytest.mark.parametrize("level", RUNS)
@pytest.mark.parametrize("threads", [1, 3])
def test_all_is_read(level: str, threads: int, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(SIZE))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), SIZE, access=mmap.ACCESS_READ) as mapped:
        assert resident(file) == 0
        assert read_seconds(native.load(level), np.frombuffer(mapped, np.uint8), threads) > 0
        assert resident(file) == SIZE


@pytest.mark.parametrize("level", RUNS)
@pytest.mark.parametrize("size", [0, 1, 511, 513, 100_003])
def test_any_number_of_bytes_can_be_read(level: str, size: int) -> None:
    assert read_seconds(native.load(level), np.ones(size, np.uint8), 4) >= 0


@pytest.mark.parametrize("level", RUNS)
@pytest.mark.parametrize("dtype", KINDS)
def test_arithmetic_has_a_rate_and_a_name(level: str, dtype: str) -> None:
    rate, how = arithmetic(native.load(level), dtype, 2, 1e-4)
    assert rate > 0 and how
    if dtype == "bfloat16" and level in BY_LEVEL:
        assert how == BY_LEVEL[level]


@pytest.mark.parametrize("threads", [-1, 0, 1025])
def test_threads_that_cannot_be_had_are_refused(threads: int) -> None:
    with pytest.raises(Unsupported, match=f"{threads} threads cannot be had"):
        read_seconds(native.load(), np.ones(4096, np.uint8), threads)
    with pytest.raises(Unsupported, match="--threads"):
        arithmetic(native.load(), "float32", threads, 1e-4)


def test_a_dtype_without_a_loop_is_refused() -> None:
    with pytest.raises(Unsupported, match="only in float32, bfloat16, int8"):
        arithmetic(native.load(), "float16", 1, 1e-4)


def test_no_tensor_library_is_imported() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; import lineshaft_cpu.bounds; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
