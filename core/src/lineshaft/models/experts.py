"""The block of routed experts: a router, the experts that it chooses for each token, and experts that all tokens take.

Owns how the experts' weights are declared and cut over ranks; how a checkpoint stores them is given. Knows no family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from lineshaft.errors import CorruptCheckpoint, LayoutError
from lineshaft.models import shards
from lineshaft.models.family import BuildContext, Uses
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import const, product
from lineshaft_contract.problems import ExpertProblem, LinearProblem, RouterProblem
from lineshaft_contract.sessions import Tree
from lineshaft_contract.weights import Array, Param

Sizes = tuple[int, int, int]
"""(experts, hidden width, an expert's width), of the whole model."""


class StoredExperts(Protocol):
    """How a checkpoint stores experts: shares of w13 [E, 2F, H] and w2 [E, H, F], of which `where` cuts F.

    `at` is the block's prefix; `biases` gives those of both, and is asked for only where the block has biases.
    """

    def w13(self, at: str, sizes: Sizes, where: shards.Range) -> shards.Shard: ...

    def w2(self, at: str, sizes: Sizes, where: shards.Range) -> shards.Shard: ...

    def biases(self, at: str, sizes: Sizes, where: shards.Range) -> tuple[shards.Shard, shards.Shard]: ...


@dataclass(frozen=True)
class Matrices:
    """Three matrices of each expert, under these names."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def w13(self, at: str, sizes: Sizes, where: shards.Range) -> shards.Shard:
        experts, hidden, width = sizes
        names = (f"{at}experts.{e}.{part}.weight" for e in range(experts) for part in (self.gate, self.up))
        return shards.rows(*((name, (width, hidden), where) for name in names))

    def w2(self, at: str, sizes: Sizes, where: shards.Range) -> shards.Shard:
        experts, hidden, width = sizes
        names = (f"{at}experts.{e}.{self.down}.weight" for e in range(experts))
        return shards.joined(*(shards.cols(name, (hidden, width), where) for name in names))

    def biases(self, at: str, sizes: Sizes, where: shards.Range) -> tuple[shards.Shard, shards.Shard]:
        raise NotImplementedError("no checkpoint of such matrices has biases")


@dataclass(frozen=True, kw_only=True)
class ExpertMlp:
    """The sum of the experts chosen for each token, at one layout: tensor parallelism cuts every expert's width.

    width       of one expert, of the whole model
    router      how experts are chosen
    gate        the router's name in the checkpoint, after `at`, the block's prefix
    bias        router and experts have biases
    activation  fields of ExpertProblem: "activation", and its numbers
    shared      what every token takes besides
    """

    context: BuildContext
    hidden: int
    width: int
    router: RouterProblem
    at: str = "mlp."
    gate: str = "gate"
    stored: StoredExperts = Matrices()
    bias: bool = False
    activation: dict[str, Any] = field(default_factory=dict)
    shared: GatedMlp | None = None

    def __post_init__(self) -> None:
        tp, k, experts = self.context.degrees.tp, self.router.k, self.router.experts
        if k > experts:
            raise CorruptCheckpoint(f"config.json: {k} experts per token are more than the {experts} that there are")
        if self.width % tp:
            raise LayoutError(f"tp={tp} does not divide the experts' width {self.width}: set tp to one of its divisors")

    # ---- the forward -------------------------------------------------------------------------------------------

    def __call__(self, ops: Any, w: Tree, x: Array) -> Array:
        """x [T, H] -> [T, H]."""
        x = self.context.layout.enter(ops, x)
        ids, probs = ops.router_topk(product(ops, w, "router", x))
        biases = {name: w[name] for name in ("w13_bias", "w2_bias") if self.bias}
        out = ops.expert_mlp(x, ids, probs, w["w13"], w["w2"], w["expert_map"], **biases)
        if self.shared is not None:
            out = ops.add(out, self.shared.partial(ops, w["shared"], x))
        return self.context.layout.leave(ops, out)

    # ---- declarations ------------------------------------------------------------------------------------------

    def uses(self) -> Uses:
        return {"router_topk": ("router_topk", self.router)}

    def params(self, source: str, name: str) -> Tree:
        """The block's parameters: `source` is the layer's prefix in the checkpoint, `name` the one of its weights."""
        context, at, experts, tp = self.context, source + self.at, self.router.experts, self.context.degrees.tp
        sizes, share, where = (experts, self.hidden, self.width), self.width // tp, shards.even(self.width, tp)
        every = shards.constant(lambda _: list(range(experts)))
        found = {
            "router": self._router(at, name + "router"),
            "w13": self._weight(name + "w13", 2 * share, self.hidden, self.stored.w13(at, sizes, where)),
            "w2": self._weight(name + "w2", self.hidden, share, self.stored.w2(at, sizes, where)),
            "expert_map": const(context, name + "expert_map", (experts,), every, "int32"),
        }
        if self.bias:
            shard = shards.whole(f"{at}{self.gate}.bias", (experts,))
            found["router_bias"] = const(context, name + "router_bias", (experts,), shard)
            first, second = self.stored.biases(at, sizes, where)
            found["w13_bias"] = const(context, name + "w13_bias", (experts, 2 * share), first)
            found["w2_bias"] = const(context, name + "w2_bias", (experts, self.hidden), second)
        if self.shared is not None:
            found["shared"] = self.shared.params(source, name + "shared.")
        return found

    def _router(self, at: str, name: str) -> Param:
        """Never quantized: it is small, and decides."""
        shape = self.router.experts, self.hidden
        problem = LinearProblem(dtype=self.context.dtype, n=shape[0], k=shape[1], bias=self.bias)
        shard = shards.whole(f"{at}{self.gate}.weight", shape)
        return Param(name, name, shape, self.context.dtype, {"linear": problem}, shard)

    def _weight(self, name: str, n: int, k: int, shard: shards.Shard) -> Param:
        problem = ExpertProblem(
            dtype=self.context.dtype, experts=self.router.experts, local=self.router.experts, hidden=self.hidden,
            width=self.width // self.context.degrees.tp, scheme=self.context.quantization, bias=self.bias,
            **self.activation,
        )  # fmt: skip
        shape = self.router.experts, n, k
        return Param(name, name, shape, self.context.dtype, {"experts": problem}, shard, varies=("tp",))
