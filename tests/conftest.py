"""What all tests need of the process that runs them, and distributions as if they were installed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Started in the background, a shell's job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Puts a distribution, of this repository or of a test, on the path as an installation would: its modules, and
    metadata with its entry points."""
    site = tmp_path / "site"
    site.mkdir()

    def put(folder: Path) -> None:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        shutil.copytree(folder / "src", site, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [
            line
            for group, points in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the processes that a test starts

    yield put
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(site):
            del sys.modules[name]
