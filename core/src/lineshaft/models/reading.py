"""Readers of config.json that families share: sizes, flags, windows of layers and rotary embeddings, each checked.

Owns what a wrong value is told as; knows no family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from lineshaft.errors import CorruptCheckpoint, UnknownArchitecture
from lineshaft.layout import ModelShape
from lineshaft.models.attention import Rope
from lineshaft.models.family import BuildContext
from lineshaft.models.mlp import ACTIVATIONS
from lineshaft_contract.problems import RopeScaling

Config = Mapping[str, Any]

MOST: Final = MappingProxyType({"num_hidden_layers": 1000, "max_position_embeddings": 1 << 24})
"""No model is near these; a larger number is a damaged file, and would be built before any tensor is looked for."""


@dataclass(frozen=True)
class Sizes:
    """The numbers that every decoder has, in the words of its config.json."""

    shape: ModelShape
    layers: int
    head_dim: int
    eps: float
    max_position: int
    tied: bool

    @classmethod
    def read(cls, config: Config) -> Sizes:
        """Raises CorruptCheckpoint for a missing or absurd number."""
        hidden, q_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
        kv_heads = count(config, "num_key_value_heads", q_heads)
        if q_heads % kv_heads:
            raise CorruptCheckpoint(f"config.json: {kv_heads} kv heads do not divide {q_heads} attention heads")
        vocab, width = count(config, "vocab_size"), count(config, "intermediate_size")
        return cls(
            shape=ModelShape(q_heads, kv_heads, hidden, width, vocab),
            layers=count(config, "num_hidden_layers"),
            head_dim=count(config, "head_dim", hidden // q_heads),
            eps=number(config, "rms_norm_eps", 1e-6),
            max_position=count(config, "max_position_embeddings", 2048),
            tied=flag(config, "tie_word_embeddings"),
        )


def refuse_variants(config: Config, only: Config, family: str) -> None:
    """`only` has keys that change what is computed, each with the one value that the family computes; a key may be
    absent or null. Raises UnknownArchitecture for another value."""
    for key, value in only.items():
        given = config.get(key)
        if given is not None and given != value and (given or value):  # nothing, however written, is None or False
            raise UnknownArchitecture(
                f"config.json: {key} is {given!r:.80}; the {family} family computes {key} = {json.dumps(value)} only, "
                "another needs a family of its own"
            )


def count(config: Config, key: str, default: int | None = None) -> int:
    """A whole number above 0. Raises CorruptCheckpoint."""
    value = config.get(key)
    value = default if value is None else value
    most = MOST.get(key, 1 << 31)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, it must be a whole number from 1 to {most}")
    return value


def flag(config: Config, key: str, default: bool = False) -> bool:
    """Raises CorruptCheckpoint for what is no boolean."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, it must be true or false")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A finite number above 0. Raises CorruptCheckpoint."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, it must be a finite number above 0")
    return float(value)


def activation(config: Config, key: str = "hidden_act") -> str:
    """A word of `mlp.ACTIVATIONS`. Raises UnknownArchitecture for another."""
    word = config.get(key) or "silu"
    if word not in ACTIVATIONS:
        raise UnknownArchitecture(f"config.json: {key} is {word!r:.80}; known are {', '.join(ACTIVATIONS)}")
    return str(word)


# ---- windows -----------------------------------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: Config, layers: int, default: Sequence[str]) -> Sequence[str]:
    """FULL or SLIDING for each layer. Raises CorruptCheckpoint, and UnknownArchitecture for another kind of layer."""
    given = config.get("layer_types")
    given = default if given is None else given
    if not isinstance(given, (list, tuple)) or len(given) != layers:
        raise CorruptCheckpoint(f"config.json: layer_types is {given!r:.80}, it must name each of {layers} layers")
    for kind in given:
        if kind not in (FULL, SLIDING):
            raise UnknownArchitecture(f"config.json: layer type {kind!r:.80}; known are {FULL} and {SLIDING}")
    return given


def window(config: Config) -> int:
    """The sliding window in tokens, the query included; 0 where there is none."""
    return count(config, "sliding_window") if config.get("sliding_window") else 0


def groups(windows: Sequence[int]) -> list[int]:
    """The cache group of each layer: layers of one window share a group, numbered in their order."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(size, len(numbers)) for size in windows]


# ---- rotary embeddings -------------------------------------------------------------------------------------------


def rope(config: Config, context: BuildContext, layer_type: str = "", base: float = 10000.0) -> Rope:
    """The rotary embedding, of layers of `layer_type` where the config tells them apart; `base`: where it has none.

    Raises CorruptCheckpoint for a missing or absurd number, UnknownArchitecture for an unknown kind.
    """
    given = rope_table(config, layer_type)
    base = number(given, "rope_theta", config.get("rope_theta") or base)
    share = number({**config, **given}, "partial_rotary_factor", 1.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "su" or "long_factor" in given:  # what LongRoPE was called before
        kind = "longrope"
    if kind not in _KINDS:
        raise UnknownArchitecture(f"config.json: rope_type {kind!r:.80}; known are {', '.join(_KINDS)}{_hint(kind)}")
    scaling, attention_factor = _KINDS[kind](given, config, context)
    return Rope(base, scaling, share, attention_factor)


def rope_table(config: Config, layer_type: str = "") -> Config:
    """What the config says of rotary embeddings, under its older name or its newer one, flat or by type of layer."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(given, Mapping) and layer_type in given:
        given = given[layer_type] or {}
    if not isinstance(given, Mapping):
        raise CorruptCheckpoint(f"config.json: rope_scaling is {given!r:.80}, it must be a table")
    return given


def _hint(kind: str) -> str:
    if kind != "dynamic":
        return ""
    return "; a scaling that changes while a text grows would make cached keys wrong: set a fixed one (yarn, linear)"


def _original(given: Config, config: Config) -> int:
    """The context that the model was first trained for."""
    key = "original_max_position_embeddings"
    return count(config, key) if config.get(key) else count(given, key, config.get("max_position_embeddings"))


def _default(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    return RopeScaling(), 1.0


def _divisors(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    return RopeScaling(freq_factors=_factors(given, "divisors")), 1.0


def _factors(given: Config, key: str) -> tuple[float, ...]:
    values = given.get(key)
    if not isinstance(values, (list, tuple)) or not all(isinstance(f, (int, float)) and f > 0 for f in values):
        raise CorruptCheckpoint(f"config.json: rope {key} are {values!r:.80}, they must be numbers above 0")
    return tuple(map(float, values))


def _linear(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    return RopeScaling(kind="linear", factor=number(given, "factor")), 1.0


def _llama3(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    scaling = RopeScaling(
        kind="llama3",
        factor=number(given, "factor"),
        low_freq_factor=number(given, "low_freq_factor"),
        high_freq_factor=number(given, "high_freq_factor"),
        original_context=_original(given, config),
    )
    return scaling, 1.0


def _yarn(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    original = _original(given, config)
    factor = number(given, "factor", count(config, "max_position_embeddings", original) / original)
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        beta_fast=number(given, "beta_fast", 32.0),
        beta_slow=number(given, "beta_slow", 1.0),
        truncate=flag(given, "truncate", True),
        original_context=original,
    )
    if given.get("mscale") and given.get("mscale_all_dim"):
        usual = yarn_scale(factor, number(given, "mscale")) / yarn_scale(factor, number(given, "mscale_all_dim"))
    else:
        usual = yarn_scale(factor)
    return scaling, number(given, "attention_factor", usual)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN raises queries and keys for a context `factor` times as long (Peng et al., 2023)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    """The long list where texts may be longer than the original context, else the short one: for a whole run, since a
    change in the middle of a text would make cached keys wrong."""
    original, most = _original(given, config), count(config, "max_position_embeddings", 2048)
    longest = most if context.max_model_len is None else context.max_model_len
    short, long = _factors(given, "short_factor"), _factors(given, "long_factor")
    factor = number(given, "factor", most / original)
    usual = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(freq_factors=long if longest > original else short), number(given, "attention_factor", usual)


_KINDS: Final = MappingProxyType(
    {
        "default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
        "divisors": _divisors,
    }
)  # fmt: skip
