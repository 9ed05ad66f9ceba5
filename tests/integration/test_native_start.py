"""What a start of the native engine does without: libraries that take longer to import than the model to load."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.integration.conftest import SMOLLM2
from tests.integration.processes import SECONDS, environment

SCRIPT = """
import sys
from lineshaft.cli.main import main
failed = main()
print("imported:", *sorted({"torch", "gguf"} & sys.modules.keys()))
sys.exit(failed)
"""
SMALL = ("--set", "scheduler.token_budget=64", "--set", "scheduler.max_rows=2", "--set", "max_model_len=256")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_torch_is_imported_to_generate(dtype: str) -> None:
    arguments = (
        "generate", "--model", SMOLLM2, "--backend", "cpu", "--backend-option", "engine=native", *SMALL,
        "--set", f"dtype={dtype}", "--prompt", "What is the opposite of hot?", "--max-tokens", "3",
        "--temperature", "0", "--quiet",
    )  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    text, found = done.stdout.rsplit("\n", 2)[:2]
    assert text.startswith("The opposite of")  # by far the likeliest in any dtype
    assert found == "imported:"
