"""A session's weights: which leaves each parameter has, where they lie in one flat list, and how they are replaced.

Programs take the flat list as arguments, so that values can change without a program being compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lineshaft_contract.errors import MisshapenTensor
from lineshaft_contract.sessions import Packing, Tree, leaves, map_tree
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_jax.arrays import HostArray
from lineshaft_jax.packing import host_leaves

Place = Callable[[Param, Packing], Mapping[str, Any]]
"""Puts a parameter's leaves where they are to be."""


@dataclass(frozen=True)
class Source:
    """The leaves of one source in one packing: indices into the flat list, by name."""

    param: Param
    packing: Packing
    leaves: Mapping[str, int]


@dataclass
class Weights:
    """`tree` has a Weight, or for a const Param an index, in the place of each Param; `arrays` is the flat list, and
    `own` says of each array whether it differs from rank to rank."""

    tree: Tree = field(default_factory=dict)
    arrays: list[Any] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    _sources: dict[tuple[Any, ...], Source] = field(default_factory=dict)
    _names: dict[str, Param] = field(default_factory=dict)

    def load(self, params: Tree, packings: Mapping[str, Packing], place: Place) -> None:
        """Place every Param once; those of equal source, packing, shape and dtype share their leaves."""

        keys: dict[str, int] = {}

        def one(param: Param) -> Weight | int:
            packing = packings.get(param.name, Packing())
            same = (param.source_id, packing.layout, param.shape, param.dtype)
            if same not in self._sources:
                self._sources[same] = Source(param, packing, self._add(place(param, packing), bool(param.varies)))
            self._names[param.name] = param
            key, found = keys.setdefault(param.name, len(keys)), dict(self._sources[same].leaves)
            if "const" in param.problems:
                return found["data"]
            return Weight(key, param.name, param.problems, packing.layout, found)

        self.tree = map_tree(one, params)

    def _add(self, leaves: Mapping[str, Any], own: bool) -> dict[str, int]:
        first = len(self.arrays)
        self.arrays += leaves.values()
        self.own += [own] * len(leaves)
        return {name: first + i for i, name in enumerate(leaves)}

    def places(self) -> list[Any]:
        """Which arrays each Param has: those of one source share them, and a program is made for that."""
        return [item if isinstance(item, int) else item.arrays for item in leaves(self.tree)]

    def dressed(self, arrays: Sequence[Any]) -> Tree:
        """The tree with the arrays of a list like `self.arrays` in it: Weights, and bare arrays for const Params."""

        def one(item: Weight | int) -> Any:
            if isinstance(item, int):
                return arrays[item]
            return replace(item, arrays={name: arrays[index] for name, index in item.arrays.items()})

        return map_tree(one, self.tree)

    def repacked(
        self, name: str, values: HostArray, ranks: int
    ) -> Iterator[tuple[Source, list[Mapping[str, HostArray]]]]:
        """Each packing of the named parameter's source, with its new host leaves: a share of each rank, or one for all.

        Raises MisshapenTensor for a name that is not loaded, or another shape.
        """
        if name not in self._names:
            raise MisshapenTensor(f"update of {name!r}: no such parameter is loaded; load it first")
        of_source = self._names[name].source_id
        for source in self._sources.values():
            param = source.param
            if param.source_id != of_source:
                continue
            shared = ranks == 1 or not param.varies
            wanted = param.shape if shared else (ranks, *param.shape)
            if tuple(values.shape) != wanted:
                raise MisshapenTensor(
                    f"update of {name!r}: shape {list(values.shape)}, not {list(wanted)}; another shape needs load"
                )
            shares = [values] if shared else list(values)
            stored = [Local((Stored("none", param.shape, {"data": share}),)) for share in shares]
            yield source, [host_leaves(param, local, source.packing) for local in stored]
