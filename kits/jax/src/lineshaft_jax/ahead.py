"""Sessions for devices that are not here: shapes in the place of values, programs that are compiled and never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax

from lineshaft_contract.backends import World
from lineshaft_contract.errors import Unsupported
from lineshaft_contract.packing import empty_share
from lineshaft_contract.sessions import Capture, Handle, Packing, SessionState, Transfer
from lineshaft_contract.steps import HostStep
from lineshaft_contract.weights import Checkpoint, Param
from lineshaft_jax.packing import host_leaves
from lineshaft_jax.program import JaxProgram
from lineshaft_jax.session import JaxSession, SessionOptions

Inspect = Callable[[Callable[[], str]], Mapping[str, str | int]]
"""What to tell of a compiled program beside memory and work, from its text."""


class AheadSession(JaxSession):
    """A session on devices to compile for: `load` reads no tensor, `capture` compiles, nothing runs."""

    def __init__(
        self,
        world: World,
        devices: Sequence[Any],
        options: SessionOptions,
        inspect: Inspect = lambda text: {},
    ) -> None:
        super().__init__(world, devices, options)
        self._inspect = inspect
        self._shapes: dict[Any, dict[str, Any]] = {}

    def place(self, checkpoint: Checkpoint, param: Param, packing: Packing) -> dict[str, Any]:
        """The shapes of a parameter's leaves, which depend on nothing else of it than its own shape and dtype."""
        same = (param.shape, param.dtype, packing)
        if same not in self._shapes:
            self._shapes[same] = host_leaves(param, empty_share(param), packing)
        own = bool(param.varies)
        return {name: self._shape(leaf.shape, leaf.dtype, own=own) for name, leaf in self._shapes[same].items()}

    def _shape(self, shape: tuple[int, ...], dtype: Any, *, own: bool) -> jax.ShapeDtypeStruct:
        place = self.placement
        if own:
            return jax.ShapeDtypeStruct(place.joined(shape), dtype, sharding=place.own)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place.shared)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return self._shape(shape, dtype, own=True)

    def make_program(self, capture: Capture) -> AheadProgram:
        return AheadProgram(self, capture)

    def inspect(self, text: Callable[[], str]) -> Mapping[str, str | int]:
        return self._inspect(text)

    def freeze(self) -> None:
        SessionState.freeze(self)

    def update(self, weights: Mapping[str, Any]) -> NoReturn:
        refuse("update")

    def read_pages(self, cache: int, ids: Any) -> NoReturn:
        refuse("read_pages")

    def write_pages(self, cache: int, ids: Any, pages: Mapping[str, Any]) -> NoReturn:
        refuse("write_pages")

    def copy_pages(self, group: int, src: Any, dst: Any) -> NoReturn:
        refuse("copy_pages")


class AheadProgram(JaxProgram):
    """A program that was compiled for devices that are not here."""

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Handle] | None = None, after: Sequence[Transfer] = ()
    ) -> NoReturn:
        refuse("a program's call")


def refuse(what: str) -> NoReturn:
    """Raises Unsupported."""
    raise Unsupported(f"{what}: the session compiles ahead of time, for devices that are not here; nothing runs on it")
