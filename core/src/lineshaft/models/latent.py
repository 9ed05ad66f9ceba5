"""The block of multi-head latent attention (DeepSeek-V2, 2024), absorbed: one latent per token is cached for all heads.

Owns projections, norms of latents, the rotated part and the cache; knows no family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lineshaft.models import shards
from lineshaft.models.attention import Rope
from lineshaft.models.family import BuildContext, Uses
from lineshaft.models.parameters import RmsNorm, linear
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem
from lineshaft_contract.sessions import Cache, Tree
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Array, Coordinate, Param

EPS = 1e-6
"""Of the norms of latents, whatever the config says of the others."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Latent attention at one layout: heads are cut over ranks, the latents and their cache are on each of them.

    heads      of the whole model
    q_rank     width of the queries' latent; 0: queries are projected at once
    rank       width of the keys' and values' latent
    nope_dim   values of a head that are not rotated; rope_dim: those that are; v_dim: of a head's value
    scale      of the scores; 0: (nope_dim + rope_dim) ** -0.5
    """

    context: BuildContext
    hidden: int
    heads: int
    q_rank: int
    rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope: Rope
    max_position: int
    scale: float
    at: str = "self_attn."

    # ---- the forward -------------------------------------------------------------------------------------------

    def __call__(self, ops: Any, w: Tree, x: Array, cache: Cache, step: StepInputs) -> tuple[Array, Cache]:
        """x [T, H] -> (out [T, H], the cache with this step's latents)."""
        tokens, heads, rank = x.shape[0], self.local_heads, self.rank
        both = ops.linear(self.context.layout.enter(ops, x), w["q_kv"])
        q, kv = both[:, : self._q_width], both[:, self._q_width :]
        if self.q_rank:
            q = ops.linear(ops.rms_norm(q, w["q_norm"]), w["q_up"])
        q = q.reshape(tokens, heads, self.nope_dim + self.rope_dim)
        latent = ops.rms_norm(kv[:, :rank], w["kv_norm"]).reshape(tokens, 1, rank)
        k_rope = kv[:, rank:].reshape(tokens, 1, self.rope_dim)
        q_rope, k_rope = ops.rope(q[:, :, self.nope_dim :], k_rope, step.positions)
        cache = ops.write_kv(cache, ops.concat([latent, k_rope], 2), None, step)
        out = ops.latent_attend(q[:, :, : self.nope_dim], q_rope, cache, w["k_up"], w["v_up"], step)
        out = ops.linear(out.reshape(tokens, heads * self.v_dim), w["out"])
        return self.context.layout.leave(ops, out), cache

    # ---- declarations ------------------------------------------------------------------------------------------

    def uses(self) -> Uses:
        attend = AttendProblem(
            dtype=self.context.dtype, q_heads=self.local_heads, kv_heads=1, qk_dim=self.rank + self.rope_dim,
            v_dim=self.rank, page_size=self.context.page_size, scale=self.scale, kv_dtype=self.context.kv_dtype,
            value_in_key=True,
        )  # fmt: skip
        rope = self.rope.problem(self.context.dtype, self.rope_dim, self.max_position)
        return {"rope": ("rope", rope), "latent_attend": ("latent_attend", attend)}

    def cache(self) -> KVProblem:
        return KVProblem(
            dtype=self.context.dtype, kv_heads=1, qk_dim=self.rank + self.rope_dim, v_dim=0,
            page_size=self.context.page_size, kv_dtype=self.context.kv_dtype,
        )  # fmt: skip

    def params(self, source: str, name: str) -> Tree:
        """The block's parameters: `source` is the layer's prefix in the checkpoint, `name` the one of its weights."""
        context, at, heads = self.context, source + self.at, self.local_heads
        keys, values, nope = self.rank + self.rope_dim, self.v_dim, self.nope_dim
        out = shards.cols(at + "o_proj.weight", (self.hidden, self.heads * values), self._heads(values))
        found = {
            "q_kv": linear(context, name + "q_kv", self._q_width + keys, self.hidden, self._q_kv(at)),
            "kv_norm": RmsNorm(context, self.rank, EPS).param(name + "kv_norm", at + "kv_a_layernorm.weight"),
            "k_up": self._up(name + "k_up", at, self.rank, nope, lambda heads: heads[:, :nope].transpose(0, 2, 1)),
            "v_up": self._up(name + "v_up", at, values, self.rank, lambda heads: heads[:, nope:]),
            "out": linear(context, name + "out", self.hidden, heads * values, out),
        }
        if self.q_rank:
            width = self.nope_dim + self.rope_dim
            shard = shards.rows((at + "q_b_proj.weight", (self.heads * width, self.q_rank), self._heads(width)))
            found["q_norm"] = RmsNorm(context, self.q_rank, EPS).param(name + "q_norm", at + "q_a_layernorm.weight")
            found["q_up"] = linear(context, name + "q_up", heads * width, self.q_rank, shard)
        return found

    # ---- shares ------------------------------------------------------------------------------------------------

    @property
    def local_heads(self) -> int:
        """This rank's."""
        return self.heads // self.context.degrees.tp

    @property
    def _q_width(self) -> int:
        """Columns of the first product that are the queries', or their latent's."""
        return self.q_rank or self.local_heads * (self.nope_dim + self.rope_dim)

    def _heads(self, width: int) -> shards.Range:
        """This rank's heads, of `width` values each."""
        return shards.even(self.heads, self.context.degrees.tp, width)

    def _q_kv(self, at: str) -> shards.Shard:
        width, keys = self.nope_dim + self.rope_dim, self.rank + self.rope_dim
        kv = (at + "kv_a_proj_with_mqa.weight", (keys, self.hidden), shards.all_of(keys))
        if self.q_rank:
            return shards.rows((at + "q_a_proj.weight", (self.q_rank, self.hidden), shards.all_of(self.q_rank)), kv)
        return shards.rows((at + "q_proj.weight", (self.heads * width, self.hidden), self._heads(width)), kv)

    def _up(self, name: str, at: str, n: int, k: int, cut: Callable[[shards.Numbers], shards.Numbers]) -> Param:
        """What `cut` takes of this rank's heads of kv_b_proj, [heads, nope_dim + v_dim, rank]: rows of the keys before
        those of the values."""
        width = self.nope_dim + self.v_dim

        def make(place: Coordinate, rows: shards.Numbers) -> list[shards.Numbers]:
            start, stop = self._heads(1)(place)
            return [cut(rows.reshape(self.heads, width, self.rank)[start:stop])]

        shard = shards.made(make, (at + "kv_b_proj.weight", (self.heads * width, self.rank)))
        problem = LinearProblem(dtype=self.context.dtype, n=n, k=k, heads=self.local_heads)
        shape = self.local_heads, n, k
        return Param(name, name, shape, self.context.dtype, {"linear": problem}, shard, varies=("tp",))
