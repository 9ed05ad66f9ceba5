"""Whether a build for debugging stops at an id of a page or a slot that the cache does not have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.native import sanitize

from lineshaft_cpu import native

CALL = """
import ctypes, sys
from pathlib import Path
import numpy as np
from lineshaft_cpu import native
from lineshaft_cpu.engine.kernels import attention, heads
from lineshaft_cpu.engine.tape import functions

def call(job, **fields):
    given = {name: x.ctypes.data if isinstance(x, np.ndarray) else x for name, x in fields.items()}
    made, scratch = job.struct(**given), np.zeros(library.value("flash_scratch", ctypes.c_int64) + 64, np.uint8)
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(functions(library, job)[0])
    body(ctypes.addressof(made), 0, scratch.ctypes.data + -scratch.ctypes.data % 64)

library, what, index = native.load("portable", Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
pages, x = np.zeros((3, 1, 32, 32), np.float32), np.ones((1, 1, 32), np.float32)
one = {"q": x, "k": pages, "v": pages, "out": x.copy(), "starts": np.array([0, 1], np.int32), "rows": 1, "tokens": 1,
       "lens": np.array([1], np.int32), "table": np.array([index], np.int32), "pages": 1, "q_stride": 32, "held": 3,
       "q_heads": 1, "kv_heads": 1, "qk_dim": 32, "v_dim": 32, "page_size": 32, "causal": 1, "scale": 1.0}
if what == "flash":
    call(attention.FLASH, **one, block=1, splits=1, kind=heads.NUMBERS)
if what == "attend":
    call(attention.ATTEND, **one, v_stride=32, whole=1, group=1, heads=1, parts=1, queries=1, key_heads=1, shares=1)
if what == "put":
    call(heads.PUT, rows=1, times=1, grain=1, keys=pages, values=pages, k=x, v=x, slots=np.array([index], np.int32),
         page_size=32, heads=1, k_dim=32, page_v_dim=32, page_slots=96, kind=heads.NUMBERS)
if what == "write":
    call(heads.WRITE, rows=1, times=1, grain=1, x=x, pages=pages, slots=np.array([index], np.int32), bytes=128,
         stride=128, held=96)
print("done")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library that checks indices, without a sanitizer."""
    folder = tmp_path_factory.mktemp("debug")
    hook: Any = sanitize.load_hook()
    hook.LEVELS = {level: hook.LEVELS[level] for level in ("portable", "amx_emulated")}
    hook.FLAGS = [*hook.FLAGS, "-O1", sanitize.DEBUG]
    assert not [note for note in hook.build(sanitize.PLUGIN / "native", folder) if note.startswith("portable")]
    return folder


def run(library: Path, what: str, index: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CALL, str(library), what, str(index)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("what", "last", "said"),
    [("flash", 2, "page"), ("attend", 2, "page"), ("put", 95, "slot"), ("write", 95, "slot")],
)
def test_a_bad_index_ends_the_process(library: Path, what: str, last: int, said: str) -> None:
    fine = run(library, what, last)
    assert (fine.returncode, fine.stdout) == (0, "done\n"), fine.stderr
    for index in (last + 1, -1):
        stopped = run(library, what, index)
        assert stopped.returncode < 0
        assert stopped.stderr == f"lineshaft: {said} {index} is given; allowed are 0 to {last}\n"


@pytest.mark.parametrize("sanitizer", sanitize.FLAGS)
def test_sanitized_builds_check_indices(sanitizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook: Any = sanitize.load_hook()
    built: list[list[str]] = []
    monkeypatch.setattr(hook, "build", lambda native, folder: built.append(hook.FLAGS))
    monkeypatch.setattr(sanitize, "load_hook", lambda: hook)
    sanitize.build(sanitizer, ["portable"], native.PACKAGE, tmp_path)
    assert sanitize.DEBUG in built[0]
