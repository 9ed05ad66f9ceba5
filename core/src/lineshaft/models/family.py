"""What a model family supplies, and how one is found by a checkpoint's architecture."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

from lineshaft.errors import UnknownArchitecture
from lineshaft.layout import Degrees, Layout, ModelShape, TensorParallel
from lineshaft_contract.ops.quantize import BLOCK_SCHEMES, NONE
from lineshaft_contract.problems import KVProblem, Problem
from lineshaft_contract.sessions import Cache, Tree
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Array, Checkpoint, Coordinate, Local

Uses = Mapping[str, tuple[str, Problem]]
"""Name in the forward -> (op, base problem): an op's own name, or one with a suffix where a model needs several."""

STORED: Final = "stored"
"""As `quantization`: weights are multiplied in the blocks that the checkpoint stores them in."""


@dataclass(frozen=True)
class BuildContext:
    """What a model is built for: executed dtype, cache dtype, page size in tokens, parallel degrees, the scheme by
    which the weights of its linear layers are quantized (`LinearProblem.scheme`, or STORED, of what `checkpoint` has),
    and the longest text in tokens that the run allows (None: the model's own limit)."""

    dtype: str
    kv_dtype: str
    page_size: int
    degrees: Degrees
    quantization: str = "none"
    max_model_len: int | None = None
    checkpoint: Checkpoint | None = None

    def stored_scheme(self, shard: Callable[[Checkpoint, Coordinate], Local]) -> str:
        """Under STORED the scheme of the blocks that all parts of a weight are stored in, where products have it; else
        "none"."""
        if self.quantization != STORED or self.checkpoint is None:
            return NONE
        found = {part.scheme for part in shard(self.checkpoint, Coordinate()).parts}
        return found.pop() if len(found) == 1 and found <= BLOCK_SCHEMES.keys() else NONE

    @cached_property
    def layout(self) -> Layout:
        """The communication of these degrees; axes of size 1 disappear here."""
        return TensorParallel() if self.degrees.tp > 1 else Layout()


class Model(Protocol):
    """One model at one layout. `forward` obeys the op contract: static shapes, `ops` calls and slices only."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def max_position(self) -> int: ...  # longest context in tokens

    def params(self) -> Tree: ...  # nested dicts and lists of Param

    def caches(self) -> Sequence[KVProblem]: ...  # numbered by the model, not by layer

    def uses(self) -> Uses: ...

    def forward(
        self, ops: Any, weights: Tree, caches: Sequence[Cache], step: StepInputs
    ) -> tuple[Array, list[Cache]]: ...  # logits [R, V], caches


Build = Callable[[Mapping[str, Any], BuildContext], Model]
"""(config.json, what it is built for) -> the model; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""


@dataclass(frozen=True)
class ModelFamily:
    """A family of architectures; `architectures` are names as in config.json's `architectures` or `model_type`."""

    name: str
    architectures: tuple[str, ...]
    build: Build


def refuse_variants(config: Mapping[str, Any], only: Mapping[str, Any], family: str) -> None:
    """`only` has keys that change what is computed, each with the one value that the family computes; a key may be
    absent or null. Raises UnknownArchitecture for another value."""
    for key, value in only.items():
        given = config.get(key)
        if given is not None and given != value and (given or value):  # nothing, however written, is None or False
            raise UnknownArchitecture(
                f"config.json: {key} is {given!r:.80}; the {family} family computes {key} = {json.dumps(value)} only, "
                "another needs a family of its own"
            )


def checked_family(
    name: str, architectures: tuple[str, ...], build: Build, only: Mapping[str, Any], absent: Mapping[str, Any]
) -> ModelFamily:
    """A family whose `build` gets a config of no variant of `only`, completed with what absent keys mean."""

    def checked(config: Mapping[str, Any], context: BuildContext) -> Model:
        refuse_variants(config, only, name)
        return build({**absent, **config}, context)

    return ModelFamily(name, architectures, checked)


def find_family(config: Mapping[str, Any], families: Sequence[ModelFamily]) -> ModelFamily:
    """The family of a checkpoint's config; raises UnknownArchitecture with the nearest names."""
    listed = config.get("architectures")
    named = [*(listed if isinstance(listed, (list, tuple)) else ()), config.get("model_type") or ""]
    named = [name for name in named if isinstance(name, str)]
    for family in families:
        if any(name in family.architectures for name in named):
            return family
    known = [name for family in families for name in family.architectures]
    given = next((name for name in named if name), "(none given)")
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UnknownArchitecture(f"architecture {given!r:.80}: {hint}known are {', '.join(known)}")
