"""Whether the sanitizers see what they are run for: faults of each kind, put into a copy of the sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "plugins" / "cpu" / "native"


TAKEN = "atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed)"
FAULTS = {
    "written behind": ("address", "rows.h", "memset(to, 0, j->bytes);", "memset(to, 0, j->bytes + 1);", "overflow"),
    "divided by 0": ("address", "heads.h", "at = slot % size;", "at = slot % (size - size);", "division by zero"),
    "taken twice": ("thread", "team.c", TAKEN, "(*(volatile int64_t *)&team->next)++", "data race"),
}


@pytest.mark.parametrize(("sanitizer", "file", "right", "wrong", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(sanitizer: str, file: str, right: str, wrong: str, says: str, tmp_path: Path) -> None:
    sources = tmp_path / "native"
    shutil.copytree(NATIVE, sources)
    text = (sources / file).read_text()
    assert right in text
    (sources / file).write_text(text.replace(right, wrong))
    command = [sys.executable, HERE / "sanitize.py", sanitizer, "--native", sources, "--levels", "portable"]
    done = subprocess.run([*command, "--seconds", "30"], capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert says in done.stdout + done.stderr
