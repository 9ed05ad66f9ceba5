"""Largest, first and leading values of rows, without a sort: all shapes are static, and all integers of 32 bits.

Values are compared as floats, which the device compares exactly; integers count, and are exact below 2^24.
"""

from __future__ import annotations

import torch

DIGIT = 2
"""Bits that one pass of a search settles: it compares each value with 2^DIGIT - 1 borders at once."""
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits of a float32 that no value of the dtype uses."""

Measure = tuple[torch.Tensor, torch.Tensor]
"""What values weigh, f32[R, V] or f32[1, V] and never negative, and how much of it may be gathered, f32[R, 1]."""


def iota(count: int, device: torch.device) -> torch.Tensor:
    """int32[count]: 0, 1, 2, ..."""
    return torch.arange(count, dtype=torch.int32, device=device)


def first(found: torch.Tensor) -> torch.Tensor:
    """found bool[R, V] -> int32[R]: the lowest index of each row, or V."""
    count = found.shape[-1]
    return torch.where(found, iota(count, found.device), count).amin(-1)


def are_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """x [R, V] without NaN -> bool[R, V]: the k largest of each row; of equal ones the lowest indices."""
    border = torch.topk(x, k).values.amin(-1, keepdim=True)
    above, level = x > border, x == border
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


def largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """x [R, V] -> int32[R, k]: indices of the k largest, descending, ties to the lowest. A row with a NaN gets some
    indices below V."""
    count = x.shape[-1]
    marks = torch.where(are_largest(x, k), count - iota(count, x.device).float(), 0.0)  # distinct: no ties among them
    ids = (count - torch.topk(marks, k).values).to(torch.int32).clamp(max=count - 1)
    values = x.gather(-1, ids.long())
    mine, other, slots = values[..., None], values[..., None, :], iota(k, x.device)
    ahead = (other > mine) | ((other == mine) & (slots < slots[:, None]))
    place = ahead.sum(-1, dtype=torch.int32)
    ordered = torch.where(place[..., None, :] == slots[:, None], ids[..., None, :], 0).sum(-1, dtype=torch.int32)
    return ordered.clamp(max=count - 1)


def reaching(x: torch.Tensor, measure: Measure, unused_bits: int = 0) -> torch.Tensor:
    """x f32[R, V] without NaN -> f32[R, 1]: the largest value at and above which the row's measure comes to its limit;
    -inf where all of it does not.

    A search through the bits of a float32, from the sign down: clearing bits of a negative one raises it, as setting
    those of a positive one does. `unused_bits` low ones are 0 in every finite x.
    """
    weights, limit = (part[:, None] for part in measure)
    values = x[:, None]

    def reached(borders: torch.Tensor) -> torch.Tensor:
        """borders f32[R, n, 1] -> bool[R, n, 1]; one that is a NaN never is."""
        return torch.where(values >= borders, weights, 0.0).sum(-1, keepdim=True) >= limit

    bits = (reached(torch.zeros_like(limit)).to(torch.int32) - 1) << unused_bits
    for high in range(31, unused_bits, -DIGIT):
        low = max(high - DIGIT, unused_bits)
        steps = torch.arange(1 << low, 1 << high, 1 << low, dtype=torch.int32, device=x.device)[:, None]
        digit = reached((bits ^ steps).view(torch.float32)).sum(1, keepdim=True, dtype=torch.int32)
        bits = bits ^ (digit << low)
    border = bits[:, 0].view(torch.float32)
    return torch.where(border.isnan(), -torch.inf, border)


def above(x: torch.Tensor, border: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """f32[R, 1]: what the values of x [R, V] above the border [R, 1] weigh."""
    return torch.where(x > border, weights, 0.0).sum(-1, keepdim=True)


def leading(x: torch.Tensor, border: torch.Tensor, *measures: Measure) -> torch.Tensor:
    """bool[R, V]: the values of x [R, V] above the border [R, 1], and of those at it, from the lowest index on, each
    before which less than the limit of every measure has been gathered."""
    level = x == border
    rank = level.cumsum(-1, dtype=torch.float32) - 1
    for weights, limit in measures:
        level = level & (above(x, border, weights) + rank * weights < limit)
    return (x > border) | level
