"""Wrong calls are refused while a forward is traced, in one line: the op, what was given, what is expected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lineshaft.errors import ContractViolation
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.spec import Call
from lineshaft_contract.problems import (
    AttendProblem,
    EmbedProblem,
    ExpertProblem,
    KVProblem,
    LinearProblem,
    NormProblem,
    RopeProblem,
    RopeWriteProblem,
    RouterProblem,
)
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import ArraySpec, StepInputs, StepShape, forward_inputs
from lineshaft_contract.weights import Weight

OPS = all_ops()


@dataclass(frozen=True)
class Abstract:
    spec: ArraySpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape


def array(*shape: int, dtype: str = "float32") -> Abstract:
    return Abstract(ArraySpec(shape, dtype))


def ints(*shape: int) -> Abstract:
    return array(*shape, dtype="int32")


def weight(kind: str, problem: Any) -> Weight:
    return Weight(0, "w", {kind: problem}, "")


LINEAR = weight("linear", LinearProblem(dtype="float32", n=3, k=4))


def scheme(name: str, **fields: Any) -> Weight:
    return weight("linear", LinearProblem(dtype="float32", n=3, k=4, scheme=name, **fields))


NORM = weight("norm", NormProblem(dtype="float32", width=4, eps=1e-5))
EMBED = weight("embed", EmbedProblem(dtype="float32", vocab=8, width=4))
MLP = ExpertProblem(dtype="float32", experts=4, local=2, hidden=4, width=3)
EXPERTS = weight("experts", MLP)
ROUTED = (array(5, 4), ints(5, 2), array(5, 2), EXPERTS, EXPERTS, ints(4))
KV = KVProblem(dtype="float32", kv_heads=2, qk_dim=4, v_dim=4, page_size=16, kv_dtype="float32")
CACHE = Cache(0, KV, "")
KEYS_ONLY = Cache(0, replace(KV, v_dim=0), "")
ATTEND = AttendProblem(
    dtype="float32", q_heads=4, kv_heads=2, qk_dim=4, v_dim=4, page_size=16, scale=0.5, kv_dtype="float32"
)
ROPE = RopeProblem(dtype="float32", dim=4, base=10000.0)
TURN = RopeWriteProblem.of(ROPE, KV)
Q, K, V, AT = array(5, 4, 4), array(5, 2, 4), array(5, 2, 4), ints(5)
SCALED = replace(KV, kv_dtype="int8", kv_scheme="tensor")
ROUTER = RouterProblem(dtype="float32", experts=8, k=2)
SHAPE = StepShape(tokens=5, rows=2, pages=(3,), logits=2, max_query=4)
STEP = StepInputs({f.name: array(*f.shape, dtype=f.dtype) for f in forward_inputs(SHAPE).fields}, SHAPE)
SAMPLING = {name: array(2) for name in ("temperature", "top_p", "min_p")} | {"top_k": ints(2)}


def call(op: str, *args: Any, base: Any = None, degrees: dict[str, int] | None = None, **kwargs: Any) -> Any:
    given = Call(args, kwargs, degrees or {})
    problem = OPS[op].specialise(base, given)
    return problem, OPS[op].infer(problem, given)


WRONG: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("linear", r"x float32\[2, 5\]; expected float32\[any, 4\]", (array(2, 5), LINEAR), {}),
    ("linear", r"x bfloat16\[2, 4\]", (array(2, 4, dtype="bfloat16"), LINEAR), {}),
    ("linear", r"x float32\[1, 2, 4\]", (array(1, 2, 4), LINEAR), {}),
    ("linear", r"\['norm'\].*kind 'linear'", (array(2, 4), NORM), {}),
    (
        "linear",
        r"scheme 'int3'; expected one of none, int8, fp8, int4, w8a8_int8, w8a8_fp8",
        (
            array(2, 4),
            scheme("int3"),
        ),
        {},
    ),
    ("linear", r"group_size 0 with k = 4; expected an even one that divides k", (array(2, 4), scheme("int4")), {}),
    ("linear", r"group_size 3 with k = 4", (array(2, 4), scheme("int4", group_size=3)), {}),
    ("linear", r"group_size 1 with k = 4", (array(2, 4), scheme("int4", group_size=1)), {}),
    ("linear", r"group_size 2 under scheme 'int8'; expected 0", (array(2, 4), scheme("int8", group_size=2)), {}),
    ("linear", r"group_size 2 under scheme 'none'", (array(2, 4), scheme("none", group_size=2)), {}),
    ("head_linear", r"scheme 'int8'; expected none", (array(2, 2, 4), scheme("int8", heads=2)), {}),
    ("linear", r"bias float32\[4\]", (array(2, 4), LINEAR), {"bias": array(4)}),
    ("rms_norm", r"expected float32\[\.\.\., 4\]", (array(2, 5), NORM), {}),
    ("add_rms_norm", r"r float32\[3, 4\]", (array(2, 4), array(3, 4), NORM), {}),
    ("embed", r"ids float32\[2\]; expected int32", (array(2), EMBED, ints(1)), {}),
    ("embed", r"vocab_start", (ints(2), EMBED, ints(2)), {}),
    ("add", r"y float32\[2, 5\]", (array(2, 4), array(2, 5)), {}),
    ("concat", r"xs\[1\]", ([array(2, 4), array(3, 4)], 1), {}),
    ("concat", r"dim 2", ([array(2, 4)], 2), {}),
    ("silu_mul", r"even last dim", (array(2, 5),), {}),
    ("rope", r"declared by the model", (array(2, 4, 4), array(2, 2, 4), ints(2)), {}),
    ("rope", r"k float32\[2, 2, 6\]", (array(2, 4, 4), array(2, 2, 6), ints(2)), {"base": ROPE}),
    ("rope", r"even dim within", (array(2, 4, 2), array(2, 2, 2), ints(2)), {"base": ROPE}),
    ("write_kv", r"v = NoneType", (CACHE, array(5, 2, 4), None, STEP), {}),
    ("write_kv", r"expected None for this cache", (KEYS_ONLY, array(5, 2, 4), array(5, 2, 4), STEP), {}),
    ("write_kv", r"k float32\[5, 3, 4\]", (CACHE, array(5, 3, 4), array(5, 3, 4), STEP), {}),
    ("write_kv", r"slots int32\[5\]; expected int32\[4\]", (CACHE, array(4, 2, 4), array(4, 2, 4), STEP), {}),
    ("write_kv", r"a paged KV cache", (array(1), array(5, 2, 4), array(5, 2, 4), STEP), {}),
    ("rope_write_kv", r"RopeWriteProblem declared", (CACHE, Q, K, V, AT, STEP), {"base": ROPE}),
    (
        "rope_write_kv",
        r"v_dim=4.*v_dim=0",
        (CACHE, Q, K, V, AT, STEP),
        {
            "base": RopeWriteProblem.of(ROPE, replace(KV, v_dim=0)),
        },
    ),
    (
        "rope_write_kv",
        r"kv_scheme 'tensor'; expected none",
        (Cache(0, SCALED, ""), Q, K, V, AT, STEP),
        {
            "base": RopeWriteProblem.of(ROPE, SCALED),
        },
    ),
    ("rope_write_kv", r"v = NoneType", (CACHE, Q, K, None, AT, STEP), {"base": TURN}),
    ("rope_write_kv", r"q float32\[5, 4, 6\]|k float32", (CACHE, array(5, 4, 6), K, V, AT, STEP), {"base": TURN}),
    ("rope_write_kv", r"ops.rope_write_kv: given positions float32", (CACHE, Q, K, V, array(5), STEP), {"base": TURN}),
    ("rope_write_kv", r"even dim within", (CACHE, Q, K, V, AT, STEP), {"base": replace(TURN, dim=6)}),
    ("attend", r"AttendProblem declared by the model", (array(5, 4, 4), CACHE, STEP), {}),
    ("attend", r"q of 4 tokens; expected the step's 5", (array(4, 4, 4), CACHE, STEP), {"base": ATTEND}),
    ("attend", r"q float32\[5, 3, 4\]", (array(5, 3, 4), CACHE, STEP), {"base": ATTEND}),
    ("attend", r"v_dim=0", (array(5, 4, 4), KEYS_ONLY, STEP), {"base": ATTEND}),
    ("attend", r"page_size=16", (array(5, 4, 4), CACHE, STEP), {"base": replace(ATTEND, page_size=32)}),
    ("attend", r"page_starts", (array(5, 4, 4), CACHE, STEP), {"base": replace(ATTEND, page_starts=True)}),
    ("attend", r"merge_states", (array(5, 4, 4), CACHE, STEP), {"base": replace(ATTEND, sinks=True, return_lse=True)}),
    ("merge_states", r"lse float32\[2, 5\]", (array(2, 5, 4, 4), array(2, 5)), {}),
    ("router_topk", r"k=9", (array(5, 8),), {"base": replace(ROUTER, k=9)}),
    ("router_topk", r"groups that divide", (array(5, 8),), {"base": replace(ROUTER, groups=3)}),
    ("router_topk", r"'before' or 'after'", (array(5, 8),), {"base": replace(ROUTER, softmax="never")}),
    ("expert_mlp", r"expert_map", (array(5, 4), ints(5, 2), array(5, 2), EXPERTS, EXPERTS, ints(3)), {}),
    ("expert_mlp", r"'tanh'; expected silu, gelu or swigluoai", ROUTED, {"base": replace(MLP, activation="tanh")}),
    ("expert_mlp", r"\(0.0, 0.0\); expected both above 0", ROUTED, {"base": replace(MLP, activation="swigluoai")}),
    ("expert_mlp", r"\(0.0, 7.0\); expected .* else 0", ROUTED, {"base": replace(MLP, swiglu_limit=7.0)}),
    ("expert_mlp", r"w2_bias float32\[2, 3\]", ROUTED, {"base": replace(MLP, bias=True), "w2_bias": array(2, 3)}),
    ("moe_dispatch", r"local = 9", (array(5, 4), ints(5, 2), ints(4), 9), {}),
    ("gather_rows", r"rows float32", (array(5, 4), array(2)), {}),
    ("merge_rows", r"embeds", (array(5, 4), array(2, 3), ints(5)), {}),
    ("sample", r"u float32\[2\]", (array(2, 9), SAMPLING, array(2)), {}),
    ("sample", r"top_k = NoneType", (array(2, 9), {**SAMPLING, "top_k": None}, array(2, 1)), {}),
    ("logprobs", r"k = 10", (array(2, 9), ints(2), 10), {}),
    ("apply_logits", r"mask uint32\[2, 2\]", (array(2, 9),), {"mask": array(2, 2, dtype="uint32")}),
    ("apply_logits", r"edit_bias = NoneType", (array(2, 9),), {"edit_ids": ints(2, 4), "edit_scale": array(2, 4)}),
    (
        "apply_logits",
        r"edit_scale float32\[2, 3\]",
        (array(2, 9),),
        {"edit_ids": ints(2, 4), "edit_scale": array(2, 3), "edit_bias": array(2, 4)},
    ),
    ("apply_logits", r"edit_bias without", (array(2, 9),), {"edit_bias": array(2, 4)}),
    ("sample", r"typical_p float32\[3\]", (array(2, 9), {**SAMPLING, "typical_p": array(3)}, array(2, 1)), {}),
    ("copy_pages", r"dst int32\[3\]", (CACHE, ints(2), ints(3)), {}),
    ("all_reduce", r"axis 'xp'; expected one or more of dp, tp", (array(4, 6), "xp"), {}),
    ("all_reduce", r"each once", (array(4, 6), ("tp", "tp")), {}),
    ("reduce_scatter", r"4 members of dpxtp divide", (array(4, 6), ("dp", "tp"), 1), {}),
    ("all_to_all", r"4 members", (array(4, 6), ("dp", "tp"), 1, 0), {}),
    ("all_gather", r"dim 2", (array(4, 6), "tp", 2), {}),
    ("all_gather", r"ints for dim", (array(4, 6), "tp"), {}),
    ("broadcast", r"src 2", (array(4, 6), "tp", 2), {}),
    ("broadcast", r"src -1", (array(4, 6), "tp", -1), {}),
    ("all_reduce", r"axis 1; expected one or more", (array(4, 6), 1), {}),
    ("all_reduce", r"axis \(\)", (array(4, 6), ()), {}),
    ("all_reduce", r"axis \(\('tp',\),\)", (array(4, 6), (("tp",),)), {}),
    ("all_reduce", r"1 positional arguments; expected x and axis", (array(4, 6),), {}),
    ("all_reduce", r"3 after axis; expected ints for nothing more", (array(4, 6), "tp", 3), {}),
    ("all_gather", r"0, dim=1 after axis", (array(4, 6), "tp", 0), {"dim": 1}),
    ("all_gather", r"dim -1", (array(4, 6), "tp", -1), {}),
    ("all_gather", r"dim 0; expected a dim of \[\]", (array(), "tp", 0), {}),
    ("reduce_scatter", r"dim 1 of \[4, 5\]", (array(4, 5), "tp", 1), {}),
    (
        "all_to_all",
        r"dim=0, concat_dim=1 after axis; expected ints for split_dim, concat_dim",
        (array(4, 6), "tp"),
        {"dim": 0, "concat_dim": 1},
    ),
    ("permute", r"1.0 after axis; expected ints for shift", (array(4, 6), "tp", 1.0), {}),
]


@pytest.mark.parametrize(("op", "message", "args", "fields"), WRONG, ids=[f"{i}-{w[0]}" for i, w in enumerate(WRONG)])
def test_a_wrong_call_is_a_contract_violation(
    op: str, message: str, args: tuple[Any, ...], fields: dict[str, Any]
) -> None:
    with pytest.raises(ContractViolation, match=message) as caught:
        call(op, *args, degrees={"dp": 2, "tp": 2}, **fields)
    text = str(caught.value)
    assert text.startswith(f"ops.{op}: given ") and "\n" not in text


def test_right_calls_pass() -> None:
    problem, out = call("attend", array(5, 4, 4), CACHE, STEP, base=ATTEND)
    assert (problem.tokens, problem.rows, problem.pages, problem.max_query) == (5, 2, 3, 4)
    assert out == ArraySpec((5, 4, 4), "float32")
    assert call("write_kv", CACHE, array(5, 2, 4), array(5, 2, 4), STEP)[1] == "cache"
    assert call("sample", array(2, 9), SAMPLING, array(2, 1))[1] == ArraySpec((2,), "int32")
    degrees = {"dp": 2, "tp": 3}
    assert call("all_gather", array(4, 6), ("dp", "tp"), dim=1, degrees=degrees)[1] == ArraySpec((4, 36), "float32")
    reshaped = call("all_to_all", array(4, 6), "tp", split_dim=1, concat_dim=0, degrees=degrees)[1]
    assert reshaped == ArraySpec((12, 2), "float32")
