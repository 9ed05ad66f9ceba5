"""What most families are: layers of one attention and one gated MLP, told apart by their windows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lineshaft.models.attention import Attention, Rope
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.family import BuildContext
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import Config, Sizes, activation, groups, rope


def attentions(
    context: BuildContext, sizes: Sizes, windows: Sequence[int], full: Rope, local: Rope | None = None, **more: Any
) -> list[Attention]:
    """The attention of each layer, told apart by its window: layers with one have the rotary embedding `local` where it
    is given, else `full`, as those without. `more` are fields that all have in common."""
    of_window = full if local is None else local
    return [
        Attention(
            context=context, shape=sizes.shape, head_dim=sizes.head_dim, max_position=sizes.max_position,
            kind="local" if window else "", window=window, group=group, rope=of_window if window else full, **more,
        )
        for window, group in zip(windows, groups(windows), strict=True)
    ]  # fmt: skip


def plain(
    config: Config, context: BuildContext, windows: Sequence[int] = (), *,
    mlp_bias: bool = False, head_norm: bool = False, fused: bool = False, **more: Any,
) -> Decoder:  # fmt: skip
    """A decoder as `config` says; `windows`: of each layer, none where not given; `more` are fields of its attention.

    Raises LayoutError, CorruptCheckpoint, UnknownArchitecture.
    """
    sizes = Sizes.read(config)
    shape, norm = sizes.shape, RmsNorm(context, sizes.shape.hidden, sizes.eps)
    of_heads = RmsNorm(context, sizes.head_dim, sizes.eps) if head_norm else None
    windows = windows or [0] * sizes.layers
    found = attentions(context, sizes, windows, rope(config, context), head_norm=of_heads, fused=fused, **more)
    mlp = GatedMlp(
        context=context, hidden=shape.hidden, width=shape.intermediate, activation=activation(config), bias=mlp_bias,
        fused=fused,
    )  # fmt: skip
    return Decoder(context, sizes, [Layer(attention, mlp, norm) for attention in found], norm)
