"""Feeds the CPU backend's native engine with random problems, page tables and numbers of threads.

    python tests/native/fuzz.py --seconds 60 [--level LEVEL] [--library FOLDER] [--seed N]

Every result is compared with the contract's reference. Run on a library that was built with a sanitizer
(`tests/native/sanitize.py`), it finds reads and writes out of bounds and races too: every array, those of an arena too,
is an allocation of its own here, so that whatever lies behind one belongs to none. Prints the seed of what fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lineshaft_conformance.checks import NotClaimed
from lineshaft_conformance.harness.op_case import prepare
from lineshaft_conformance.harness.paged import Layout, Miniature
from lineshaft_conformance.levels.ops import run_case
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.backends import Backend, World
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_cpu import native
from lineshaft_cpu.backend import NativeBackend
from lineshaft_cpu.engine.memory import Region
from lineshaft_cpu.engine.program import NativeProgram
from lineshaft_cpu.engine.tape import Tape
from lineshaft_cpu.options import CpuOptions

MOST_THREADS = 6
PAGE_SIZES = (1, 3, 8, 16, 32, 64)


def put_apart() -> None:
    """Give weights, caches, inputs, outputs and results memory of their own each."""

    def zeros(self: Region, shape: Sequence[int], dtype: str) -> HostArray:
        return np.zeros(tuple(shape), numpy_dtype(dtype))

    def place(self: NativeProgram, tape: Tape) -> int:
        for buffer in tape.lifetimes():
            buffer.held = np.zeros(buffer.nbytes, np.uint8)
            buffer.address = buffer.held.ctypes.data
        return 0

    Region.zeros = zeros  # type: ignore[method-assign]
    NativeProgram._place = place  # type: ignore[method-assign]


class Fuzzed(Subject):
    """The native engine over a library of one's own, with so many threads."""

    def __init__(self, library: native.Native, threads: int) -> None:
        super().__init__(Target("cpu"))
        self._library, self._threads = library, threads

    @cached_property
    def backend(self) -> Backend:
        return NativeBackend(CpuOptions(), World(threads=self._threads), self._library)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--level", default="auto")
    parser.add_argument("--library", type=Path, default=native.PACKAGE)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each further one has the next")
    args = parser.parse_args()
    library = native.load(args.level, args.library)
    put_apart()
    end, seed, done = time.monotonic() + args.seconds, args.seed, 0
    while time.monotonic() < end:
        try:
            done += fuzz_ops(library, seed) + fuzz_pages(library, seed)
        except BaseException:
            print(f"level {library.level}: seed {seed} fails", file=sys.stderr)
            raise
        seed += 1
    print(f"level {library.level}: {done} problems of the seeds {args.seed} to {seed - 1}, none failed")
    return 0


def fuzz_ops(library: native.Native, seed: int) -> int:
    """A random problem of every op that makes some, on a random number of threads; returns how many ran."""
    subject = Fuzzed(library, 1 + seed % MOST_THREADS)
    done = 0
    for spec in subject.ops.values():
        if spec.fuzz is None or spec.collective:
            continue
        values = [prepare(spec, spec.fuzz(np.random.default_rng([seed, turn]), seed)) for turn in range(2)]
        try:
            run_case(subject, spec, values)
            done += 1
        except NotClaimed:
            continue
    subject.close()
    return done


def fuzz_pages(library: native.Native, seed: int) -> int:
    """Rows that come, grow, share pages and go at random over a cache; returns how many steps were checked."""
    rng = np.random.default_rng([seed, 9])
    subject = Fuzzed(library, 1 + int(rng.integers(MOST_THREADS)))
    size, dim = int(rng.choice(PAGE_SIZES)), int(rng.choice((16, 32, 64)))
    columns = -(-96 // size)
    layout = Layout(page_size=size, columns=columns, pages=1 + 4 * columns, dim=dim)
    dtype = str(rng.choice(("float32", "bfloat16")))
    steps = 12
    with Miniature(subject, dtype, layout, ((4, 4), (24, 4)), seed=seed) as model:
        for _ in range(steps):
            if len(model.rows) < 4 and rng.random() < 0.5:
                model.add()
            rows = [row for row in model.rows if row.length < 72] or [model.add()]
            work = [(row, int(rng.choice((1, 1, 2, 5)))) for row in rows]
            model.step(*work)
            for row in [row for row in model.rows if row.length >= 72 or rng.random() < 0.1]:
                model.drop(row)
        model.check_pages()
    return steps


if __name__ == "__main__":
    sys.exit(main())
