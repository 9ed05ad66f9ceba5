"""The threads of the CPU backend's native engine, by themselves: many short tapes, on fewer and more threads than there
are processors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "plugins" / "cpu" / "native"


@pytest.mark.parametrize(("flags", "tapes"), [(["-O2"], 20_000), (["-O1", "-g", "-fsanitize=thread"], 2_000)])
def test_every_item_runs_once_and_in_its_step(flags: list[str], tapes: int, tmp_path: Path) -> None:
    program = tmp_path / "stress"
    sources = [HERE / "team_stress.c", NATIVE / "team.c"]
    subprocess.run(["cc", *flags, "-std=gnu11", f"-I{NATIVE}", *sources, "-o", program, "-pthread"], check=True)
    for threads in (1, 2, 3, 8):
        command = [program, str(threads), str(tapes)]
        if "-fsanitize=thread" in flags:
            command = ["setarch", "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{threads} threads: {done.stderr[-2000:]}"
