"""The attention block of decoders: heads of queries over fewer heads of keys, with what families vary as data.

Owns projections, head norms, rotary embedding, the cache and the attention itself; knows no family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from lineshaft.layout import ModelShape
from lineshaft.models import shards
from lineshaft.models.family import BuildContext, Uses
from lineshaft.models.parameters import RmsNorm, const, linear, product
from lineshaft_contract.problems import AttendProblem, KVProblem, Problem, RopeProblem, RopeScaling, RopeWriteProblem
from lineshaft_contract.sessions import Cache, Tree
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Array

UNSCALED: Final = RopeScaling()


@dataclass(frozen=True)
class Rope:
    """A rotary embedding as a checkpoint's config has it; `share` is the part of a head that is rotated."""

    base: float
    scaling: RopeScaling = UNSCALED
    share: float = 1.0
    attention_factor: float = 1.0
    interleaved: bool = False

    def problem(self, dtype: str, head_dim: int, max_position: int) -> RopeProblem:
        dim = int(head_dim * self.share + 1e-6)  # the share may be a quotient of the dim itself
        return RopeProblem(
            dtype=dtype, dim=dim, base=self.base, scaling=self.scaling, max_position=max_position,
            interleaved=self.interleaved, attention_factor=self.attention_factor,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention at one layout.

    at         the block's prefix in the checkpoint, after the layer's
    kind       suffix of the names of its ops ("attend.local"), where a model has several kinds of attention
    group      the cache group: one for each window
    rope       None: positions do not enter
    window     visible keys, the query included; 0: all
    scale      of the scores; 0: head_dim ** -0.5
    head_norm  the norm of each head of q and of k before the rotation
    fused      the checkpoint holds one qkv_proj, queries first
    """

    context: BuildContext
    shape: ModelShape
    head_dim: int
    max_position: int
    rope: Rope | None
    at: str = "self_attn."
    kind: str = ""
    group: int = 0
    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    head_norm: RmsNorm | None = None
    fused: bool = False

    # ---- the forward -------------------------------------------------------------------------------------------

    def __call__(self, ops: Any, w: Tree, x: Array, cache: Cache, step: StepInputs) -> tuple[Array, Cache]:
        """x [T, H] -> (out [T, H], the cache with this step's keys and values)."""
        q, k, v = self._split(product(ops, w, "qkv", self.context.layout.enter(ops, x)))
        if self.head_norm is not None:
            q, k = ops.rms_norm(q, w["q_norm"]), ops.rms_norm(k, w["k_norm"])
        if self.rope is None:
            cache = ops.write_kv(cache, k, v, step)
        else:
            q, cache = getattr(ops, self._name("rope_write_kv"))(cache, q, k, v, step.positions, step)
        sinks = {"sinks": w["sinks"]} if self.sinks else {}
        out = self.context.layout.attend(ops, q, cache, step, self._name("attend"), **sinks)
        out = out.reshape(x.shape[0], self.q_heads * self.head_dim)
        return self.context.layout.leave(ops, product(ops, w, "out", out)), cache

    def _split(self, qkv: Array) -> tuple[Array, Array, Array]:
        """qkv [T, (Hq + 2 Hkv) D] -> q [T, Hq, D], k and v [T, Hkv, D]."""
        tokens, dim = qkv.shape[0], self.head_dim
        q_end, k_end = self.q_heads * dim, (self.q_heads + self.kv_heads) * dim
        q = qkv[:, :q_end].reshape(tokens, self.q_heads, dim)
        k = qkv[:, q_end:k_end].reshape(tokens, self.kv_heads, dim)
        return q, k, qkv[:, k_end:].reshape(tokens, self.kv_heads, dim)

    # ---- declarations ------------------------------------------------------------------------------------------

    def uses(self) -> Uses:
        attend = AttendProblem(
            dtype=self.context.dtype, q_heads=self.q_heads, kv_heads=self.kv_heads, qk_dim=self.head_dim,
            v_dim=self.head_dim, page_size=self.context.page_size, scale=self.scale or self.head_dim**-0.5,
            kv_dtype=self.context.kv_dtype, group=self.group, window=self.window, softcap=self.softcap,
            sinks=self.sinks,
        )  # fmt: skip
        found: dict[str, tuple[str, Problem]] = {self._name("attend"): ("attend", attend)}
        if self.rope is not None:
            rope = self.rope.problem(self.context.dtype, self.head_dim, self.max_position)
            found[self._name("rope_write_kv")] = "rope_write_kv", RopeWriteProblem.of(rope, self.cache())
        return found

    def cache(self) -> KVProblem:
        return KVProblem(
            dtype=self.context.dtype, kv_heads=self.kv_heads, qk_dim=self.head_dim, v_dim=self.head_dim,
            page_size=self.context.page_size, kv_dtype=self.context.kv_dtype, group=self.group,
        )  # fmt: skip

    def params(self, source: str, name: str) -> Tree:
        """The block's parameters: `source` is the layer's prefix in the checkpoint, `name` the one of its weights."""
        context, hidden, at = self.context, self.shape.hidden, source + self.at
        qkv, width = (self.q_heads + 2 * self.kv_heads) * self.head_dim, self.q_heads * self.head_dim
        out = shards.cols(
            at + "o_proj.weight", (hidden, self.shape.q_heads * self.head_dim), self._heads(self.shape.q_heads)
        )
        found = {
            "qkv": linear(context, name + "qkv", qkv, hidden, self._qkv(at, "weight", (hidden,)), bias=self.qkv_bias),
            "out": linear(context, name + "out", hidden, width, out, bias=self.out_bias),
        }
        if self.qkv_bias:
            found["qkv_bias"] = const(context, name + "qkv_bias", (qkv,), self._qkv(at, "bias", ()))
        if self.out_bias:
            shard = shards.on_first(at + "o_proj.bias", (hidden,))
            found["out_bias"] = const(context, name + "out_bias", (hidden,), shard)
        if self.sinks:
            shard = shards.rows((at + "sinks", (self.shape.q_heads,), shards.even(self.shape.q_heads, self._tp)))
            found["sinks"] = const(context, name + "sinks", (self.q_heads,), shard)
        if self.head_norm is not None:
            for key in ("q_norm", "k_norm"):
                found[key] = self.head_norm.param(name + key, f"{at}{key}.weight")
        return found

    # ---- shares ------------------------------------------------------------------------------------------------

    @cached_property
    def q_heads(self) -> int:
        """This rank's."""
        return self.shape.q_heads // self._tp

    @cached_property
    def kv_heads(self) -> int:
        """This rank's; one of the model's where there are fewer of them than ranks."""
        return max(1, self.shape.kv_heads // self._tp)

    @property
    def _tp(self) -> int:
        return self.context.degrees.tp

    def _name(self, op: str) -> str:
        return f"{op}.{self.kind}" if self.kind else op

    def _heads(self, count: int) -> shards.Range:
        """This rank's values of `count` heads."""
        return shards.even(count, self._tp, self.head_dim)

    def _qkv(self, at: str, kind: str, tail: tuple[int, ...]) -> shards.Shard:
        """Rows of q, k and v for a rank: each cut by heads first and joined after."""
        heads = {"q": self.shape.q_heads, "k": self.shape.kv_heads, "v": self.shape.kv_heads}
        parts = [(f"{at}{part}_proj.{kind}", n * self.head_dim, self._heads(n)) for part, n in heads.items()]
        return shards.stacked(parts, tail, f"{at}qkv_proj.{kind}" if self.fused else "")
