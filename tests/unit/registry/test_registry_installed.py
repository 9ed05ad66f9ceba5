"""Plugins as they are installed: real metadata on the path, and the CPU plugin's probe in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPORT = """
import json, sys
from lineshaft.registry import discover
registry = discover()
print(json.dumps({
    "backends": [[status.name, status.distribution, status.version] for status in registry.status()],
    "rejected": [[item.plugin, item.distribution, item.reason] for item in registry.rejected],
}))
"""

PROBE = """
import json, sys, time
from lineshaft_cpu.probe import probe
start = time.perf_counter()
found = probe()
seconds = time.perf_counter() - start
print(json.dumps({"usable": found.usable, "seconds": seconds, "torch": "torch" in sys.modules, "why": found.reason}))
"""


def python(code: str, *paths: Path) -> Any:
    """What the code prints as JSON, in a new process that finds modules in `paths` first."""
    found = [*map(str, paths), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {found!r}\n{code}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def distribution(folder: Path, name: str, code: str) -> None:
    module = name.replace("-", "_")
    metadata = folder / f"{module}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(f"[lineshaft.backends]\n{name} = {module}\n")
    (folder / f"{module}.py").write_text(code)


def test_plugins_are_found_by_their_metadata(tmp_path: Path) -> None:
    good = """
from lineshaft_contract.backends import BackendInfo
from lineshaft_contract.hooks import hookimpl
@hookimpl
def lineshaft_backends():
    return [BackendInfo(name="widget", probe="x:y", factory="x:z")]
"""
    distribution(tmp_path, "good-plugin", good)
    distribution(tmp_path, "bad-plugin", "import a_module_that_nobody_has")
    report = python(REPORT, tmp_path)
    assert ["widget", "good-plugin", "1.5"] in report["backends"]
    (rejected,) = [item for item in report["rejected"] if item[1] == "bad-plugin"]
    assert "a_module_that_nobody_has" in rejected[2]


def test_the_cpu_probe_is_quick_and_imports_no_tensor_library() -> None:
    runs = [python(PROBE) for _ in range(3)]
    assert not any(run["torch"] for run in runs)
    assert all(run["usable"] for run in runs)
    assert min(run["seconds"] for run in runs) < 0.05  # the best of three: others may be held up by the machine
