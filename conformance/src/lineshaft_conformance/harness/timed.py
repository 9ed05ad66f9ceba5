"""Small programs to be timed on the subject, on one host thread, and the roofline that the subject itself shows.

Nothing about speed is declared: bandwidth and FLOP/s are those of a large `copy_pages` and large `linear`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lineshaft.plan import ProgramSpec
from lineshaft_conformance.harness.op_case import NO_STEP
from lineshaft_conformance.harness.rig import Rig, whole_param
from lineshaft_conformance.harness.timing import seconds
from lineshaft_conformance.subject import Subject
from lineshaft_contract.backends import Backend, World
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import (
    AttendProblem,
    EmbedProblem,
    KVProblem,
    LinearProblem,
    NormProblem,
    PointwiseProblem,
    Problem,
    SampleProblem,
)
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import InputField, InputLayout, StepShape, forward_inputs
from lineshaft_contract.weights import Array

Run = Callable[[], object]
WIDTH, HEADS, DIM = 2048, 8, 64
ROUNDS = 15
SMALLEST, LARGEST = 8 << 20, 512 << 20
"""Bytes that a timed program moves at least, and at most."""
SHADOW = 20
"""A timed program takes so many times longer than an empty one, so that calling it hides nothing."""


@dataclass(frozen=True)
class Timed:
    """A captured program and one call of it, which waits for the result; the least that it must move and compute."""

    rig: Rig
    run: Run
    moved: int = 0
    flops: int = 0
    kernels: tuple[str, ...] = ()

    def close(self) -> None:
        self.rig.session.close()


def interleaved(runs: Sequence[Run], rounds: int = ROUNDS) -> list[float]:
    """The least seconds that each took in so many rounds of all of them, after one that does not count."""
    for run in runs:
        run()
    taken = [[seconds(run) for run in runs] for _ in range(rounds)]
    return [min(column) for column in zip(*taken, strict=True)]


class Timer:
    """Makes timed programs of a subject in its preferred dtype, and holds the probes of its roofline."""

    def __init__(self, subject: Subject, dtype: str) -> None:
        self.subject, self.dtype = subject, dtype
        self.element = numpy_dtype(dtype)
        self.page_size = subject.capabilities.default_page_size
        self.backend: Backend = subject.start(World(threads=1))
        self.empty = self.program({"x": self.ones(1, 8)}, lambda ops, w, step: ops.add(step["x"], step["x"]))
        self.nbytes, self.stream = self._large_stream()
        side = 512 * max(1, round((self.nbytes / SMALLEST) ** (1 / 3)))
        self.product = self.linear(side, side, side)
        self.copy = self._copy()

    def _large_stream(self) -> tuple[int, Timed]:
        """A product with one row, which reads its weight once: doubled until an empty program is nothing beside it."""
        nbytes = SMALLEST
        while True:
            stream = self.linear(1, nbytes // (WIDTH * self.element.itemsize), WIDTH)
            empty, taken = interleaved([self.empty.run, stream.run], 5)
            if taken > SHADOW * empty or nbytes == LARGEST:
                return nbytes, stream
            stream.close()
            nbytes *= 2

    def bound(self, timed: Timed) -> tuple[float, float]:
        """(least seconds by the roofline, seconds taken), all measured in the same rounds."""
        runs = [self.stream.run, self.copy.run, self.product.run, timed.run]
        stream, copy, product, taken = interleaved(runs)
        bandwidth = max(self.stream.moved / stream, self.copy.moved / copy)
        return max(timed.moved / bandwidth, timed.flops * product / self.product.flops), taken

    def close(self) -> None:
        for timed in (self.empty, self.stream, self.product, self.copy):
            timed.close()

    # ---- programs ----------------------------------------------------------------------------------------------

    def ones(self, *shape: int) -> HostArray:
        """Values of no meaning."""
        return np.ones(shape, self.element)

    @property
    def rows(self) -> int:
        """Rows of WIDTH values in as many bytes as the roofline's own programs move."""
        return self.nbytes // (WIDTH * self.element.itemsize)

    def program(
        self,
        inputs: Mapping[str, HostArray],
        function: Callable[[Any, Any, Mapping[str, Array]], Array],
        weights: Mapping[str, tuple[HostArray, Mapping[str, Problem]]] | None = None,
        work: tuple[str, Problem] | None = None,
    ) -> Timed:
        """One function of (ops, weights, inputs) with one result, of which a corner comes to the host. `work` is the op
        and the problem whose bytes and operations count."""

        def fn(ops: Any, params: Any, caches: Any, step: Any, arrays: Any) -> Any:
            out = function(ops, params, step.arrays)
            return {"out": out, "corner": out[:1, :1] if len(out.shape) == 2 else out[:1]}, caches

        given = weights or {}
        rig = self._rig(
            ProgramSpec("timed", fn, NO_STEP, layout_of(inputs), host_outputs=frozenset({"corner"})),
            params={name: whole_param(name, array, problems) for name, (array, problems) in given.items()},
            values={name: array for name, (array, _) in given.items()},
        )
        host, program = rig.host(inputs), rig.programs[0]
        return Timed(rig, lambda: program(host).result("corner"), *self._work(work), rig.kernels)

    def _work(self, work: tuple[str, Problem] | None) -> tuple[int, int]:
        """(bytes, operations) as the op's OpSpec counts them."""
        if work is None:
            return 0, 0
        spec, problem = self.subject.ops[work[0]], work[1]
        return int(spec.moved(problem)), int(spec.flops(problem))

    def _rig(self, program: ProgramSpec, **more: Any) -> Rig:
        kernels, session = self.subject.kernels_of(self.backend), self.backend.session(0)
        return Rig(self.subject, [program], kernels=kernels, session=session, **more)

    def linear(self, m: int, n: int, k: int) -> Timed:
        """x [m, k] times a weight [n, k]."""
        problem = LinearProblem(dtype=self.dtype, n=n, k=k)
        work = "linear", replace(problem, m=m)
        return self.program(
            {"x": self.ones(m, k)}, lambda ops, w, step: ops.linear(step["x"], w["w"]),
            {"w": (self.ones(n, k), {"linear": problem})}, work,
        )  # fmt: skip

    def norm(self, rows: int) -> Timed:
        problem = NormProblem(dtype=self.dtype, width=WIDTH, eps=1e-5)
        work = "rms_norm", replace(problem, rows=rows)
        return self.program(
            {"x": self.ones(rows, WIDTH)}, lambda ops, w, step: ops.rms_norm(step["x"], w["w"]),
            {"w": (self.ones(WIDTH), {"norm": problem})}, work,
        )  # fmt: skip

    def embed(self, vocab: int) -> Timed:
        """The same 16 tokens of the first rows, out of any vocabulary."""
        problem = EmbedProblem(dtype=self.dtype, vocab=vocab, width=WIDTH)
        inputs = {"ids": np.arange(16, dtype=np.int32), "start": np.zeros(1, np.int32)}
        return self.program(
            inputs, lambda ops, w, step: ops.embed(step["ids"], w["w"], step["start"]),
            {"w": (self.ones(vocab, WIDTH), {"embed": problem})},
        )  # fmt: skip

    def pointwise(self, op: str, arrays: int, rows: int) -> Timed:
        """`add`, `silu_mul` or `argmax` over [rows, WIDTH]."""
        inputs = {f"x{i}": self.ones(rows, WIDTH) for i in range(arrays)}
        problem: Problem = PointwiseProblem(dtype=self.dtype, rows=rows, width=WIDTH // (2 if op == "silu_mul" else 1))
        if op == "argmax":
            problem = SampleProblem(dtype=self.dtype, rows=rows, vocab=WIDTH)
        return self.program(
            inputs, lambda ops, w, step: getattr(ops, op)(*(step[name] for name in inputs)), work=(op, problem)
        )

    def decode(self, rows: int, context: int, columns: int, pages: int) -> Timed:
        """`write_kv` and `attend` of a token a row, at this context; the table has `columns` and the cache `pages`."""
        shape = StepShape(tokens=rows, rows=rows, pages=(columns,), logits=rows, max_query=1)
        dims: dict[str, Any] = {"kv_heads": HEADS, "qk_dim": DIM, "v_dim": DIM, "page_size": self.page_size}
        cache = KVProblem(dtype=self.dtype, kv_dtype=self.dtype, **dims)
        attend = AttendProblem(dtype=self.dtype, q_heads=HEADS, scale=DIM**-0.5, kv_dtype=self.dtype, **dims)

        def fn(ops: Any, params: Any, caches: Any, step: Any, arrays: Any) -> Any:
            x = step.arrays["x"]
            written = ops.write_kv(caches[0], x, x, step)
            out = ops.attend(x, written, step)
            return {"out": out, "corner": out[:1, :1, :1]}, [written]

        fields = (*forward_inputs(shape).fields, InputField("x", self.dtype, (rows, HEADS, DIM)))
        spec = ProgramSpec("decode", fn, shape, InputLayout(fields), host_outputs=frozenset({"corner"}))
        rig = self._rig(spec, caches=[cache], pages=[pages], uses={"attend": ("attend", attend)})
        host, program = rig.host(decode_inputs(rows, context, columns, self.page_size)), rig.programs[0]
        host["x"][...] = 1
        seen = replace(attend, tokens=rows, rows=rows, pages=-(-context // self.page_size), max_query=1)
        return Timed(rig, lambda: program(host).result("corner"), *self._work(("attend", seen)), rig.kernels)

    def _copy(self) -> Timed:
        """Half of a cache copied to the other half, by `Session.copy_pages`."""
        cache = KVProblem(
            dtype=self.dtype, kv_heads=HEADS, qk_dim=DIM, v_dim=DIM, page_size=self.page_size, kv_dtype=self.dtype
        )
        half = self.nbytes // (2 * cache.page_bytes)
        timed = self.decode(1, 1, 1, 1 + 2 * half)
        ids = np.arange(1, half + 1, dtype=np.int32)

        def copy() -> object:
            timed.rig.session.copy_pages(0, ids, ids + half).wait()
            return timed.rig.session.read_pages(0, ids[-1:] + half)  # whoever copies later has copied by now

        return Timed(timed.rig, copy, moved=2 * half * cache.page_bytes)


def layout_of(inputs: Mapping[str, HostArray]) -> InputLayout:
    return InputLayout([InputField(name, array.dtype.name, array.shape) for name, array in inputs.items()])


def decode_inputs(rows: int, context: int, columns: int, page_size: int) -> dict[str, HostArray]:
    """A step of one token a row, each row on pages of its own, the context so long in each."""
    used = -(-context // page_size)
    table = np.zeros((rows, columns), np.int32)
    table[:, :used] = 1 + np.arange(rows * used, dtype=np.int32).reshape(rows, used)
    last = table[:, used - 1] * page_size + (context - 1) % page_size
    return {
        "query_starts": np.arange(rows + 1, dtype=np.int32), "slots.0": last.astype(np.int32), "page_table.0": table,
        "context_lens.0": np.full(rows, context, np.int32), "positions": np.full(rows, context - 1, np.int32),
    }  # fmt: skip
