"""How much of an `attend` lies in VMEM at a time: block sizes chosen from the problem and the chip."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lineshaft_contract.problems import AttendProblem, itemsize
from lineshaft_tpu.chips import MIB, Chip
from lineshaft_tpu.tiling import LANES, padded, sublanes

LIVE_BITS = 32
"""Most pages of a block of keys: one bit of an int32 says for each whether it was fetched."""

KEYS = 512
ROWS = 512
BUDGET = 24 * MIB
"""What a kernel plans with, at most and if half of the chip's VMEM is more: the rest is the compiler's own."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of one `attend`.

    heads  key heads of a grid step
    rows   matrix rows of a block of queries: consecutive tokens, `group` query heads each
    small  matrix rows of the window that serves a sequence with a query or few in the block; divides `rows`
    pages  pages of a block of keys
    group  query heads of a key head
    """

    heads: int
    rows: int
    small: int
    pages: int
    group: int

    @property
    def tokens(self) -> int:
        """Query tokens of a block."""
        return self.rows // self.group


def blocks(problem: AttendProblem, chip: Chip) -> Blocks:
    """The largest blocks that VMEM holds, up to ROWS rows and KEYS keys.

    A block of queries is no longer than the longest query or all tokens; each core of the chip gets its own key heads.
    Made smaller until they fit: the key heads of a step, then the rows, then the keys.
    """
    group = problem.q_heads // problem.kv_heads
    small = math.lcm(group, sublanes(problem.dtype))
    longest = max(min(problem.max_query or problem.tokens, problem.tokens), 1) * group
    rows = padded(min(longest, ROWS), small)
    pages = max(1, min(LIVE_BITS, KEYS // problem.page_size, problem.pages))
    heads = problem.kv_heads // (chip.cores if problem.kv_heads % chip.cores == 0 else 1)
    found = Blocks(heads, rows, small, pages, group)
    while vmem_bytes(problem, found) > budget(chip):
        smaller = _smaller(problem, found)
        if smaller == found:
            break
        found = smaller
    return found


def budget(chip: Chip) -> int:
    """Bytes of VMEM that blocks may take."""
    return min(chip.vmem // 2, BUDGET)


def _smaller(problem: AttendProblem, found: Blocks) -> Blocks:
    if found.heads > 1:
        return replace(found, heads=next(n for n in range(found.heads - 1, 0, -1) if problem.kv_heads % n == 0))
    if found.rows > found.small:
        return replace(found, rows=padded(found.rows // 2, found.small))
    return replace(found, pages=max(1, found.pages // 2))


def vmem_bytes(problem: AttendProblem, sizes: Blocks) -> int:
    """What the buffers and intermediate results of a grid step take."""
    wide, keys = itemsize(problem.dtype), sizes.pages * problem.page_size
    dim, v_dim = padded(problem.qk_dim, LANES), padded(problem.v_dim, LANES)
    stored = dim if problem.value_in_key else dim + v_dim
    pages = 2 * sizes.heads * keys * stored * itemsize(problem.kv_dtype)
    lse = 2 * LANES * 4 if problem.return_lse else 0
    sinks = 2 * LANES * 4 if problem.sinks else 0
    queries = sizes.heads * sizes.rows * (2 * (dim + v_dim) * wide + lse + sinks)
    state = sizes.heads * sizes.rows * (v_dim + 2 * LANES) * 4
    products = 4 * sizes.rows * padded(keys, LANES) * 4 + 2 * keys * (dim + v_dim) * 4
    return pages + queries + state + products


def smem_bytes(problem: AttendProblem) -> int:
    """What the scalars of a call take: the page table, lengths, query starts and the list of pairs."""
    group = problem.q_heads // problem.kv_heads
    small = math.lcm(group, sublanes(problem.dtype)) // group  # tokens of the smallest block there can be
    pairs = problem.rows + -(-problem.tokens // small)
    return 4 * (problem.rows * problem.pages + 2 * problem.rows + 2 + 2 * pairs)
