"""What each of several ranks takes of a checkpoint: together the whole, heads and halves of fused tensors apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.errors import LayoutError, MisshapenTensor, MissingTensor
from lineshaft.layout import Degrees, ModelShape
from lineshaft.models import BuildContext, gemma3, shards
from lineshaft.models.attention import Attention
from lineshaft.models.mlp import GatedMlp
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.sessions import leaves
from lineshaft_contract.weights import Coordinate, Param, Stored

Q_HEADS, KV_HEADS, DIM, HIDDEN, WIDTH = 8, 4, 2, 6, 16
SHAPE = ModelShape(Q_HEADS, KV_HEADS, HIDDEN, WIDTH, 10)


@dataclass
class Numbered:
    """A checkpoint whose every number is another."""

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any] = field(default_factory=dict)

    def names(self) -> frozenset[str]:
        return frozenset(self.shapes)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self.shapes:
            raise MissingTensor(name)
        first = 10_000 * sorted(self.shapes).index(name)
        shape = self.shapes[name]
        return np.arange(first, first + int(np.prod(shape)), dtype=np.float32).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.array(name).shape

    def stored_bytes(self, name: str) -> int:
        return self.array(name).nbytes

    def rows(self, name: str, start: int, stop: int) -> Stored:
        cut = self.array(name)[start:stop]
        return Stored("none", cut.shape, {"data": cut})

    def cols(self, name: str, start: int, stop: int) -> Stored:
        cut = self.array(name)[:, start:stop]
        return Stored("none", cut.shape, {"data": cut})


def context(tp: int) -> BuildContext:
    return BuildContext("float32", "float32", 4, Degrees(tp=tp))


def attention(tp: int, **more: Any) -> Attention:
    return Attention(context=context(tp), shape=SHAPE, head_dim=DIM, max_position=8, rope=None, **more)


def share(param: Param, checkpoint: Numbered, rank: int) -> np.ndarray[Any, Any]:
    parts = [dequantize(part, "float32") for part in param.shard(checkpoint, Coordinate(tp=rank)).parts]
    joined = np.concatenate(parts)
    assert joined.shape == param.shape
    return joined


def separate(fused: Numbered) -> Numbered:
    """The same numbers in tensors of their own."""
    q, kv = Q_HEADS * DIM, KV_HEADS * DIM
    found = Numbered({})
    arrays = {
        "a.self_attn.q_proj.weight": fused.array("a.self_attn.qkv_proj.weight")[:q],
        "a.self_attn.k_proj.weight": fused.array("a.self_attn.qkv_proj.weight")[q : q + kv],
        "a.self_attn.v_proj.weight": fused.array("a.self_attn.qkv_proj.weight")[q + kv :],
        "a.mlp.gate_proj.weight": fused.array("a.mlp.gate_up_proj.weight")[:WIDTH],
        "a.mlp.up_proj.weight": fused.array("a.mlp.gate_up_proj.weight")[WIDTH:],
        "a.self_attn.o_proj.weight": fused.array("a.self_attn.o_proj.weight"),
        "a.mlp.down_proj.weight": fused.array("a.mlp.down_proj.weight"),
    }
    found.shapes = {name: array.shape for name, array in arrays.items()}
    found.array = arrays.__getitem__  # type: ignore[method-assign]
    return found


@given(
    kv=st.sampled_from([1, 2, 3, 4, 8]), group=st.sampled_from([1, 2, 3, 4]), tp=st.sampled_from([1, 2, 3, 4, 6, 8, 16])
)
def test_each_query_head_meets_its_own_kv_head(kv: int, group: int, tp: int) -> None:
    try:
        Degrees(tp=tp).validate(ModelShape(q_heads=kv * group, kv_heads=kv, hidden=8, intermediate=48, vocab=10))
    except LayoutError:
        return
    owned: list[int] = []
    for rank in range(tp):
        at = Coordinate(tp=rank)
        (q_start, q_stop), (kv_start, kv_stop) = shards.even(kv * group, tp)(at), shards.even(kv, tp)(at)
        q, local_kv = q_stop - q_start, kv_stop - kv_start
        owned += range(q_start, q_stop)
        for i in range(q):
            assert kv_start + i // (q // local_kv) == (q_start + i) // group
        assert shards.even(kv, tp, 5)(at) == (5 * kv_start, 5 * kv_stop)
    assert owned == list(range(kv * group))


@given(vocab=st.integers(1, 40), tp=st.integers(1, 16))
def test_each_rank_has_as_many_rows_of_the_vocabulary_padded_at_the_end(vocab: int, tp: int) -> None:
    rows = -(-vocab // tp)
    checkpoint = Numbered({"table": (vocab, 3)})
    found = [shards.padded_rows("table", (vocab, 3), rows)(checkpoint, Coordinate(tp=rank)) for rank in range(tp)]
    ranks = [np.concatenate([dequantize(part, "float32") for part in local.parts]) for local in found]
    assert {rank.shape for rank in ranks} == {(rows, 3)}
    joined = np.concatenate(ranks)
    np.testing.assert_array_equal(joined[:vocab], checkpoint.array("table"))
    assert not joined[vocab:].any()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_fused_tensors_are_cut_by_part_before_they_are_joined(tp: int) -> None:
    fused = Numbered({
        "a.self_attn.qkv_proj.weight": ((Q_HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
        "a.self_attn.o_proj.weight": (HIDDEN, Q_HEADS * DIM),
        "a.mlp.gate_up_proj.weight": (2 * WIDTH, HIDDEN), "a.mlp.down_proj.weight": (HIDDEN, WIDTH),
    })  # fmt: skip
    apart = separate(fused)
    for rank in range(tp):
        for one, other in (
            (attention(tp, fused=True), attention(tp)),
            (
                GatedMlp(context=context(tp), hidden=HIDDEN, width=WIDTH, fused=True),
                GatedMlp(context=context(tp), hidden=HIDDEN, width=WIDTH),
            ),
        ):
            ours, theirs = one.params("a.", "x."), other.params("a.", "x.")
            for key in theirs:
                np.testing.assert_array_equal(share(ours[key], fused, rank), share(theirs[key], apart, rank))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_bias_after_a_sum_over_ranks_is_added_once(tp: int) -> None:
    names = {f"a.self_attn.{part}_proj": size for part, size in
             (("q", Q_HEADS * DIM), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM))}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {f"{name}.bias": (size,) for name, size in names.items()}
    checkpoint = Numbered({**shapes, "a.self_attn.o_proj.bias": (HIDDEN,), "a.self_attn.sinks": (Q_HEADS,)})
    params = attention(tp, qkv_bias=True, out_bias=True, sinks=True).params("a.", "x.")
    ranks = range(tp)
    total = sum(share(params["out_bias"], checkpoint, rank) for rank in ranks)
    np.testing.assert_array_equal(total, checkpoint.array("a.self_attn.o_proj.bias"))
    sinks = np.concatenate([share(params["sinks"], checkpoint, rank) for rank in ranks])
    np.testing.assert_array_equal(sinks, checkpoint.array("a.self_attn.sinks"))
    q, kv = Q_HEADS * DIM // tp, KV_HEADS * DIM // tp
    cuts = [np.split(share(params["qkv_bias"], checkpoint, rank), [q, q + kv]) for rank in ranks]
    for index, part in enumerate("qkv"):
        joined = np.concatenate([cut[index] for cut in cuts])
        np.testing.assert_array_equal(joined, checkpoint.array(f"a.self_attn.{part}_proj.bias"))
    problems = [params[key].problems["linear"].bias for key in ("qkv", "out")]
    assert problems == [True, True]


def test_every_parameter_of_a_model_has_the_shape_that_it_says() -> None:
    config = {
        "hidden_size": HIDDEN, "num_attention_heads": Q_HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "vocab_size": 11, "intermediate_size": WIDTH, "num_hidden_layers": 1, "attention_bias": True,
    }  # fmt: skip
    at = "model.layers.0."
    wide = {"self_attn.q_proj": Q_HEADS * DIM, "self_attn.k_proj": KV_HEADS * DIM, "self_attn.v_proj": KV_HEADS * DIM}
    shapes: dict[str, tuple[int, ...]] = {f"{at}{name}.weight": (size, HIDDEN) for name, size in wide.items()}
    shapes |= {f"{at}{name}.bias": (size,) for name, size in wide.items()}
    shapes |= {f"{at}mlp.{name}_proj.weight": (WIDTH, HIDDEN) for name in ("gate", "up")}
    shapes |= {f"{at}self_attn.{name}_norm.weight": (DIM,) for name in "qk"}
    shapes |= {f"{at}{name}_layernorm.weight": (HIDDEN,) for name in (
        "input", "post_attention", "pre_feedforward", "post_feedforward")}  # fmt: skip
    shapes |= {
        f"{at}self_attn.o_proj.weight": (HIDDEN, Q_HEADS * DIM), f"{at}self_attn.o_proj.bias": (HIDDEN,),
        f"{at}mlp.down_proj.weight": (HIDDEN, WIDTH), "model.embed_tokens.weight": (11, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }  # fmt: skip
    checkpoint = Numbered(shapes)
    for tp in (1, 2, 4):
        for param in leaves(gemma3.FAMILY.build(config, context(tp)).params()):
            for rank in range(tp):
                share(param, checkpoint, rank)
    norm = gemma3.FAMILY.build(config, context(1)).params()["norm"]
    np.testing.assert_array_equal(share(norm, checkpoint, 0), checkpoint.array("model.norm.weight") + 1)
    shapes["model.norm.weight"] = (HIDDEN + 1,)
    with pytest.raises(MisshapenTensor, match=r"model\.norm\.weight has shape \[7\]"):
        share(norm, checkpoint, 0)
