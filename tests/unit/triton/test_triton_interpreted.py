"""Runs the tests under `interpreted/`, each file in a process whose kernels are interpreted, so that none here is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lineshaft_triton.interpreting import VARIABLE

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted_kernels(file: Path) -> None:
    environment = {**os.environ, VARIABLE: "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parents[4])
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "passed" in ran.stdout and "skipped" not in ran.stdout, ran.stdout
