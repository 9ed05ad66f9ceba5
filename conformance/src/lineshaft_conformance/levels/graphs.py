"""L3: what sessions and programs promise, seen by values, bytes and paired times: replay, freeze, results, close."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft.errors import (
    ContractViolation,
    MisshapenTensor,
    SessionClosed,
    SessionFrozen,
    SessionPoisoned,
    Unsupported,
)
from lineshaft.plan import ProgramSpec
from lineshaft_conformance.checks import Check, Found, NotClaimed, expect, fail, require, rule_of
from lineshaft_conformance.harness.paged import Layout, Miniature
from lineshaft_conformance.harness.rig import Rig, const_param, whole_param
from lineshaft_conformance.harness.timing import TOO_MUCH, paired_ratio, patient, seconds
from lineshaft_conformance.subject import Subject
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.spec import Size, numpy_dtype
from lineshaft_contract.problems import EmbedProblem, LinearProblem
from lineshaft_contract.sessions import Cache, HostArray, Pending, Session
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepInputs, StepShape

WIDTH = 64
UNREAD = 48
STEPS = ((4, 4), (48, 4))
"""Tokens and rows of a decode step and of one with a prefill."""


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    for name, run in CHECKS.items():
        yield Check(f"L3/graph/{name}", run, rule=rule_of(run), op="graph", shape_class=name, limit=120.0)
    rule = "a backend plans, captures and replays a program"
    yield Check("L3/minimum/program", _minimum, rule=rule, op="graph", shape_class="minimum")


# ---- a program over one weight ---------------------------------------------------------------------------------


class Product:
    """x [rows, width] @ w^T, and the sum of it with x: one weight, two outputs, programs for several numbers of rows.

    Every program of `handled` rows takes its x as a handle instead of from the host.
    """

    def __init__(
        self, subject: Subject, rows: tuple[int, ...] = (4,), *, width: int = WIDTH, handled: tuple[int, ...] = ()
    ) -> None:
        self.dtype = subject.main_dtype
        self.width, self.rng = width, np.random.default_rng(7)
        self.weight = self.values(width)
        param = whole_param("w", self.weight, {"linear": LinearProblem(dtype=self.dtype, n=width, k=width)})
        self.programs = [self.spec(n) for n in rows] + [self.spec(n, handled=True) for n in handled]
        self.rig = Rig(subject, self.programs, params={"w": param}, values={"w": self.weight})

    def values(self, rows: int) -> HostArray:
        """Whole numbers from -2 to 2, so that products and sums are exact in every dtype."""
        return self.rng.integers(-2, 3, (rows, self.width)).astype(numpy_dtype(self.dtype))

    def spec(self, rows: int, *, handled: bool = False, among: int = 0) -> ProgramSpec:
        """The program for that many rows; `among`: x is one of so many further inputs, and not the first."""
        shape = StepShape(rows, rows, (), rows, 1)
        x = ArraySpec((rows, self.width), self.dtype)
        fields = [InputField(f"unused{i}", self.dtype, x.shape) for i in range(among)]
        fields[among // 2 : 0] = [] if handled else [InputField("x", self.dtype, x.shape)]
        return ProgramSpec("product", self._forward, shape, InputLayout(fields), {"x": x} if handled else {})

    @staticmethod
    def _forward(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        x = arrays["x"] if "x" in arrays else step.arrays["x"]
        product = ops.linear(x, weights["w"])
        return {"product": product, "sum": ops.add(product, x)}, caches

    def host(self, x: HostArray, program: int = 0) -> HostStep:
        return self.rig.host({"x": x}, program)

    def submit(self, x: HostArray, program: int = 0) -> Pending:
        return self.rig.programs[program](self.host(x, program))

    def check(self, pending: Pending, x: HostArray, what: str) -> None:
        """Raises Failure unless both outputs are the exact ones."""
        wide = x.astype(np.float64)
        product = wide @ self.weight.astype(np.float64).T
        for name, exact in (("product", product), ("sum", product + wide)):
            got = pending.result(name)
            require(got.shape == exact.shape, f"{what}: {name} has shape {got.shape}, not {exact.shape}")
            close = np.allclose(got.astype(np.float64), exact, rtol=0.02, atol=0.02)
            require(close, f"{what}: {name} is not the result of these inputs and weights")

    def __enter__(self) -> Product:
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.session.close()


# ---- replay ----------------------------------------------------------------------------------------------------


def _new_inputs(subject: Subject, seed: int) -> Found:
    """A replay reads its inputs anew, in any order of programs."""
    with Product(subject, (4, 1, 9)) as product:
        for program in (0, 1, 0, 2, 2, 1, 0):
            x = product.values(product.programs[program].shape.rows)
            product.check(product.submit(x, program), x, f"program {program}")
        zeros = np.zeros((4, product.width), product.weight.dtype)
        product.check(product.submit(zeros), zeros, "zeros after other values")
        return Found(product.rig.kernels)


def _minimum(subject: Subject, seed: int) -> Found:
    try:
        return _new_inputs(subject, seed)
    except Unsupported as error:
        fail(f"no program of a product and a sum can be planned: {error}")


def _named_inputs(subject: Subject, seed: int) -> Found:
    """Inputs are read by name, wherever they lie in the host buffer, and further ones do no harm."""
    with Product(subject) as product:
        product.rig.session.thaw()
        product.programs += [product.spec(4, among=count) for count in (2, 5)]
        product.rig.capture_more(*product.programs[1:])
        product.rig.session.freeze()
        for program in (1, 2, 0, 1):
            x = product.values(4)
            product.check(product.submit(x, program), x, f"x at byte {product.programs[program].inputs.offsets['x']}")
        return Found(product.rig.kernels)


def _new_weights(subject: Subject, seed: int) -> Found:
    """Session.update changes a weight for all programs at once, between steps and without dropping one; a wrong
    update is a typed error and changes nothing."""
    with Product(subject, (4, 1)) as product:
        session, x, one = product.rig.session, product.values(4), product.values(1)
        for _ in range(2):
            product.check(product.submit(x), x, "before the update")
            product.weight = product.values(product.width)
            session.update({"w": product.weight})
            product.check(product.submit(x), x, "after the update")
            product.check(product.submit(one, 1), one, "another program after the update")
        pending, other = product.submit(x), product.values(product.width)
        session.update({"w": other})
        product.check(pending, x, "a step that was submitted before an update and read after it")
        product.weight = other
        other = product.values(product.width)
        expect(MisshapenTensor, lambda: session.update({"w": other, "no_such": other}), "update of an unknown name")
        expect(MisshapenTensor, lambda: session.update({"w": other[:-1]}), "update with another shape")
        product.check(product.submit(x), x, "after updates that were refused")
        return Found(product.rig.kernels)


def _metadata(subject: Subject, seed: int) -> Found:
    """A replay reads lengths, page tables and slots anew, and programs of a session share its caches."""
    with Miniature(subject, subject.main_dtype, Layout(groups=(0, 1)), ((4, 4), (8, 2), (16, 4)), seed) as model:
        rows = [model.add() for _ in range(4)]
        model.step((rows[0], 12), (rows[1], 1))
        model.step((rows[1], 1), (rows[0], 1))
        model.step((rows[2], 3), (rows[3], 1))
        model.step((rows[3], 1), (rows[2], 1), (rows[1], 1), (rows[0], 1))
        model.step((rows[2], 7), (rows[0], 1))
        model.step((rows[0], 1))
        model.step((rows[3], 1), (rows[1], 1))
        model.check_pages()
        return model.found


def _constants(subject: Subject, seed: int) -> Found:
    """What depends on the rank is a constant of the session: programs read its value, also after an update."""
    dtype = subject.main_dtype
    table = np.arange(12, dtype=np.float64).reshape(6, 2).astype(numpy_dtype(dtype))
    ids, start = np.array([5, 2, 7, 11], np.int32), np.array([4], np.int32)

    params = {
        "table": whole_param("table", table, {"embed": EmbedProblem(dtype=dtype, vocab=6, width=2)}),
        "vocab_start": const_param("vocab_start", start),
    }

    def fn(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        return {"rows": ops.embed(step.arrays["ids"], weights["table"], weights["vocab_start"])}, caches

    spec = ProgramSpec("embed", fn, StepShape(4, 4, (), 4, 1), InputLayout([InputField("ids", "int32", (4,))]))
    with Rig(subject, [spec], params=params, values={"table": table, "vocab_start": start}) as rig:
        for first in (4, 2):
            rig.session.update({"vocab_start": np.array([first], np.int32)})
            inside = (ids >= first) & (ids < first + 6)
            exact = np.where(inside[:, None], table[np.clip(ids - first, 0, 5)], 0)
            got = rig.run({"ids": ids})["rows"]
            require(np.array_equal(got, exact), f"embed with vocab_start {first} is not that of the constant")
        return Found(rig.kernels)


# ---- host buffers and results ----------------------------------------------------------------------------------


def _host_buffer(subject: Subject, seed: int) -> Found:
    """When a program's call returns, it no longer reads the host buffer; it never writes to it."""
    with Product(subject) as product:
        for _ in range(3):
            x = product.values(4)
            host = product.host(x)
            before = host.buffer.copy()
            pending = product.rig.programs[0](host)
            require(np.array_equal(host.buffer, before), "a program wrote to its host buffer")
            host.buffer[...] = 0xFF
            product.check(pending, x, "with the host buffer overwritten after the call")
        return Found(product.rig.kernels)


def _private_results(subject: Subject, seed: int) -> Found:
    """A result is a private host copy: writing to it changes nothing, and no later step changes it."""
    with Product(subject) as product:
        x = product.values(4)
        pending = product.submit(x)
        first = pending.result("product")
        kept = first.copy()
        first[...] = -1
        product.check(pending, x, "after the first copy of the result was overwritten")
        again = pending.result("product")
        for _ in range(3):
            product.submit(product.values(4)).result("product")
        require(np.array_equal(again, kept), "a result changed when the program ran again")
        return Found(product.rig.kernels)


def _outstanding(subject: Subject, seed: int) -> Found:
    """Several steps may be outstanding; each keeps its own results, in whatever order they are read."""
    with Product(subject, (4, 1)) as product:
        begun = []
        for program in (0, 1, 0, 0, 1):
            x = product.values(product.programs[program].shape.rows)
            begun.append((product.submit(x, program), x))
        for pending, x in reversed(begun):
            product.check(pending, x, "a step that others followed")
        return Found(product.rig.kernels)


def _handles(subject: Subject, seed: int) -> Found:
    """An output may go to another program of the session as a handle, and has the shape and dtype that were planned."""
    with Product(subject, (4,), handled=(4,)) as product:
        for _ in range(3):
            x = product.values(4)
            handle = product.submit(x).handle("product")
            spec = (tuple(handle.spec.shape), handle.spec.dtype)
            require(spec == ((4, product.width), product.dtype), f"the handle says {spec}")
            pending = product.rig.programs[1](product.rig.host({}, 1), {"x": handle})
            between = (x.astype(np.float64) @ product.weight.astype(np.float64).T).astype(x.dtype)
            product.check(pending, between, "a program over another's handle")
        _outlived(product)
        return Found(product.rig.kernels)


def _outlived(product: Product) -> None:
    """A handle whose program has run again holds what it held, or is refused."""
    x, late = product.values(4), product.values(4)
    handle = product.submit(x).handle("product")
    for _ in range(3):
        product.check(product.submit(late), late, "a step between a handle and its use")
    with suppress(ContractViolation):
        pending = product.rig.programs[1](product.rig.host({}, 1), {"x": handle})
        kept = (x.astype(np.float64) @ product.weight.astype(np.float64).T).astype(x.dtype)
        product.check(pending, kept, "a program over a handle whose own program has run again")


def _wrong_handles(subject: Subject, seed: int) -> Found:
    """A program called without a handle that it was captured with, or with one of another shape, raises
    ContractViolation; the session goes on."""
    with Product(subject, (4, 1), handled=(4,)) as product:
        x = product.values(1)
        pending = product.submit(x, 1)
        program, host = product.rig.programs[2], product.rig.host({}, 2)
        expect(ContractViolation, lambda: program(host, {}), "a program called without its handle")
        wrong = {"x": pending.handle("product")}
        expect(ContractViolation, lambda: program(host, wrong), "a program called with a handle of another shape")
        x = product.values(4)
        product.check(product.submit(x), x, "after calls that were refused")
        return Found(product.rig.kernels)


class Failing(Miniature):
    """A miniature whose steps end in a kernel of the suite's own, which fails on demand."""

    fails = False

    def __init__(self, subject: Subject, dtype: str, seed: int) -> None:
        own = Kernel(name="suite_add", op="add", backend=subject.info.name, bind=lambda problem, session: self._add)
        others = [kernel for kernel in subject.kernels if kernel.op != "add"]
        super().__init__(subject, dtype, seed=seed, kernels=[*others, own])

    def _add(self, x: Any, y: Any) -> Any:
        if self.fails:
            raise RuntimeError("a kernel fails on purpose")
        return x

    def _forward(self, ops: Any, weights: Any, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        out, written = super()._forward(ops, weights, caches, step, arrays)
        return out | {"last": ops.add(out["out0"], out["out0"])}, written


def _poisoned(subject: Subject, seed: int) -> Found:
    """A step that fails after it consumed its caches poisons the session: every later call raises SessionPoisoned."""
    with Failing(subject, subject.main_dtype, seed) as model:
        row = model.add()
        model.step((row, 3))
        model.fails = True
        try:
            model.submit((row, 1)).pending.result("last")
        except Exception:
            model.fails = False
            ids = np.zeros(1, np.int32)
            expect(SessionPoisoned, lambda: model.rig.run({}), "a step of a poisoned session")
            expect(SessionPoisoned, lambda: model.rig.session.read_pages(0, ids), "read_pages of a poisoned session")
            return model.found
    raise NotClaimed("a replay runs no kernel's Python, so that none can be made to fail there")


@patient
def _unread(subject: Subject, seed: int) -> Found:
    """Steps that nobody reads pile up no work: the last result of many comes as fast as that of one, and memory stays.

    A backend that only notes what to compute would do all of it at the first read.
    """
    with Product(subject, (512,), width=512) as product:
        memory, x = subject.backend.memory, product.values(512)

        def read_after(count: int) -> float:
            for _ in range(count):
                pending = product.submit(x)
            memory.synchronize()
            return seconds(lambda: pending.result("sum"))

        read_after(1), read_after(8)
        pairs = [(read_after(1), read_after(8)) for _ in range(9)]
        ratio = min(b for _, b in pairs) / min(a for a, _ in pairs)
        require(ratio < TOO_MUCH, f"reading after 8 unread steps takes {ratio:.1f} times as long as after one")
        before = resident_bytes()
        read_after(UNREAD)
        grown, output = resident_bytes() - before, x.nbytes
        most = UNREAD // 2 * output
        require(grown < most, f"{UNREAD} unread steps of {output} bytes a result keep {grown} bytes")
        before = resident_bytes()
        for _ in range(UNREAD):
            product.submit(x).result("sum")
        grown = resident_bytes() - before
        require(grown < most, f"{UNREAD} steps, read and dropped, of {output} bytes a result keep {grown} bytes")
        return Found(product.rig.kernels, notes=(f"reading after 8 unread steps: {ratio:.2f} x reading after one",))


# ---- freeze and thaw -------------------------------------------------------------------------------------------


def _frozen(subject: Subject, seed: int) -> Found:
    """Between freeze and thaw nothing is traced or compiled: load, alloc_caches and capture raise SessionFrozen."""
    with Product(subject) as product:
        x = product.values(4)
        for name, call in _changes(product):
            expect(SessionFrozen, call, f"{name} of a frozen session")
        product.check(product.submit(x), x, "after calls that were refused")
        return Found(product.rig.kernels)


def _late_bucket(subject: Subject, seed: int) -> Found:
    """After thaw another program can be captured; those from before still run, and capture touches no page."""
    with Miniature(subject, subject.main_dtype, Layout(), ((4, 4),), seed) as model:
        row = model.add()
        model.step((row, 4))
        session = model.rig.session
        session.thaw()
        larger = replace(model.shapes[0], tokens=32, max_query=32)
        model.rig.capture_more(model._program(larger))
        model.shapes.append(larger)
        session.freeze()
        model.check_pages()
        model.step((row, 1))
        model.step((row, 20))
        model.step((row, 1))
        model.check_pages()
        return model.found


@patient
def _late_compilation(subject: Subject, seed: int) -> Found:
    """The first step after freeze takes no longer than the later ones: capture has compiled and run the program. Nor
    does the first after an update, which drops no program."""
    firsts, laters, updated, steps = [], [], [], 9
    for i in range(steps):  # other widths, so that nothing compiled for one session serves the next
        with Product(subject, (64,), width=512 + 16 * i) as product:
            x = product.values(64)
            first, _, later = (seconds(partial(_sum, product, x)) for _ in range(3))
            firsts.append(first)
            laters.append(later)
            product.rig.session.update({"w": product.weight})
            updated.append(seconds(partial(_sum, product, x)))
            require(product.rig.programs[0].report.seconds > 0, "CaptureReport.seconds is 0: what did capture do?")
    ratio = min(firsts) / min(laters)
    require(ratio < TOO_MUCH, f"the first step after freeze takes {ratio:.1f} times as long as a later one")
    after = min(updated) / min(laters)
    require(after < TOO_MUCH, f"the first step after an update takes {after:.1f} times as long as a later one")
    return Found(product.rig.kernels, notes=(f"first step after freeze: {ratio:.2f} x a later one",))


@patient
def _cache_copies(subject: Subject, seed: int) -> Found:
    """A step's time does not depend on how many pages there are: write_kv copies no cache (two sizes, 1 and 8).

    What a backend says in CaptureReport.cache_copied is its own word; the times are not.
    """
    dtype = subject.main_dtype
    sizes = [Layout(pages=pages, page_size=16, dim=64) for pages in (1024, 8192)]
    with (
        Miniature(subject, dtype, sizes[0], STEPS, seed) as small,
        Miniature(subject, dtype, sizes[1], STEPS, seed) as large,
    ):
        said = large.rig.programs[0].report.cache_copied
        if said:
            raise NotClaimed(f"CaptureReport.cache_copied: {said} bytes of caches are copied in every step")
        for model in (small, large):
            model.step((model.add(), 3))
        for i, (tokens, _) in enumerate(STEPS):
            calls = []
            for model in (small, large):
                host = model.rig.host(model._inputs(model.shapes[i], [(model.rows[0], 0)]), i)
                calls.append(partial(_attend, model, host, i))
            ratio = paired_ratio(calls[0], calls[1])
            text = f"with 8 times the pages a step of {tokens} tokens takes {ratio:.1f} times as long"
            require(ratio < TOO_MUCH, f"{text}: it copies caches")
        return Found(small.rig.kernels, notes=(f"step with 8 times the pages: {ratio:.2f} x",))


def _two_sessions(subject: Subject, seed: int) -> Found:
    """A session owns its caches: two of one backend, with equal caches, keep their own pages."""
    dtype = subject.main_dtype
    with Miniature(subject, dtype, seed=seed) as one, Miniature(subject, dtype, seed=seed + 1) as other:
        rows = [(model, model.add()) for model in (one, other)]
        for tokens in (5, 1, 7, 1):
            for model, row in rows:
                model.step((row, tokens))
        for model, _ in rows:
            model.check_pages()
        return one.found


# ---- the end ---------------------------------------------------------------------------------------------------


def _close(subject: Subject, seed: int) -> Found:
    """close is idempotent; afterwards every call of the session and of its programs raises SessionClosed."""
    with Product(subject) as product:
        session, x = product.rig.session, product.values(4)
        product.check(product.submit(x), x, "before close")
        session.close()
        session.close()
        ids = np.zeros(1, np.int32)
        calls: list[tuple[str, Callable[[], object]]] = [
            *_changes(product),
            ("update", lambda: session.update({"w": product.weight})),
            ("read_pages", lambda: session.read_pages(0, ids)),
            ("write_pages", lambda: session.write_pages(0, ids, {})),
            ("copy_pages", lambda: session.copy_pages(0, ids, ids)),
            ("freeze", session.freeze),
            ("thaw", session.thaw),
            ("a program", lambda: product.submit(x)),
        ]
        for name, call in calls:
            expect(SessionClosed, call, f"{name} after close")
        return Found(product.rig.kernels)


def _close_frees(subject: Subject, seed: int) -> Found:
    """close joins the session's threads and frees its memory, and a closed session is no obstacle to the next."""
    dtype, layout = subject.main_dtype, Layout(pages=4096, page_size=16, dim=32)

    def once() -> None:
        with Miniature(subject, dtype, layout, ((4, 4),), seed) as model:
            row = model.add()
            model.submit((row, 3), poison=False).pending.result("out0")

    once()
    once()
    before, threads = resident_bytes(), threading.active_count()
    for _ in range(10):
        once()
    cache = layout.pages * layout.page_size * 2 * 2 * layout.dim * numpy_dtype(dtype).itemsize
    grown = resident_bytes() - before
    require(grown < 4 * cache, f"ten sessions, opened and closed, keep {grown} bytes; each had caches of {cache}")
    running = threading.active_count()
    require(running <= threads, f"{running - threads} threads outlive the sessions that started them")
    return Found()


# ---- parts -----------------------------------------------------------------------------------------------------


def _sum(product: Product, x: HostArray) -> HostArray:
    return product.submit(x).result("sum")


def _attend(model: Miniature, host: HostStep, program: int) -> HostArray:
    return model.rig.programs[program](host).result("out0")


def _changes(product: Product) -> list[tuple[str, Callable[[], object]]]:
    """The calls that trace, compile or allocate."""
    session: Session = product.rig.session
    (spec, ops), *_ = product.rig.planned.programs
    packings = product.rig.planned.packings
    return [
        ("capture", lambda: session.capture(spec.fn, spec.shape, spec.inputs, ops, {}, frozenset({"sum"}))),
        ("alloc_caches", lambda: session.alloc_caches([], [], "")),
        ("load", lambda: session.load({}, product.rig.checkpoint, packings)),
    ]


def resident_bytes() -> int:
    """The memory that this process holds, after giving back what it can; where the system does not say, the most that
    it ever held."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc: else freed memory would hide what is kept
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


CHECKS: dict[str, Callable[[Subject, int], Found]] = {
    "new_inputs": _new_inputs,
    "named_inputs": _named_inputs,
    "new_weights": _new_weights,
    "metadata": _metadata,
    "constants": _constants,
    "host_buffer": _host_buffer,
    "private_results": _private_results,
    "outstanding": _outstanding,
    "handles": _handles,
    "wrong_handles": _wrong_handles,
    "poisoned": _poisoned,
    "unread": _unread,
    "frozen": _frozen,
    "late_bucket": _late_bucket,
    "late_compilation": _late_compilation,
    "cache_copies": _cache_copies,
    "two_sessions": _two_sessions,
    "close": _close,
    "close_frees": _close_frees,
}
