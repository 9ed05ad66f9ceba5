"""A plugin `toy` that is installed for a test: the reference backend, and whatever the option `does` makes it do."""

from __future__ import annotations

from pathlib import Path

import pytest

PLUGIN = """
import os, time
from dataclasses import replace
from pydantic import BaseModel
from lineshaft_contract.backends import BackendInfo, BackendKind, Probe
from lineshaft_contract.hooks import hookimpl
from lineshaft_contract.reference.backend import create, probe

class Options(BaseModel):
    does: str = ""

@hookimpl
def lineshaft_backends():
    return [BackendInfo("toy", "toy:probe", "toy:factory", "toy:Options", kind=BackendKind.HOST)]

def die(*_):
    import ctypes
    print("last thing said", flush=True)
    ctypes.string_at(0)

def refuse(*_):
    raise RuntimeError("two\\nlines")

def hang(*_):
    while True:
        time.sleep(0.01)

class Toy:
    def __init__(self, base, does):
        self.base, self.does = base, does
    def __getattr__(self, name):
        return getattr(self.base, name)
    @property
    def capabilities(self):
        claimed = self.base.capabilities
        return replace(claimed, dtypes=("bfloat16",)) if self.does == "no f32" else claimed
    def kernels(self):
        if self.does == "kernels raise":
            refuse()
        return [self.changed(kernel) if kernel.op == "add" else kernel for kernel in self.base.kernels()]
    def changed(self, kernel):
        if self.does == "supports raises":
            return replace(kernel, supports=refuse)
        if self.does == "kernel raises":
            return replace(kernel, bind=lambda problem, session: refuse)
        if self.does == "kernel dies":
            return replace(kernel, bind=lambda problem, session: die)
        if self.does == "declines without a reason":
            return replace(kernel, supports=lambda problem: "")
        return kernel

def object_to(*_):
    from lineshaft.errors import InvalidValue
    class Odd(InvalidValue):
        pass
    raise Odd("odd option")

def factory(options, world):
    acts = {"factory objects": object_to, "factory raises": refuse, "factory dies": die, "factory hangs": hang}
    acts.get(options.does, lambda: 0)()
    return Toy(create(None, world), options.does)
"""

CHECKS = """
import os, subprocess, sys, time
from lineshaft_conformance.checks import Check, Found, Failure, NotClaimed
import numpy as np
import toy

def held(subject, seed):
    return Found(kernels=("toy.k",), outputs=[np.arange(3, dtype=np.float32)], notes=(f"pid {os.getpid()}",))

def prints(subject, seed):
    print('{"done": {}}')
    os.write(1, b"raw bytes \\xff\\n")
    return Found()

def wrong(subject, seed):
    raise Failure("2 of 3 values differ")

def declines(subject, seed):
    raise NotClaimed("no such dtype")

def silent(subject, seed):
    raise NotClaimed()

def leaves(subject, seed):
    sys.exit(4)

def ends(subject, seed):
    print("bye")
    os._exit(3)

def flaky(subject, seed):
    if seed % 2:
        raise Failure(f"odd seed {seed}")
    return Found()

def times(subject, seed):
    time.sleep(0.2)
    return Found(notes=(f"at {time.monotonic()}",))

RUNS = dict(
    held=held, prints=prints, wrong=wrong, refuse=toy.refuse, declines=declines, silent=silent, leaves=leaves,
    ends=ends, die=toy.die, hang=toy.hang, after=held,
)

def collect(subject, size, level):
    for name, run in RUNS.items():
        yield Check(f"L1/{'b' if name > 'f' else 'a'}/{name}", run, op="toy", limit=1.0 if name == "hang" else 30.0)

def collect_flaky(subject, size, level):
    yield Check("L1/a/flaky", flaky)
    yield Check("L1/a/steady", held)
    yield Check("L1/a/declined", declines)

def flood(subject, seed):
    while True:
        os.write(1, b"x" * 4096)
        time.sleep(0.001)

def strays(subject, seed):
    import faulthandler
    faulthandler.cancel_dump_traceback_later()
    os.setpgid(0, os.getpgid(os.getppid()))
    time.sleep(600)

def collect_rebels(subject, size, level):
    yield Check("L1/a/flood", flood, limit=2.0)
    yield Check("L1/a/strays", strays, limit=1.0)
    yield Check("L1/a/held", held)

def collect_speed(subject, size, level):
    for number in range(2):
        yield Check(f"L5/speed/{number}", times)
    for number in range(4):
        yield Check(f"L1/a{number}/{number}", times)

def collect_stuck(subject, size, level):
    def stuck(subject, seed):
        child = subprocess.Popen(["sleep", "600"])
        with open(os.environ["TOY_PIDS"], "a") as file:
            print(os.getpid(), child.pid, file=file, flush=True)
        import ctypes
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
    for number in range(2):
        yield Check(f"L1/a{number}/stuck", stuck, limit=600.0)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs the plugin `toy`; returns the folder with its module."""
    metadata = tmp_path / "toy-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text("[lineshaft.backends]\ntoy = toy\n")
    (tmp_path / "toy.py").write_text(PLUGIN)
    (tmp_path / "toy_checks.py").write_text(CHECKS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path
