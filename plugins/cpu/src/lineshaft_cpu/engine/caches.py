"""How the engine lays paged caches out, and what a page of one is in canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np

from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_cpu.engine.memory import Region

SLOTS: Final = "slots"
PANELS: Final = "cpu_pages"
SCALES: Final = ("k_scale", "v_scale")


class CacheLayout(Protocol):
    """`ids` are int64[n]; canonical pages are [n, page, Hkv, ...]."""

    def arrays(self, problem: KVProblem, pages: int, region: Region) -> dict[str, HostArray]:
        """Zeroed arrays of so many pages."""
        ...

    def read(self, cache: Cache, ids: HostArray) -> dict[str, HostArray]: ...

    def write(self, cache: Cache, ids: HostArray, pages: Mapping[str, HostArray]) -> None: ...

    def copy(self, cache: Cache, src: HostArray, dst: HostArray) -> None:
        """Reads all sources before it writes."""
        ...


class Slots:
    """The canonical arrays, a row of heads for each slot: {"k": [N, page, Hkv, D], "v": [N, page, Hkv, Dv], ...}."""

    def arrays(self, problem: KVProblem, pages: int, region: Region) -> dict[str, HostArray]:
        return {name: region.zeros((pages, *shape), dtype) for name, (shape, dtype) in problem.page_arrays.items()}

    def read(self, cache: Cache, ids: HostArray) -> dict[str, HostArray]:
        return {name: array[ids] for name, array in cache.arrays.items()}

    def write(self, cache: Cache, ids: HostArray, pages: Mapping[str, HostArray]) -> None:
        for name, values in pages.items():
            cache.arrays[name][ids] = values

    def copy(self, cache: Cache, src: HostArray, dst: HostArray) -> None:
        for array in cache.arrays.values():
            array[dst] = array[src]


class Panels:
    """Panels of `native/linear.h` for each head of a page, over the keys and over the values: k [N, Hkv, D / 2, page,
    2] and v [N, Hkv, page / 2, Dv, 2] where bfloat16 is executed, without the pairs where float32 is; codes lie as the
    numbers do. Scales that are stored are [N, Hkv, page]."""

    def arrays(self, problem: KVProblem, pages: int, region: Region) -> dict[str, HostArray]:
        pair, heads, size = pair_of(problem), problem.kv_heads, problem.page_size
        shapes = {
            "k": (pages, heads, problem.qk_dim // pair, size, pair),
            "v": (pages, heads, size // pair, problem.v_dim, pair),
            **dict.fromkeys(SCALES, (pages, heads, size)),
        }  # fmt: skip
        return {name: region.zeros(shapes[name], dtype) for name, (_, dtype) in problem.page_arrays.items()}

    def read(self, cache: Cache, ids: HostArray) -> dict[str, HostArray]:
        """k from [n, H, D / 2, page, 2], v from [n, H, page / 2, Dv, 2], scales from [n, H, page]."""
        problem, out = cache.problem, {}
        assert isinstance(problem, KVProblem)
        for name, (shape, _) in problem.page_arrays.items():
            axes = (0, 2, 1) if name in SCALES else (0, 3, 1, 2, 4) if name == "k" else (0, 2, 4, 1, 3)
            out[name] = np.ascontiguousarray(cache.arrays[name][ids].transpose(axes)).reshape(len(ids), *shape)
        return out

    def write(self, cache: Cache, ids: HostArray, pages: Mapping[str, HostArray]) -> None:
        """k from [n, page, H, D], v from [n, page, H, Dv], scales from [n, page, H]."""
        for name, values in pages.items():
            held = cache.arrays[name]
            if name in SCALES:
                held[ids] = values.transpose(0, 2, 1)
                continue
            n, size, heads, dim = values.shape
            pair = held.shape[-1]
            if name == "k":
                held[ids] = values.reshape(n, size, heads, dim // pair, pair).transpose(0, 2, 3, 1, 4)
            else:
                held[ids] = values.reshape(n, size // pair, pair, heads, dim).transpose(0, 3, 1, 4, 2)

    def copy(self, cache: Cache, src: HostArray, dst: HostArray) -> None:
        for array in cache.arrays.values():
            array[dst] = array[src]


def pair_of(problem: KVProblem) -> int:
    """Numbers that lie together in a panel."""
    return 2 if problem.dtype == "bfloat16" else 1


LAYOUTS: Final[Mapping[str, CacheLayout]] = MappingProxyType({SLOTS: Slots(), PANELS: Panels()})
