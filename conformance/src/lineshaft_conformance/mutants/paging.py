"""Caches and transfers that lose, mix up or keep pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lineshaft_conformance.mutants.mutant import (
    Mutant,
    all_of,
    portable,
    with_kernel,
    with_kernels,
    with_program,
    with_session,
)
from lineshaft_contract.kernels import Kernel
from lineshaft_torch.arrays import host_view
from lineshaft_torch.pages import page_view


def _one_by_one(session: Any, copy: Any, group: int, src: Any, dst: Any) -> Any:
    for i in range(len(src)):
        done = copy(group, src[i : i + 1], dst[i : i + 1])
    return done


@torch.inference_mode()
def _first_cache_only(session: Any, copy: Any, group: int, src: Any, dst: Any) -> Any:
    others = [c for c in session.caches if c.problem.group == group][1:]
    kept = [(view, view.clone()) for c in others for view in page_view(c).values()]
    done = copy(group, src, dst)
    for view, before in kept:
        view.copy_(before)
    return done


def _first_32(session: Any, copy: Any, group: int, src: Any, dst: Any) -> Any:
    return copy(group, src[:32], dst[:32])


def _one_target(session: Any, copy: Any, group: int, src: Any, dst: Any) -> Any:
    """A source that comes again is copied once."""
    _, first = np.unique(src, return_index=True)
    return copy(group, src[first], dst[first])


def _every_group(session: Any, copy: Any, group: int, src: Any, dst: Any) -> Any:
    for other in {c.problem.group for c in session.caches}:
        done = copy(other, src, dst)
    return done


def _padding_counts(session: Any, copy: Any, group: int, src: Any, dst: Any) -> Any:
    return copy(group, src, np.where(dst == 0, dst[0], dst))


@dataclass(frozen=True)
class Deferred:
    """A transfer that happens when it is waited for."""

    run: Callable[[], Any]
    over: list[bool] = field(default_factory=list)
    error: BaseException | None = None

    def done(self) -> bool:
        return bool(self.over)

    def wait(self) -> None:
        if not self.over:
            self.over.append(True)
            self.run()


def _late_copy(session: Any, copy: Any, *given: Any) -> Any:
    return Deferred(lambda: copy(*given))


def _ignores_after(program: Any, host: Any, arrays: Any, after: Any) -> Any:
    pending = program(host, arrays)
    for transfer in after:
        transfer.wait()
    return pending


def _lends_pages(session: Any, read: Any, cache: int, ids: Any) -> Any:
    if not len(ids) or list(ids) != list(range(ids[0], ids[0] + len(ids))):
        return read(cache, ids)
    views = page_view(session.caches[cache])
    return {name: host_view(view[int(ids[0]) : int(ids[-1]) + 1]) for name, view in views.items()}


def _drops_last(session: Any, write: Any, cache: int, ids: Any, pages: Any) -> Any:
    return write(cache, ids[:-1], {name: array[:-1] for name, array in pages.items()})


def _quiet_nan(session: Any, write: Any, cache: int, ids: Any, pages: Any) -> Any:
    return write(
        cache, ids, {name: np.nan_to_num(array, nan=np.nan) + array.dtype.type(0) for name, array in pages.items()}
    )


def _null_is_one(problem: Any, write: Any) -> Callable[..., Any]:
    def call(cache: Any, k: Any, v: Any, step: Any, **kwargs: Any) -> Any:
        arrays = dict(step.arrays)
        name = f"slots.{problem.group}"
        arrays[name] = arrays[name].clamp(min=problem.page_size)
        return write(cache, k, v, type(step)(arrays, step.shape), **kwargs)

    return call


def _one_cache(problem: Any, write: Any) -> Callable[..., Any]:
    first: list[Any] = []

    def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
        first.append(cache)
        write(first[0], *args, **kwargs)
        return cache

    return call


def _reads_null(problem: Any, attend: Any) -> Callable[..., Any]:
    def call(q: Any, cache: Any, step: Any, **kwargs: Any) -> Any:
        out = attend(q, cache, step, **kwargs)
        null = next(iter(cache.arrays.values()))[0].sum() * 0
        return out + null.to(out.dtype) if not isinstance(out, tuple) else out

    return call


def _forgets_length_zero(problem: Any, attend: Any) -> Callable[..., Any]:
    def call(q: Any, cache: Any, step: Any, **kwargs: Any) -> Any:
        arrays = dict(step.arrays)
        starts = arrays["query_starts"].clone()
        for b in range(len(starts) - 1):
            if (
                starts[b + 1] == starts[b]
                and int(arrays[f"context_lens.{problem.group}"][b])
                and b + 1 < len(starts) - 1
            ):
                starts[b + 1] = min(int(starts[b]) + 1, int(starts[-1]))
        arrays["query_starts"] = starts
        return attend(q, cache, type(step)(arrays, step.shape), **kwargs)

    return call


def _prepares_once(kernel: Kernel) -> Kernel:
    def prepare(problem: Any, shape: Any, session: Any) -> Any:
        right, calls = kernel.prepare(problem, shape, session), iter(range(3))
        return right and (lambda host: right(host) if next(calls, None) is not None else None)

    return replace(kernel, prepare=prepare)


def _prepares_one_group(kernel: Kernel) -> Kernel:
    def prepare(problem: Any, shape: Any, session: Any) -> Any:
        right = kernel.prepare(problem, shape, session)

        def run(host: Any) -> None:
            if problem.group:
                host = type(host)(host.layout, host.buffer.copy())
                host[f"page_table.{problem.group}"][...] = host["page_table.0"]
            if right is not None:
                right(host)

        return run

    return replace(kernel, prepare=prepare)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "copies_one_by_one", "copy_pages reads all sources before it writes", 2, "L2/paging/copy_pages-*",
        with_session("copy_pages", _one_by_one),
    ),
    Mutant(
        "copies_first_cache", "copy_pages copies in every cache of the group", 2, "L2/paging/*",
        with_session("copy_pages", _first_cache_only),
    ),
    Mutant(
        "copies_every_group", "page ids belong to their group", 2, "L2/paging/copy_pages-*",
        with_session("copy_pages", _every_group),
    ),
    Mutant(
        "copies_padding", "ids are padded with 0, and page 0 means nothing", 2, "L2/paging/copy_on_write-*",
        with_session("copy_pages", _padding_counts),
    ),
    Mutant(
        "ignores_after", "a program waits for the transfers it is given", 2, "L2/paging/copies_in_order-*",
        all_of(with_session("copy_pages", _late_copy), with_program(lambda session: _ignores_after)),
    ),
    Mutant(
        "copies_first_32", "copy_pages takes any number of ids", 2, "L2/paging/many_pages-*",
        with_session("copy_pages", _first_32),
    ),
    Mutant(
        "copies_to_one_target", "a page may be copied to several at once", 2, "L2/paging/many_pages-*",
        with_session("copy_pages", _one_target),
    ),
    Mutant(
        "lends_pages", "read_pages gives a private copy", 2, "L2/paging/swap-*",
        with_session("read_pages", _lends_pages),
    ),
    Mutant(
        "drops_last_page", "write_pages writes every page", 2, "L2/paging/*", with_session("write_pages", _drops_last)
    ),
    Mutant(
        "quiet_nan", "pages are moved bit by bit", 2, "L2/paging/bits-*", with_session("write_pages", _quiet_nan)
    ),
    Mutant("null_is_one", "padding is written to page 0", 2, "L2/paging/*", with_kernel("write_kv", _null_is_one)),
    Mutant("one_cache", "each cache has arrays of its own", 2, "L2/paging/*", with_kernel("write_kv", _one_cache)),
    Mutant("reads_null", "page 0 is never read as live", 2, "L2/paging/*", with_kernel("attend", _reads_null)),
    Mutant(
        "prepares_once", "host planning runs before every step", 2, "L2/*",
        with_kernels(_prepares_once, "attend"),
    ),
    Mutant(
        "prepares_one_group", "host planning runs for each group", 2, "L2/paging/*",
        with_kernels(_prepares_one_group, "attend"),
    ),
    Mutant(
        "forgets_length_zero", "a row of query length 0 is legal", 2, "L2/paging/cached_prompt-*",
        all_of(portable("attend"), with_kernel("attend", _forgets_length_zero)),
    ),
)  # fmt: skip
