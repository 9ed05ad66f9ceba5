"""The Qwen3 family, dense: Llama whose heads of queries and keys are normed before they are rotated."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, ModelFamily
from lineshaft.models.plain import plain
from lineshaft.models.qwen2 import ABSENT as QWEN2_ABSENT
from lineshaft.models.qwen2 import ONLY, qwen_windows
from lineshaft.models.reading import Config, flag, refuse_variants

ABSENT: Final[dict[str, Any]] = {**QWEN2_ABSENT, "head_dim": 128}


def build(config: Config, context: BuildContext) -> Decoder:
    """Build a Qwen3 at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    refuse_variants(config, ONLY, "qwen3")
    config, bias = {**ABSENT, **config}, flag(config, "attention_bias")
    return plain(config, context, qwen_windows(config), head_norm=True, qkv_bias=bias, out_bias=bias)


FAMILY = ModelFamily("qwen3", ("Qwen3ForCausalLM", "qwen3"), build)
