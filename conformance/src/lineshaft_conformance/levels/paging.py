"""L2: what a paged cache must keep to while sequences grow, share, fork, leave and come back. Knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lineshaft_conformance.checks import Check, Found, require, rule_of
from lineshaft_conformance.harness.paged import Layout, Miniature
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops.spec import Size, numpy_dtype

Scenario = Callable[[Miniature], None]
TWO = Layout(groups=(0, 1, 0))
"""Three caches in two groups."""


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    dtypes = ("float32", "bfloat16") if size == "smoke" else ("float32", "bfloat16", "float64")
    for name, (scenario, layout) in SCENARIOS.items():
        for dtype in dtypes:
            yield _check(name, scenario, layout, dtype)
    for page_size in (1, 8, 16, 32, 64, 128):
        layout = Layout(page_size=page_size, columns=max(2, 48 // page_size), pages=max(8, 96 // page_size))
        yield _check(f"grow-page{page_size}", _grow, layout, "float32")
    yield Check(
        "L2/minimum/pages", _minimum, rule="a backend holds pages in at least one dtype and page size",
        shape_class="minimum",
    )  # fmt: skip


def _check(name: str, scenario: Scenario, layout: Layout, dtype: str) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        with Miniature(subject, dtype, layout, seed=seed) as model:
            scenario(model)
            model.check_pages()
            return model.found

    return Check(f"L2/paging/{name}-{dtype}", run, rule=rule_of(scenario), op="paging", dtype=dtype, shape_class=name)


def _minimum(subject: Subject, seed: int) -> Found:
    can = subject.capabilities
    with Miniature(subject, can.dtypes[0] if can.dtypes else "none", Layout(page_size=can.default_page_size)) as model:
        _grow(model)
        return model.found


def _grow(model: Miniature) -> None:
    """A row that grows token by token and in chunks, over page borders, sees its own keys and no others."""
    row, other = model.add(), model.add()
    model.step((row, 5), (other, 3))
    model.step((row, 1))
    model.step((row, 1), (other, 9))
    for _ in range(6):
        model.step((row, 1), (other, 1))
    model.step((other, 7), (row, 1))


def _share(model: Miniature) -> None:
    """Rows that share pages of a prefix see the same keys there, and each its own after it."""
    first = model.add()
    model.step((first, model.layout.page_size))
    forks = [model.add([list(table) for table in first.tables], first.length) for _ in range(2)]
    for _ in range(3):
        model.step((first, 1), (forks[0], 2), (forks[1], 1))
    model.drop(first)
    model.step((forks[0], 1), (forks[1], 1))


def _copy_on_write(model: Miniature) -> None:
    """A fork that copies its last, partly filled page writes to the copy; the page it came from keeps its values."""
    first = model.add()
    model.step((first, 3))
    fork = model.add([list(table) for table in first.tables], first.length)
    for group, table in enumerate(fork.tables):
        target = model.free[group].pop()
        transfer = model.copy(group, [table[-1], 0, 0], [target, 0, 0])
        transfer.wait()
        table[-1] = target
    model.step((first, 2), (fork, 1))
    model.check_pages()
    model.step((first, 1), (fork, 4))


def _copies_in_order(model: Miniature) -> None:
    """A program given a transfer under `after` sees what the transfer brings."""
    first = model.add()
    model.step((first, 3))
    fork = model.add([list(table) for table in first.tables], first.length)
    pending = []
    for group, table in enumerate(fork.tables):
        target = model.free[group].pop()
        pending.append(model.copy(group, [table[-1]], [target]))
        table[-1] = target
    model.submit((first, 1), (fork, 1), poison=False, after=pending).check()
    require(all(t.done() and t.error is None for t in pending), "a transfer that a step waited for is not done")


def _swap(model: Miniature) -> None:
    """Pages read out, overwritten by others and written back to other ids hold what they held."""
    row, other = model.add(), model.add()
    model.step((row, 11), (other, 2))
    out = [
        model.rig.session.read_pages(i, np.array(row.tables[p.group], np.int32)) for i, p in enumerate(model.problems)
    ]
    kept = [{name: array.copy() for name, array in pages.items()} for pages in out]
    model.drop(row)
    for _ in range(3):
        model.step((other, 5))
    for pages, before in zip(out, kept, strict=True):
        same = all(array.tobytes() == before[name].tobytes() for name, array in pages.items())
        require(same, "pages that were read out changed when the cache did; read_pages gives a private copy")
    tables = [[model.free[group].pop() for _ in table] for group, table in enumerate(row.tables)]
    back = model.add(tables, row.length)
    for i, problem in enumerate(model.problems):
        model.write(i, np.array(tables[problem.group], np.int32), out[i])
    for pages in out:
        for array in pages.values():
            array.view(np.uint8)[...] = 0xFF  # the transfer is over: its source is no longer read
    model.step((back, 1), (other, 1))


def _reuse(model: Miniature) -> None:
    """Pages that a row left behind serve another; nothing of the old row is seen."""
    for length in (13, 7, 10, 15):
        row = model.add()
        model.step((row, length))
        model.step((row, 1))
        model.drop(row)


def _copy_pages(model: Miniature) -> None:
    """copy_pages reads all sources before it writes, in every cache of the group and in no other group."""
    rows = [model.add() for _ in range(2)]
    model.step((rows[0], 8), (rows[1], 8))
    (a,), (b,) = rows[0].tables[0], rows[1].tables[0]
    model.copy(0, [a, b], [b, a]).wait()
    model.check_pages()
    model.step((rows[0], 1), (rows[1], 1))


def _many_pages(model: Miniature) -> None:
    """copy_pages takes any number of ids, and one source may have several targets."""
    count, size = 40, model.layout.page_size
    row, copy, twin = (model.add([[1 + n * count + i for i in range(count)]], count * size) for n in range(3))
    ids = np.array(row.tables[0], np.int32)
    kept = {name: model.rng.standard_normal(held[ids].shape) for name, held in model.shadow[0].items()}
    model.write(0, ids, {name: array.astype(numpy_dtype(model.dtype)) for name, array in kept.items()})
    model.copy(0, [*ids, *ids], [*copy.tables[0], *twin.tables[0]]).wait()
    model.check_pages()


def _bits(model: Miniature) -> None:
    """write_pages and read_pages keep every bit: NaN payloads, -0, infinities, the smallest numbers; any order of ids,
    padded with 0, and no ids at all."""
    row = model.add()
    model.grow(row, 3 * model.layout.page_size)
    dtype = numpy_dtype(model.dtype)
    for cache, problem in enumerate(model.problems):
        ids = np.array([*row.tables[problem.group][::-1], 0, 0], np.int32)
        shape = (len(ids), problem.page_size, problem.kv_heads, model.layout.dim)
        raw = model.rng.integers(0, 256, (2, *shape, dtype.itemsize), dtype=np.uint8)
        pages = {name: raw[i].view(dtype)[..., 0] for i, name in enumerate("kv")}
        model.write(cache, ids, pages)
        model.write(cache, ids[:0], {name: array[:0] for name, array in pages.items()})
        found = model.rig.session.read_pages(cache, ids[:3])
        for name, array in pages.items():
            require(
                found[name].dtype == dtype, f"read_pages gives {name} as {found[name].dtype}, the pages are {dtype}"
            )
            require(found[name].tobytes() == array[:3].tobytes(), f"read_pages does not give {name} as it was written")
        require(len(model.rig.session.read_pages(cache, ids[:0])["k"]) == 0, "read_pages of no ids gives pages")


def _empty_step(model: Miniature) -> None:
    """The all-zero step is legal and changes no page but the null page; so does a step of empty rows."""
    row = model.add()
    model.step((row, 10))
    before = [model.rig.session.read_pages(i, np.arange(1, model.layout.pages)) for i in range(len(model.problems))]
    for program in range(len(model.shapes)):
        outputs = model.rig.run({}, program)
        require(not any(np.any(out != 0) for out in outputs.values()), "attention of the empty step is not exactly 0")
    for i, pages in enumerate(before):
        after = model.rig.session.read_pages(i, np.arange(1, model.layout.pages))
        same = all(after[name].tobytes() == array.tobytes() for name, array in pages.items())
        require(same, f"the empty step changed pages of cache {i}")
    model.step((row, 0), (row, 1))
    model.step((row, 1))


def _cached_prompt(model: Miniature) -> None:
    """A row of query length 0 whose keys are all there already (a fully cached prompt) is legal beside others.

    https://github.com/vllm-project/vllm/issues/57094
    """
    row, other = model.add(), model.add()
    model.step((row, 9), (other, 1))
    model.step((row, 0), (other, 1))
    model.step((other, 2), (row, 0))
    model.step((row, 1))


def _readers(model: Miniature) -> None:
    """Several layers may read one cache, and a layer may attend without writing."""
    row, other = model.add(), model.add()
    model.step((row, 6), (other, 2))
    model.step((row, 1), (other, 1))


SCENARIOS: dict[str, tuple[Scenario, Layout]] = {
    "grow": (_grow, TWO),
    "share": (_share, TWO),
    "copy_on_write": (_copy_on_write, TWO),
    "copies_in_order": (_copies_in_order, Layout()),
    "swap": (_swap, TWO),
    "reuse": (_reuse, Layout(pages=5)),
    "copy_pages": (_copy_pages, TWO),
    "many_pages": (_many_pages, Layout(pages=128, columns=48)),
    "bits": (_bits, TWO),
    "empty_step": (_empty_step, TWO),
    "cached_prompt": (_cached_prompt, Layout()),
    "readers": (_readers, Layout(groups=(0, 0), readers=(0, 1, 0))),
}
