"""The Llama family: Llama 2 and 3, SmolLM2 and whatever shares their config. Written once against the op contract."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lineshaft.contract.problems import (
    AttendProblem,
    ConstProblem,
    EmbedProblem,
    KVProblem,
    LinearProblem,
    NormProblem,
    Problem,
    RopeProblem,
    RopeScaling,
)
from lineshaft.contract.sessions import Cache, Tree
from lineshaft.contract.steps import StepInputs
from lineshaft.contract.weights import Array, Coordinate, Param
from lineshaft.errors import CorruptCheckpoint, UnknownArchitecture
from lineshaft.layout import ModelShape, choose_layout
from lineshaft.models import shards
from lineshaft.models.family import BuildContext, ModelFamily, Uses


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a Llama checkpoint, in the words of its config.json."""

    shape: ModelShape
    layers: int
    head_dim: int
    eps: float
    rope_base: float
    rope_scaling: RopeScaling
    max_position: int
    tied: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Raises CorruptCheckpoint for a missing or absurd number, UnknownArchitecture for an unknown variant."""
        _refuse_variants(config)
        hidden, q_heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads", q_heads)
        if q_heads % kv_heads:
            raise CorruptCheckpoint(f"config.json: {kv_heads} kv heads do not divide {q_heads} attention heads")
        vocab, width = _count(config, "vocab_size"), _count(config, "intermediate_size")
        base, scaling = _rope(config)
        return cls(
            shape=ModelShape(q_heads, kv_heads, hidden, width, vocab),
            layers=_count(config, "num_hidden_layers"),
            head_dim=_count(config, "head_dim", hidden // q_heads),
            eps=_number(config, "rms_norm_eps", 1e-6),
            rope_base=base,
            rope_scaling=scaling,
            max_position=_count(config, "max_position_embeddings", 2048),
            tied=_flag(config, "tie_word_embeddings"),
        )


ONLY = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
    "sliding_window": None, "quantization_config": None,
}  # fmt: skip
"""Keys that change what is computed, with the one value that this family computes. A key may be absent or null."""


def _refuse_variants(config: Mapping[str, Any]) -> None:
    for key, only in ONLY.items():
        value = config.get(key)
        if value is not None and value != only and (value or only):  # nothing, however it is written, is None or False
            raise UnknownArchitecture(
                f"config.json: {key} is {value!r:.80}; the llama family computes {key} = {json.dumps(only)} only, "
                "another needs a family of its own"
            )


MOST = {"num_hidden_layers": 1000, "max_position_embeddings": 1 << 24}
"""No Llama is near these; a larger number is a damaged file, and would be built before any tensor is looked for."""


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    most = MOST.get(key, 1 << 31)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, it must be a whole number from 1 to {most}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, it must be true or false")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, it must be a finite number above 0")
    return float(value)


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise CorruptCheckpoint(f"config.json: rope_scaling is {given!r:.80}, it must be a table")
    _refuse_variants(given)
    base = _number(config, "rope_theta", given.get("rope_theta", 10000.0))
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return base, RopeScaling()
    if kind == "divisors":
        divisors = given.get("divisors")
        if not isinstance(divisors, (list, tuple)) or not all(isinstance(f, (int, float)) and f > 0 for f in divisors):
            raise CorruptCheckpoint(f"config.json: rope divisors are {divisors!r:.80}, they must be numbers above 0")
        return base, RopeScaling(freq_factors=tuple(map(float, divisors)))
    if kind == "linear":
        return base, RopeScaling(kind="linear", factor=_number(given, "factor"))
    if kind == "llama3":
        return base, RopeScaling(
            kind="llama3",
            factor=_number(given, "factor"),
            low_freq_factor=_number(given, "low_freq_factor"),
            high_freq_factor=_number(given, "high_freq_factor"),
            original_context=_count(given, "original_max_position_embeddings"),
        )
    known = "default, linear, llama3 and divisors"
    raise UnknownArchitecture(f"config.json: rope_type {kind!r}; the llama family has {known}")


class Llama:
    """A decoder of pre-normed attention and gated MLP blocks, at one layout."""

    def __init__(self, config: LlamaConfig, context: BuildContext) -> None:
        self.config, self.context = config, context
        self.shape, self.max_position = config.shape, config.max_position
        self.layout = choose_layout(context.degrees)
        degrees = context.degrees
        share = degrees.heads(config.shape, 0)
        self.q_heads, self.kv_heads = share.q_stop - share.q_start, share.kv_stop - share.kv_start
        self.width = config.shape.intermediate // degrees.tp
        self.vocab_share = degrees.padded_vocab(config.shape.vocab) // degrees.tp

    # ---- the forward -------------------------------------------------------------------------------------------

    def forward(self, ops: Any, weights: Tree, caches: Sequence[Cache], step: StepInputs) -> tuple[Array, list[Cache]]:
        """Logits [R, V] of the step's logit rows, and the caches after the step's writes."""
        x = self.layout.leave(ops, ops.embed(step.token_ids, weights["embed"], weights["vocab_start"]))
        r, written = None, []
        for layer, cache in zip(weights["layers"], caches, strict=True):
            x, r, cache = self.decoder_layer(ops, layer, x, r, cache, step)
            written.append(cache)
        x, _ = ops.add_rms_norm(x, r, weights["norm"])
        x = ops.gather_rows(x, step.logit_rows)
        logits = self.layout.logits(ops, ops.linear(self.layout.enter(ops, x), weights["head"]))
        return logits[:, : self.shape.vocab], written

    def decoder_layer(
        self, ops: Any, w: Tree, x: Array, r: Array | None, cache: Cache, step: StepInputs
    ) -> tuple[Array, Array, Cache]:
        """x [T, H]: the last block's output, not yet added to the residual r [T, H] (None before the first block)."""
        tokens, dim = x.shape[0], self.config.head_dim
        q_end, k_end = self.q_heads * dim, (self.q_heads + self.kv_heads) * dim
        h, r = (ops.rms_norm(x, w["attend_norm"]), x) if r is None else ops.add_rms_norm(x, r, w["attend_norm"])
        qkv = ops.linear(self.layout.enter(ops, h), w["qkv"])
        q = qkv[:, :q_end].reshape(tokens, self.q_heads, dim)
        k = qkv[:, q_end:k_end].reshape(tokens, self.kv_heads, dim)
        v = qkv[:, k_end:].reshape(tokens, self.kv_heads, dim)
        q, k = ops.rope(q, k, step.positions)
        cache = ops.write_kv(cache, k, v, step)
        out = self.layout.attend(ops, q, cache, step)
        x = self.layout.leave(ops, ops.linear(out.reshape(tokens, q_end), w["out"]))
        h, r = ops.add_rms_norm(x, r, w["mlp_norm"])
        gated = ops.silu_mul(ops.linear(self.layout.enter(ops, h), w["gate_up"]))
        return self.layout.leave(ops, ops.linear(gated, w["down"])), r, cache

    # ---- declarations ------------------------------------------------------------------------------------------

    def uses(self) -> Uses:
        c, dtype = self.config, self.context.dtype
        rope = RopeProblem(
            dtype=dtype, dim=c.head_dim, base=c.rope_base, scaling=c.rope_scaling, max_position=c.max_position
        )
        attend = AttendProblem(
            dtype=dtype, q_heads=self.q_heads, kv_heads=self.kv_heads, qk_dim=c.head_dim, v_dim=c.head_dim,
            page_size=self.context.page_size, scale=c.head_dim**-0.5, kv_dtype=self.context.kv_dtype,
        )  # fmt: skip
        return {"rope": ("rope", rope), "attend": ("attend", attend)}

    def caches(self) -> Sequence[KVProblem]:
        dim, context = self.config.head_dim, self.context
        one = KVProblem(
            dtype=context.dtype, kv_heads=self.kv_heads, qk_dim=dim, v_dim=dim, page_size=context.page_size,
            kv_dtype=context.kv_dtype,
        )  # fmt: skip
        return [one] * self.config.layers

    def params(self) -> Tree:
        dtype, share, hidden = self.context.dtype, self.vocab_share, self.shape.hidden
        embed = "model.embed_tokens.weight"
        head = embed if self.config.tied else "lm_head.weight"
        return {
            "embed": self._vocab("embed", embed, {"embed": EmbedProblem(dtype=dtype, vocab=share, width=hidden)}),
            "vocab_start": Param(
                name="vocab_start", source_id="vocab_start", shape=(1,), dtype="int32", varies=("tp",),
                problems={"const": ConstProblem(dtype="int32", shape=(1,))},
                shard=shards.constant(lambda at: [at.tp * self.vocab_share]),
            ),
            "layers": [self._layer(f"model.layers.{i}.", f"layers.{i}.") for i in range(self.config.layers)],
            "norm": self._norm("norm", "model.norm.weight"),
            "head": self._vocab("head", head, {"linear": LinearProblem(dtype=dtype, n=share, k=hidden)}),
        }  # fmt: skip

    def _layer(self, source: str, name: str) -> Tree:
        s, dim = self.shape, self.config.head_dim

        def heads(kind: str) -> shards.Range:
            def where(at: Coordinate) -> tuple[int, int]:
                share = self.context.degrees.heads(s, at.tp)
                start, stop = (share.q_start, share.q_stop) if kind == "q" else (share.kv_start, share.kv_stop)
                return start * dim, stop * dim

            return where

        def width(at: Coordinate) -> tuple[int, int]:
            return at.tp * self.width, (at.tp + 1) * self.width

        q, kv = (s.q_heads * dim, s.hidden), (s.kv_heads * dim, s.hidden)
        up = (s.intermediate, s.hidden)
        attn, mlp = source + "self_attn.", source + "mlp."
        return {
            "attend_norm": self._norm(name + "attend_norm", source + "input_layernorm.weight"),
            "qkv": self._linear(
                name + "qkv", (self.q_heads + 2 * self.kv_heads) * dim, s.hidden,
                shards.rows(
                    (attn + "q_proj.weight", q, heads("q")),
                    (attn + "k_proj.weight", kv, heads("kv")),
                    (attn + "v_proj.weight", kv, heads("kv")),
                ),
            ),
            "out": self._linear(
                name + "out", s.hidden, self.q_heads * dim,
                shards.cols(attn + "o_proj.weight", (s.hidden, s.q_heads * dim), heads("q")),
            ),
            "mlp_norm": self._norm(name + "mlp_norm", source + "post_attention_layernorm.weight"),
            "gate_up": self._linear(
                name + "gate_up", 2 * self.width, s.hidden,
                shards.rows((mlp + "gate_proj.weight", up, width), (mlp + "up_proj.weight", up, width)),
            ),
            "down": self._linear(
                name + "down", s.hidden, self.width,
                shards.cols(mlp + "down_proj.weight", (s.hidden, s.intermediate), width),
            ),
        }  # fmt: skip

    def _linear(self, name: str, n: int, k: int, shard: shards.Shard) -> Param:
        problem = LinearProblem(dtype=self.context.dtype, n=n, k=k, scheme=self.context.quantization)
        return Param(name, name, (n, k), self.context.dtype, {"linear": problem}, shard, varies=("tp",))

    def _norm(self, name: str, source: str) -> Param:
        width = self.shape.hidden
        problem = NormProblem(dtype=self.context.dtype, width=width, eps=self.config.eps)
        return Param(name, name, (width,), self.context.dtype, {"norm": problem}, shards.whole(source, (width,)))

    def _vocab(self, name: str, source: str, problems: Mapping[str, Problem]) -> Param:
        """A table of the vocabulary. Where the head is tied, both are of one source, each in the packing it likes."""
        share, hidden = self.vocab_share, self.shape.hidden
        shard = shards.padded_rows(source, (self.shape.vocab, hidden), share)
        return Param(name, source, (share, hidden), self.context.dtype, problems, shard, varies=("tp",))


def build(config: Mapping[str, Any], context: BuildContext) -> Llama:
    """Build a Llama at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    read = LlamaConfig.read(config)
    context.degrees.validate(read.shape)
    return Llama(read, context)


FAMILY = ModelFamily("llama", ("LlamaForCausalLM", "llama"), build)
