"""Builds the CPU backend's C library with a sanitizer and fuzzes it.

    python tests/native/sanitize.py address|thread [--seconds 60] [--levels portable,amx_emulated]

"address" adds the checks of undefined behaviour. The sanitizer's library is loaded before Python is, so that nothing
but ours has to be built for it; whatever it finds ends the run with an error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "cpu"
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"],
    "thread": ["-fsanitize=thread", "-g", "-O1"],
}
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0"},
}
DEBUG = "-DLINESHAFT_DEBUG"
"""Lets the kernels check ids of pages and slots themselves."""
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", choices=FLAGS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--levels", default="portable,amx_emulated")
    parser.add_argument("--native", type=Path, default=PLUGIN / "native", help="the sources")
    args = parser.parse_args()
    levels = args.levels.split(",")
    with TemporaryDirectory(prefix="lineshaft-sanitized-") as folder:
        compiler = build(args.sanitizer, levels, args.native, Path(folder))
        runtimes = " ".join(find(compiler, name) for name in RUNTIMES[args.sanitizer])
        for level in levels:
            fuzz = [sys.executable, ROOT / "tests" / "native" / "fuzz.py", "--level", level, "--library", folder]
            command = [*without_random_addresses(), *map(str, fuzz), "--seconds", str(args.seconds / len(levels))]
            variables = {"LD_PRELOAD": runtimes, **OPTIONS[args.sanitizer]}
            if status := subprocess.run(command, env={**os.environ, **variables}).returncode:
                print(f"{args.sanitizer} sanitizer, level {level}: status {status}", file=sys.stderr)
                return 1
    return 0


def build(sanitizer: str, levels: list[str], native: Path, folder: Path) -> list[str]:
    """Compile the library at these levels into `folder`; returns the compiler's command."""
    hook = load_hook()
    hook.LEVELS = {level: [*hook.LEVELS[level], *FLAGS[sanitizer]] for level in {*levels, "portable"}}
    hook.FLAGS = [*hook.FLAGS, *FLAGS[sanitizer], DEBUG]
    if notes := hook.build(native, folder):
        raise SystemExit(f"the library was not built for the {sanitizer} sanitizer: {'; '.join(notes)}")
    compiler: list[str] = hook.compiler()
    return compiler


def find(compiler: list[str], library: str) -> str:
    """Where the compiler has a library of its own."""
    return subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()


def load_hook() -> ModuleType:
    spec = spec_from_file_location("lineshaft_cpu_hatch_build", PLUGIN / "hatch_build.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_random_addresses() -> list[str]:
    """What the thread sanitizer needs on kernels that place libraries further apart than it expects."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    return ["setarch", machine, "-R"]


if __name__ == "__main__":
    sys.exit(main())
