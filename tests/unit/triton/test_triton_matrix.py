"""The table of kernels and GPUs that is kept in the documentation: whole, and within what is asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lineshaft_conformance.matrix import COMPILED, DECLINES, load_matrix
from lineshaft_triton.interpreting import VARIABLE
from lineshaft_triton.targets import TARGETS

MATRIX = load_matrix(Path(__file__).parents[3] / "docs" / "kernels" / "gpu-matrix.json")
LISTED = "from lineshaft.cli.main import main; raise SystemExit(main(['kernels', 'list', '--json', '--backend', {!r}]))"
RENEW = "run the command in docs/kernels/gpu-matrix.md"


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_the_table_has_every_kernel_on_every_target(backend: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    listed = subprocess.run(
        [sys.executable, "-c", LISTED.format(backend)], capture_output=True, text=True, check=True, env=environment
    )
    names = {kernel["name"] for kernel in json.loads(listed.stdout) if kernel["name"].startswith("triton_")}
    assert names == set(MATRIX.kernels), RENEW
    assert MATRIX.targets == tuple(TARGETS)
    assert len(MATRIX.cells) == len(names) * len(TARGETS), RENEW


def test_each_cell_compiles_or_is_declined_with_a_reason_and_few_are() -> None:
    assert MATRIX.failures == ()
    assert MATRIX.count(DECLINES) <= 0.1 * len(MATRIX.cells)
    for cell in MATRIX.cells:
        assert cell.outcome == COMPILED or len(MATRIX.why(cell)) > 10, (cell.kernel, cell.target)


def test_no_default_spills_and_each_has_the_instructions_that_it_expects_and_fits_its_target() -> None:
    for cell in MATRIX.cells:
        if cell.outcome == COMPILED:
            figures, place = cell.compiled[0]["figures"], (cell.kernel, cell.target)
            assert figures["default"] == "no" or figures["spills"] == figures["stack_bytes"] == 0, place
            assert figures["found"] == figures["expected"] or figures["expected"] == "none", place
            assert figures["shared_bytes"] <= TARGETS[cell.target].shared and figures["registers"] > 0, place
            assert not figures["occupancy"].startswith("0/"), place
