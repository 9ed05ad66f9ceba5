"""A decoder made of blocks: embedding, layers of attention and MLP between norms, final norm and head.

Owns the flow of the residual and what surrounds the layers; the blocks are given, and no family is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lineshaft.models import shards
from lineshaft.models.family import BuildContext, Uses
from lineshaft.models.parameters import RmsNorm, const
from lineshaft.models.reading import Sizes
from lineshaft_contract.problems import EmbedProblem, KVProblem, LinearProblem, Problem
from lineshaft_contract.sessions import Cache, Tree
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Array, Param


class Block(Protocol):
    """What every block declares. `source` is the layer's prefix in the checkpoint, `name` the one of its weights."""

    def params(self, source: str, name: str) -> Tree: ...

    def uses(self) -> Uses: ...


class AttentionBlock(Block, Protocol):
    """x [T, H] -> out [T, H], which has left the layout, and the cache after the step's writes."""

    def cache(self) -> KVProblem: ...

    def __call__(self, ops: Any, w: Tree, x: Array, cache: Cache, step: StepInputs) -> tuple[Array, Cache]: ...


class MlpBlock(Block, Protocol):
    """x [T, H] -> out [T, H], which has left the layout."""

    def __call__(self, ops: Any, w: Tree, x: Array) -> Array: ...


@dataclass(frozen=True)
class Norms:
    """What a layer's norms are called in the checkpoint, before each block and, where there is one, after it."""

    attend_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    after_attend: str = ""
    after_mlp: str = ""

    def items(self) -> Iterable[tuple[str, str]]:
        """(name of the weight, name in the checkpoint)."""
        return ((name, source) for name, source in vars(self).items() if source)


@dataclass(frozen=True)
class Layer:
    """One layer's blocks, and the norm that all of its norms are like."""

    attention: AttentionBlock
    mlp: MlpBlock
    norm: RmsNorm
    norms: Norms = Norms()

    def __call__(
        self, ops: Any, w: Tree, x: Array, r: Array | None, cache: Cache, step: StepInputs
    ) -> tuple[Array, Array, Cache]:
        """x [T, H]: the last block's output, not yet added to the residual r [T, H] (None before the first block)."""
        h, r = (ops.rms_norm(x, w["attend_norm"]), x) if r is None else ops.add_rms_norm(x, r, w["attend_norm"])
        x, cache = self.attention(ops, w["attend"], h, cache, step)
        x = ops.rms_norm(x, w["after_attend"]) if self.norms.after_attend else x
        h, r = ops.add_rms_norm(x, r, w["mlp_norm"])
        x = self.mlp(ops, w["mlp"], h)
        return ops.rms_norm(x, w["after_mlp"]) if self.norms.after_mlp else x, r, cache

    def params(self, source: str, name: str) -> Tree:
        norms = {key: self.norm.param(name + key, f"{source}{word}.weight") for key, word in self.norms.items()}
        return {**norms, "attend": self.attention.params(source, name), "mlp": self.mlp.params(source, name)}


class Decoder:
    """A `Model` of layers. `embed_scale` multiplies the embedding and not a head tied to it."""

    def __init__(
        self, context: BuildContext, sizes: Sizes, layers: Sequence[Layer], norm: RmsNorm, *, embed_scale: float = 1.0
    ) -> None:
        """Raises LayoutError for degrees that the shape does not allow."""
        context.degrees.validate(sizes.shape)
        self.context, self.sizes, self.layers = context, sizes, tuple(layers)
        self.norm, self.embed_scale = norm, embed_scale
        self.shape, self.max_position = sizes.shape, sizes.max_position
        self.vocab_share = -(-sizes.shape.vocab // context.degrees.tp)  # the last ranks' are padded

    # ---- the forward -------------------------------------------------------------------------------------------

    def forward(self, ops: Any, weights: Tree, caches: Sequence[Cache], step: StepInputs) -> tuple[Array, list[Cache]]:
        """Logits [R, V] of the step's logit rows, and the caches after the step's writes."""
        x = self.context.layout.leave(ops, ops.embed(step.token_ids, weights["embed"], weights["vocab_start"]))
        r, written = None, []
        for layer, w, cache in zip(self.layers, weights["layers"], caches, strict=True):
            x, r, after = layer(ops, w, x, r, cache, step)
            written.append(after)
        x, _ = ops.add_rms_norm(x, r, weights["norm"])
        x = ops.gather_rows(x, step.logit_rows)
        logits = self.context.layout.logits(ops, ops.linear(self.context.layout.enter(ops, x), weights["head"]))
        return logits[:, : self.shape.vocab], written

    # ---- declarations ------------------------------------------------------------------------------------------

    def uses(self) -> Uses:
        """What all blocks declare; blocks that share a name share the problem."""
        found: dict[str, tuple[str, Problem]] = {}
        for layer in self.layers:
            for name, use in (*layer.attention.uses().items(), *layer.mlp.uses().items()):
                assert found.setdefault(name, use) == use, f"two problems are called {name!r}: give a block a kind"
        return found

    def caches(self) -> Sequence[KVProblem]:
        """One for each layer."""
        return [layer.attention.cache() for layer in self.layers]

    def params(self) -> Tree:
        dtype, share, hidden = self.context.dtype, self.vocab_share, self.shape.hidden
        embed = "model.embed_tokens.weight"
        head = embed if self.sizes.tied else "lm_head.weight"
        start = shards.constant(lambda at: [at.tp * share])
        scheme = self.context.stored_scheme(self._rows(head))
        table = EmbedProblem(dtype=dtype, vocab=share, width=hidden, scale=self.embed_scale)
        return {
            "embed": self._vocab("embed", embed, {"embed": table}),
            "vocab_start": const(self.context, "vocab_start", (1,), start, "int32"),
            "layers": [layer.params(f"model.layers.{i}.", f"layers.{i}.") for i, layer in enumerate(self.layers)],
            "norm": self.norm.param("norm", "model.norm.weight"),
            "head": self._vocab("head", head, {"linear": LinearProblem(dtype=dtype, n=share, k=hidden, scheme=scheme)}),
        }

    def _vocab(self, name: str, source: str, problems: Mapping[str, Problem]) -> Param:
        """A table of the vocabulary. Where the head is tied, both are of one source, each in the packing it likes."""
        shape = (self.vocab_share, self.shape.hidden)
        return Param(name, source, shape, self.context.dtype, problems, self._rows(source), varies=("tp",))

    def _rows(self, source: str) -> shards.Shard:
        return shards.padded_rows(source, (self.shape.vocab, self.shape.hidden), self.vocab_share)
