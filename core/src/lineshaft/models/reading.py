"""Readers of config.json that families share: sizes, flags, windows of layers and rotary embeddings, each checked.

Owns what a wrong value is told as; knows no family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def value(config: Config, key: str, default: Any, valid: Callable[[Any], bool], allowed: str) -> Any:
    """What the config has, or `default` where it has nothing or null. Raises CorruptCheckpoint that says what is
    allowed."""
    given = config.get(key)
    given = default if given is None else given
    if not valid(given):
        raise CorruptCheckpoint(f"config.json: {key} is {given!r:.80}, it must be {allowed}")
    return given


def count(config: Config, key: str, default: int | None = None) -> int:
    """A whole number above 0. Raises CorruptCheckpoint."""
    most = MOST.get(key, 1 << 31)
    allowed = f"a whole number from 1 to {most}"
    return int(value(config, key, default, lambda given: type(given) is int and 1 <= given <= most, allowed))


def some(config: Config, key: str) -> int:
    """A count that may be absent, null or 0. Raises CorruptCheckpoint."""
    return count(config, key) if config.get(key) else 0


def flag(config: Config, key: str, default: bool = False) -> bool:
    """Raises CorruptCheckpoint for what is no boolean."""
    return bool(value(config, key, default, lambda given: isinstance(given, bool), "true or false"))


def number(config: Config, key: str, default: float | None = None) -> float:
    """A finite number above 0. Raises CorruptCheckpoint."""
    return float(value(config, key, default, _is_positive, "a finite number above 0"))


def _is_positive(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < 1e30


def activation(config: Config, key: str = "hidden_act") -> str:
    """A word of `mlp.ACTIVATIONS`. Raises UnknownArchitecture for another."""
    word = config.get(key)
    word = "silu" if word is None else word
    if not isinstance(word, str) or word not in ACTIVATIONS:
        raise UnknownArchitecture(f"config.json: {key} is {word!r:.80}; known are {', '.join(ACTIVATIONS)}")
    return word


# ---- windows -----------------------------------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_windows(config: Config, layers: int, local: Callable[[int], bool], enabled: bool = True) -> list[int]:
    """The sliding window of each layer, 0 for one without: of those that layer_types calls so, or else that `local`
    says. Raises CorruptCheckpoint, and UnknownArchitecture for another kind of layer."""
    usual = [SLIDING if local(layer) else FULL for layer in range(layers)]
    allowed = f"a list that names each of {layers} layers"
    kinds = value(
        config, "layer_types", usual, lambda given: isinstance(given, list | tuple) and len(given) == layers, allowed
    )
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise UnknownArchitecture(f"config.json: layer type {kind!r:.80}; known are {FULL} and {SLIDING}")
    size = window(config) if enabled else 0
    return [size if kind == SLIDING else 0 for kind in kinds]


def window(config: Config) -> int:
    """The sliding window in tokens, the query included; 0 where there is none."""
    return some(config, "sliding_window")


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
    base = number(given, "rope_theta", number(config, "rope_theta", base))
    share = number({**config, **given}, "partial_rotary_factor", 1.0)
    scaling, attention_factor = _scaling(given, config, context)
    return Rope(base, scaling, share, attention_factor)


def rope_table(config: Config, layer_type: str = "") -> Config:
    """What the config says of rotary embeddings, under its older name or its newer one, flat or by type of layer."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(given, Mapping) and layer_type in given:
        given = given[layer_type] or {}
    if not isinstance(given, Mapping):
        raise CorruptCheckpoint(f"config.json: rope_scaling is {given!r:.80}, it must be a table")
    return given


def _scaling(given: Config, config: Config, context: BuildContext) -> tuple[RopeScaling, float]:
    """How frequencies are scaled, and queries and keys with them."""
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "su" or "long_factor" in given:  # what LongRoPE was called before
        kind = "longrope"
    match kind:
        case "default":
            return RopeScaling(), 1.0
        case "divisors":
            return RopeScaling(freq_factors=_factors(given, "divisors")), 1.0
        case "linear":
            return RopeScaling(kind=kind, factor=number(given, "factor")), 1.0
        case "llama3":
            factor, original = number(given, "factor"), _original(given, config)
            low, high = number(given, "low_freq_factor"), number(given, "high_freq_factor")
            scaling = RopeScaling(
                kind=kind, factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
            )
            return scaling, 1.0
        case "yarn":
            return _yarn(given, config)
        case "longrope":
            return _longrope(given, config, context)
    hint = "; a scaling that changes while a text grows would make cached keys wrong: set a fixed one (yarn, linear)"
    raise UnknownArchitecture(
        f"config.json: rope_type {kind!r:.80}; known are default, linear, llama3, yarn, longrope, divisors"
        f"{hint if kind == 'dynamic' else ''}"
    )


def _original(given: Config, config: Config) -> int:
    """The context that the model was first trained for."""
    key = "original_max_position_embeddings"
    return count(config, key) if config.get(key) else count(given, key, config.get("max_position_embeddings"))


def _factors(given: Config, key: str) -> tuple[float, ...]:
    def valid(values: object) -> bool:
        return isinstance(values, list | tuple) and all(map(_is_positive, values))

    return tuple(map(float, value(given, key, None, valid, "a list of numbers above 0")))


def _yarn(given: Config, config: Config) -> tuple[RopeScaling, float]:
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
    usual = yarn_scale(factor)
    if given.get("mscale") and given.get("mscale_all_dim"):
        usual = yarn_scale(factor, number(given, "mscale")) / yarn_scale(factor, number(given, "mscale_all_dim"))
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
