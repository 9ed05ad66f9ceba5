"""What a rank needs and how many pages it can hold, counted before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from lineshaft.cache import pages_for, pages_in_window
from lineshaft.config import EngineConfig
from lineshaft.errors import PoolTooSmall
from lineshaft.plan import Plan
from lineshaft.runner.messages import Sizes
from lineshaft.runner.setup import Setup
from lineshaft.weights.memory import check_fits
from lineshaft_contract.backends import BackendKind
from lineshaft_contract.problems import AttendProblem


def sizes(config: EngineConfig, setup: Setup, plan: Plan) -> Sizes:
    """What the rank needs and can hold. Raises OutOfMemory and PoolTooSmall."""
    page_bytes = bytes_of_page(setup)
    free = free_bytes(setup)
    parts = {"weights": plan.weight_bytes, "one step's results": plan.workspace_bytes}
    check_fits(parts, free)
    pages = _pages(config, setup, page_bytes, None if free is None else free - sum(parts.values()))
    pool = sum(n * size for n, size in zip(pages, page_bytes, strict=True))
    check_fits({**parts, "KV pool": pool}, free)
    return Sizes(
        plan, page_bytes, pages, setup.page_sizes, setup.limits, setup.shapes,
        setup.model.shape.vocab, setup.backend.capabilities.asynchronous, windows_of(setup),
    )  # fmt: skip


def bytes_of_page(setup: Setup) -> tuple[int, ...]:
    """Bytes of one page of each cache group."""
    page_bytes = [0] * len(setup.page_sizes)
    for problem in setup.caches:
        page_bytes[problem.group] += setup.backend.memory.page_bytes(problem)
    return tuple(page_bytes)


def free_bytes(setup: Setup) -> int | None:
    """What this rank may take of the memory that is free; None where the backend does not count."""
    found = setup.backend.memory.total_free()
    if found is None:
        return None
    shared = 1 if setup.info.kind is BackendKind.ACCELERATOR else setup.world.size
    return found[1] // shared


def windows_of(setup: Setup) -> tuple[int, ...]:
    """Keys that a query sees at most in each cache group; 0: all before it."""
    found: list[list[int]] = [[] for _ in setup.page_sizes]
    for _, problem in setup.model.uses().values():
        if isinstance(problem, AttendProblem):
            found[problem.group].append(problem.window)
    return tuple(max(windows) if windows and all(windows) else 0 for windows in found)


def pages_per_request(setup: Setup) -> tuple[int, ...]:
    """The most pages that one request holds in each group at once."""
    limits, found = setup.limits, []
    for size, window in zip(setup.page_sizes, windows_of(setup), strict=True):
        whole = pages_for(limits.max_model_len, size)
        found.append(min(whole, pages_in_window(window, size, limits.chunk)) if window else whole)
    return tuple(found)


def _pages(config: EngineConfig, setup: Setup, page_bytes: Sequence[int], free: int | None) -> tuple[int, ...]:
    """Pages of each group: as configured, else what the memory share holds, at most what the limits can use."""
    needed, wanted = pages_per_request(setup), config.cache.pages
    most = [1 + setup.limits.max_rows * count for count in needed]
    if wanted is not None:
        pages = [
            min(wanted, limit) if window else wanted for limit, window in zip(most, windows_of(setup), strict=True)
        ]
    elif free is None:
        pages = most
    else:
        pages = shares(int(free * config.cache.memory_fraction), page_bytes, most)
    for group, count in enumerate(pages):
        if count - 1 < needed[group]:
            size, longest = setup.page_sizes[group], setup.limits.max_model_len
            source = "cache.pages" if wanted is not None else "cache.memory_fraction gives pages"
            held = max(0, count - 1) * size
            raise PoolTooSmall(
                f"{source} = {count}: beside the null page the pool holds {held} tokens, but one request of "
                f"max_model_len = {longest} needs {needed[group]} pages of {size} tokens ({page_bytes[group]} bytes "
                f"each); set cache.pages to at least {needed[group] + 1} or max_model_len to at most {held}"
            )
    return tuple(pages)


def shares(memory: int, page_bytes: Sequence[int], most: Sequence[int]) -> list[int]:
    """As many pages in every group as `memory` bytes hold; what a group has no use for goes to the others."""
    pages, left = [0] * len(most), memory
    growing = set(range(len(most)))
    while growing:
        even = left // max(1, sum(page_bytes[group] for group in growing))
        full = {group for group in growing if most[group] <= even}
        for group in full or growing:
            pages[group] = min(even, most[group])
            left -= pages[group] * page_bytes[group]
        growing -= full or growing
    return pages
