"""How the engine lays paged caches out, and what a page of one is in canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_cpu.engine.memory import Region

SLOTS: Final = "slots"


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


LAYOUTS: Final[Mapping[str, CacheLayout]] = MappingProxyType({SLOTS: Slots()})
