"""A model in miniature, only its caches: each step writes keys and values and attends, and is compared with a shadow.

Every page that no row owns, page 0 included, is filled with NaN before every step. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from lineshaft.plan import ProgramSpec
from lineshaft_conformance.checks import Found, NotClaimed, fail, require, require_dtype
from lineshaft_conformance.harness.rig import Rig
from lineshaft_conformance.subject import Subject
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Numerics
from lineshaft_contract.ops.spec import EXACT, StepArg, numpy_dtype
from lineshaft_contract.problems import AttendProblem, KVProblem
from lineshaft_contract.sessions import Cache, HostArray, Pending, Transfer
from lineshaft_contract.steps import InputField, InputLayout, StepInputs, StepShape, forward_inputs

Pages = dict[str, HostArray]
HEADS, KV_HEADS, DIM = 4, 2, 16


@dataclass(frozen=True)
class Layout:
    """Caches of a miniature: the group of each, and the pages (with the null page) of every group."""

    groups: tuple[int, ...] = (0,)
    pages: int = 12
    page_size: int = 8
    columns: int = 6  # of a page table
    readers: tuple[int, ...] = ()  # further attends: the caches they read without writing
    dim: int = DIM

    @property
    def group_count(self) -> int:
        return 1 + max(self.groups)


@dataclass
class Row:
    """A sequence: how many tokens its pages hold, and which pages, in order, in every group."""

    tables: list[list[int]]
    length: int = 0


class Miniature:
    """A rig whose programs write and attend, with a shadow of every cache; use it as a context manager.

    shapes  (tokens, rows) of each program; `dtype` is executed and stored
    `free` holds the pages of each group that nobody owns, other ones first in each; the last freed is taken first, so
    that pages are used again soon. Raises NotClaimed where the backend does not list the dtype or the page size.
    """

    def __init__(
        self,
        subject: Subject,
        dtype: str,
        layout: Layout | None = None,
        shapes: Sequence[tuple[int, int]] = ((4, 4), (16, 4)),
        seed: int = 0,
        kernels: Sequence[Kernel] | None = None,
    ) -> None:
        self.layout = layout or Layout()
        self.dtype, self._subject = dtype, subject
        self.rng = np.random.default_rng([seed, 5])
        _require_listed(subject, dtype, self.layout.page_size)
        at = self.layout
        self.problems = [
            KVProblem(
                dtype=dtype, kv_heads=KV_HEADS, qk_dim=at.dim, v_dim=at.dim, page_size=at.page_size, kv_dtype=dtype,
                group=group,
            )
            for group in at.groups
        ]  # fmt: skip
        self.attended = [*range(len(at.groups)), *at.readers]
        self.shapes = [StepShape(tokens, rows, (at.columns,) * at.group_count, rows, tokens) for tokens, rows in shapes]
        self.rig = Rig(
            subject, [self._program(shape) for shape in self.shapes], caches=self.problems,
            pages=[at.pages] * at.group_count, uses=self._uses(), kernels=kernels,
        )  # fmt: skip
        self.free = [[*range(1, g + 1), *range(at.pages - 1, g, -1)] for g in range(at.group_count)]
        self.rows: list[Row] = []
        self.shadow: list[Pages] = [self._blank(problem) for problem in self.problems]
        self.poison()

    def _uses(self) -> dict[str, Any]:
        at = self.layout
        base = AttendProblem(
            dtype=self.dtype, q_heads=HEADS, kv_heads=KV_HEADS, qk_dim=at.dim, v_dim=at.dim, page_size=at.page_size,
            scale=at.dim**-0.5, kv_dtype=self.dtype,
        )  # fmt: skip
        return {f"attend_{g}": ("attend", replace(base, group=g)) for g in range(at.group_count)}

    def _program(self, shape: StepShape) -> ProgramSpec:
        fields = list(forward_inputs(shape).fields)
        kv = (shape.tokens, KV_HEADS, self.layout.dim)
        for i in range(len(self.problems)):
            fields += [InputField(f"k{i}", self.dtype, kv), InputField(f"v{i}", self.dtype, kv)]
        fields += [InputField(f"q{i}", self.dtype, (shape.tokens, HEADS, kv[2])) for i in range(len(self.attended))]
        return ProgramSpec("miniature", self._forward, shape, InputLayout(fields))

    def _forward(self, ops: Any, weights: Any, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        given = step.arrays
        written = [ops.write_kv(cache, given[f"k{i}"], given[f"v{i}"], step) for i, cache in enumerate(caches)]
        out = {}
        for i, cache in enumerate(self.attended):
            attend = getattr(ops, f"attend_{self.layout.groups[cache]}")
            out[f"out{i}"] = attend(given[f"q{i}"], written[cache], step)
        return out, written

    def _blank(self, problem: KVProblem) -> Pages:
        shape = (self.layout.pages, problem.page_size, problem.kv_heads)
        blank = np.full((*shape, self.layout.dim), np.nan, numpy_dtype(self.dtype))
        return {"k": blank, "v": blank.copy()}

    # ---- rows and their pages ----------------------------------------------------------------------------------

    def add(self, tables: list[list[int]] | None = None, length: int = 0) -> Row:
        """A new sequence, empty or over pages that others filled."""
        row = Row(tables or [[] for _ in self.free], length)
        self.rows.append(row)
        return row

    def drop(self, row: Row) -> None:
        """End a sequence; pages that no other one owns are free (and poisoned before the next step)."""
        self.rows.remove(row)
        for group, table in enumerate(row.tables):
            self.free[group] += [page for page in table if page not in self.owned(group)]

    def owned(self, group: int) -> set[int]:
        return {page for row in self.rows for page in row.tables[group]}

    def grow(self, row: Row, tokens: int) -> None:
        """Give a row the pages that `tokens` more will need."""
        needed = -(-(row.length + tokens) // self.layout.page_size)
        for group, table in enumerate(row.tables):
            while len(table) < needed:
                table.append(self.free[group].pop())

    def each_cache(self, group: int) -> Iterable[int]:
        return (i for i, problem in enumerate(self.problems) if problem.group == group)

    # ---- pages -------------------------------------------------------------------------------------------------

    def poison(self) -> None:
        """NaN in every page that no row owns, and in the null page."""
        for group in range(self.layout.group_count):
            ids = np.array([i for i in range(self.layout.pages) if i not in self.owned(group)], np.int32)
            for cache in self.each_cache(group):
                self.write(cache, ids, {name: np.full_like(p[ids], np.nan) for name, p in self.shadow[cache].items()})

    def write(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> Transfer:
        """write_pages on the backend and the shadow."""
        transfer = self.rig.session.write_pages(cache, ids, pages)
        transfer.wait()
        for name, values in pages.items():
            self.shadow[cache][name][ids] = values
        return transfer

    def copy(self, group: int, src: Sequence[int], dst: Sequence[int]) -> Transfer:
        """copy_pages on the backend and the shadow."""
        transfer = self.rig.session.copy_pages(group, np.array(src, np.int32), np.array(dst, np.int32))
        for cache in self.each_cache(group):
            for held in self.shadow[cache].values():
                held[dst] = held[src]
        return transfer

    def check_pages(self) -> None:
        """Every owned page holds what the shadow holds, bit by bit."""
        for cache, problem in enumerate(self.problems):
            ids = np.array(sorted(self.owned(problem.group)), np.int32)
            found = self.rig.session.read_pages(cache, ids)
            for name, held in self.shadow[cache].items():
                same = found[name].tobytes() == held[ids].tobytes()
                require(same, f"array {name} of cache {cache}: pages {_unlike(found[name], held[ids], ids)} differ")

    # ---- steps -------------------------------------------------------------------------------------------------

    def step(self, *work: tuple[Row, int], after: Sequence[Transfer] = ()) -> dict[str, HostArray]:
        """Extend rows by tokens each, in the smallest program that holds them; returns and checks what they attend."""
        begun = self.submit(*work, after=after)
        return begun.check()

    def submit(self, *work: tuple[Row, int], poison: bool = True, after: Sequence[Transfer] = ()) -> Begun:
        """Like `step`, without waiting: what comes back is checked by `Begun.check`."""
        for row, tokens in work:
            self.grow(row, tokens)
        if poison:
            self.poison()
        total = sum(tokens for _, tokens in work)
        index = next(i for i, s in enumerate(self.shapes) if s.tokens >= total and s.rows >= len(work))
        values = self._inputs(self.shapes[index], work)
        for row, tokens in work:
            row.length += tokens
        expected = self._expected(values, self.shapes[index])
        host = self.rig.host(values, index)
        pending = self.rig.programs[index](host, {}, after)
        host.buffer[...] = 0xFF  # the program no longer reads it
        return Begun(self, pending, expected)

    def _inputs(self, shape: StepShape, work: Sequence[tuple[Row, int]]) -> dict[str, HostArray]:
        at, values = self.layout, self._metadata(shape, work)
        for name, heads in [
            *((f"{kind}{i}", KV_HEADS) for i in range(len(self.problems)) for kind in "kv"),
            *((f"q{i}", HEADS) for i in range(len(self.attended))),
        ]:
            array = self.rng.standard_normal((shape.tokens, heads, at.dim)).astype(numpy_dtype(self.dtype))
            array[sum(tokens for _, tokens in work) :] = np.nan  # padding tokens
            values[name] = array
        return values

    def _metadata(self, shape: StepShape, work: Sequence[tuple[Row, int]]) -> dict[str, HostArray]:
        at = self.layout
        host = {f.name: np.zeros(f.shape, np.int32) for f in forward_inputs(shape).fields}
        token = 0
        for b, (row, tokens) in enumerate(work):
            span, where = slice(token, token + tokens), np.arange(row.length, row.length + tokens)
            host["positions"][span] = where
            for g, table in enumerate(row.tables):
                pages = np.array(table, np.int32)
                host[f"page_table.{g}"][b, : len(pages)] = pages
                host[f"context_lens.{g}"][b] = row.length + tokens
                host[f"slots.{g}"][span] = pages[where // at.page_size] * at.page_size + where % at.page_size
            token += tokens
            host["query_starts"][b + 1 :] = token
        return host

    def _expected(self, values: Mapping[str, HostArray], shape: StepShape) -> list[tuple[Any, HostArray, HostArray]]:
        """(problem, exact, reference run) of each output, after the step's writes to the shadow."""
        ops, step = self._subject.ops, StepArg(values, shape)
        for i, problem in enumerate(self.problems):
            self.shadow[i] = ops["write_kv"].reference(problem, self.shadow[i], values[f"k{i}"], values[f"v{i}"], step)
        run = Numerics.of(self.dtype, ops["attend"].accumulate)
        found = []
        for i, cache in enumerate(self.attended):
            base = self._uses()[f"attend_{self.layout.groups[cache]}"][1]
            problem = replace(base, tokens=shape.tokens, rows=shape.rows, pages=self.layout.columns)
            args = problem, values[f"q{i}"], self.shadow[cache], step
            found.append((problem, *(ops["attend"].reference(*args, num=num) for num in (EXACT, run))))
        return found

    @property
    def found(self) -> Found:
        """What a check that passed has seen."""
        return Found(self.rig.kernels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.session.close()


@dataclass(frozen=True)
class Begun:
    """A submitted step and what it must give."""

    model: Miniature
    pending: Pending
    expected: list[tuple[Any, HostArray, HostArray]]

    def check(self) -> dict[str, HostArray]:
        """The outputs; raises Failure where one is not within attend's tolerance."""
        tolerance = self.model._subject.ops["attend"].tolerance
        results = {}
        for i, (problem, exact, run) in enumerate(self.expected):
            got = results[f"out{i}"] = self.pending.result(f"out{i}")
            reason = tolerance.check(problem, got, exact, run)
            if reason:
                fail(f"attention over cache {self.model.attended[i]}: {reason}")
        return results


def _require_listed(subject: Subject, dtype: str, page_size: int) -> None:
    require_dtype(subject, dtype)
    can = subject.capabilities
    if can.kv_dtypes and dtype not in can.kv_dtypes:
        raise NotClaimed(f"pages of {dtype} are not among Capabilities.kv_dtypes ({', '.join(can.kv_dtypes)})")
    if can.page_sizes and page_size not in can.page_sizes:
        raise NotClaimed(f"page size {page_size} is not among Capabilities.page_sizes {can.page_sizes}")


def _unlike(found: HostArray, held: HostArray, ids: HostArray) -> list[int]:
    return [int(i) for i, a, b in zip(ids, found, held, strict=True) if a.tobytes() != b.tobytes()]
