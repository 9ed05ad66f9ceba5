"""What a rank needs and how many pages it can hold, counted before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from lineshaft.config import EngineConfig
from lineshaft.contract.backends import BackendKind
from lineshaft.errors import PoolTooSmall
from lineshaft.plan import Plan
from lineshaft.runner.messages import Sizes
from lineshaft.runner.setup import Setup
from lineshaft.weights.memory import check_fits


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
        plan, plan.weight_bytes, page_bytes, pages, setup.page_sizes, setup.limits, setup.shapes,
        setup.model.shape.vocab, setup.backend.capabilities.asynchronous,
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


def _pages(config: EngineConfig, setup: Setup, page_bytes: Sequence[int], free: int | None) -> tuple[int, ...]:
    """Pages of each group: as configured, else what the memory share holds, at most what the limits can use."""
    limits, wanted = setup.limits, config.cache.pages
    pages = []
    for page_size, cost in zip(setup.page_sizes, page_bytes, strict=True):
        per_request = -(-limits.max_model_len // page_size)
        most = 1 + limits.max_rows * per_request
        share = most if free is None else int(free * config.cache.memory_fraction) // max(1, sum(page_bytes))
        count = wanted if wanted is not None else min(most, share)
        if count - 1 < per_request:
            raise PoolTooSmall(_too_small(config, limits.max_model_len, count, page_size, cost))
        pages.append(count)
    return tuple(pages)


def _too_small(config: EngineConfig, longest: int, count: int, page_size: int, cost: int) -> str:
    source = "cache.pages" if config.cache.pages is not None else "cache.memory_fraction gives pages"
    per_request, held = -(-longest // page_size), max(0, count - 1) * page_size
    return (
        f"{source} = {count}: beside the null page the pool holds {held} tokens, but one request of max_model_len "
        f"= {longest} needs {per_request} pages of {page_size} tokens ({cost} bytes each); set cache.pages to at "
        f"least {per_request + 1} or max_model_len to at most {held}"
    )
