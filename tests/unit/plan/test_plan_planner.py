"""What the plan says of a tensor that two parameters share: one packing where it serves both, else one for each."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from lineshaft.plan import Plan, Planned, ProgramSpec, Resolver, Workload, make_plan
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Numerics, all_ops
from lineshaft_contract.ops.rope import rope
from lineshaft_contract.problems import (
    EmbedProblem,
    ExpertProblem,
    KVProblem,
    LinearProblem,
    Problem,
    RopeProblem,
    RopeWriteProblem,
)
from lineshaft_contract.reference.backend import reference_kernel
from lineshaft_contract.reference.session import ReferenceSession, ValueArray
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import InputField, InputLayout, StepInputs, StepShape, forward_inputs
from lineshaft_contract.weights import Local, Param

VOCAB, WIDTH = 6, 4
BYTES = 2 * VOCAB * WIDTH
INPUTS = InputLayout([InputField("token_ids", "int32", (2,)), InputField("start", "int32", (1,))])
EMBED = EmbedProblem(dtype="bfloat16", vocab=VOCAB, width=WIDTH)
LINEAR = LinearProblem(dtype="bfloat16", n=VOCAB, k=WIDTH)


def table(name: str, **problems: Problem) -> Param:
    return Param(name, "table", (VOCAB, WIDTH), "bfloat16", problems, lambda checkpoint, at: Local(()))


def forward(ops: Any, w: Any, caches: Any, inputs: Any, arrays: Any) -> tuple[dict[str, Any], list[Any]]:
    x = ops.embed(inputs.token_ids, w["embed"], inputs.arrays["start"])
    return {"logits": ops.linear(x, w.get("head", w["embed"]))}, caches


def plan(params: dict[str, Param], **layouts: str) -> Plan:
    """The plan of a lookup and a product, with a dense kernel for each op and a better one in the layout given."""

    def kernel(op: str, layout: str, priority: int) -> Kernel:
        return Kernel(f"{layout}_{op}", op, "test", lambda problem, session: None, layout=layout, priority=priority)

    kernels = [kernel(op, "dense", 0) for op in ("embed", "linear")]
    kernels += [kernel(op, layout, 5) for op, layout in layouts.items()]
    program = ProgramSpec("forward", forward, StepShape(2, 2, (), 2, 1), INPUTS)
    work = Workload(params, [], {}, [program], {})
    return make_plan("test", work, Resolver("test", kernels, {}), all_ops()).plan


TIED = {"embed": table("embed", embed=EMBED), "head": table("head", linear=LINEAR)}


@pytest.mark.parametrize("layouts", [{}, {"embed": "tiles", "linear": "tiles"}], ids=["dense", "tiles"])
def test_a_tied_tensor_counts_once_where_one_packing_is_best_for_both(layouts: dict[str, str]) -> None:
    made = plan(TIED, **layouts)
    assert len(set(made.weight_layouts.values())) == 1
    assert made.weight_bytes == BYTES and made.notes[1:] == ()


def test_it_counts_twice_in_two_packings_and_the_plan_says_so() -> None:
    made = plan(TIED, linear="tiles")
    assert made.weight_layouts == {"embed": "dense", "head": "tiles"}
    assert made.weight_bytes == 2 * BYTES
    note = f"embed and head hold one tensor in 2 packings: dense, tiles (+{BYTES} bytes)"
    assert made.notes[1:] == (note,) and note in made.summary()
    assert TypeAdapter(Plan).validate_python(json.loads(json.dumps(made.to_json()))) == made


def test_one_parameter_of_two_kinds_has_one_packing_for_both() -> None:
    made = plan({"embed": table("embed", embed=EMBED, linear=LINEAR)}, linear="tiles")
    assert made.weight_layouts == {"embed": "dense"} and made.weight_bytes == BYTES


def test_both_weights_of_an_expert_have_its_kernels_packing() -> None:
    problem = ExpertProblem(dtype="float32", experts=2, local=2, hidden=4, width=3)
    shapes = {"w13": (2, 6, 4), "w2": (2, 4, 3)}
    params = {
        name: Param(name, name, shape, "float32", {"experts": problem}, lambda checkpoint, at: Local(()))
        for name, shape in shapes.items()
    }

    def run(ops: Any, w: Any, caches: Any, inputs: Any, arrays: Any) -> tuple[dict[str, Any], list[Any]]:
        return {"out": ops.grouped_mlp(inputs.arrays["x"], w["w13"], w["w2"], inputs.arrays["offsets"])}, caches

    inputs = InputLayout([InputField("x", "float32", (5, 4)), InputField("offsets", "int32", (3,))])
    packed = Kernel("packed", "grouped_mlp", "test", lambda *_: None, layout="tiles", pack=lambda param, local: {})
    work = Workload(params, [], {}, [ProgramSpec("run", run, StepShape(5, 1, (), 1, 5), inputs)], {})
    made = make_plan("test", work, Resolver("test", [packed], {}), all_ops())
    assert made.plan.weight_layouts == {"w13": "tiles", "w2": "tiles"}
    assert {name: packing.pack for name, packing in made.packings.items()} == dict.fromkeys(shapes, packed.pack)


# ---- decompositions ----------------------------------------------------------------------------------------------

KV = KVProblem(dtype="float32", kv_heads=1, qk_dim=4, v_dim=4, page_size=2, kv_dtype="float32")
TURNS = {
    name: RopeWriteProblem.of(RopeProblem(dtype="float32", dim=dim, base=1e4), KV)
    for name, dim in (("rope_write_kv", 4), ("rope_write_kv.local", 2))
}


def turned_forward(ops: Any, w: Any, caches: Any, inputs: Any, arrays: Any) -> tuple[dict[str, Any], list[Any]]:
    q, k, v = (inputs.arrays[name] for name in "qkv")
    outputs = {}
    for name in TURNS:
        outputs[name], cache = getattr(ops, name)(caches[0], q, k, v, inputs.positions, inputs)
    return outputs, [cache]


def turned_plan(*names: str) -> Planned:
    """The plan of two rotations that differ in their problem alone, with kernels of some ops."""
    kernels = [reference_kernel(all_ops()[op]) for op in names]
    sizes = {"q": (3, 2, 4), "k": (3, 1, 4), "v": (3, 1, 4)}
    fields = [InputField(name, "float32", shape) for name, shape in sizes.items()]
    shape = StepShape(3, 1, (2,), 1, 3)
    program = ProgramSpec("forward", turned_forward, shape, InputLayout([*forward_inputs(shape).fields, *fields]))
    uses = {name: ("rope_write_kv", problem) for name, problem in TURNS.items()}
    work = Workload({}, [KV], uses, [program], {})
    return make_plan("numpy", work, Resolver("numpy", kernels, {}), all_ops())


def test_parts_of_two_composites_with_one_name_keep_their_problems() -> None:
    entries = turned_plan("rope", "write_kv").plan.entries
    assert [(entry.op, entry.calls) for entry in entries] == [("rope", 1), ("write_kv", 2), ("rope", 1)]
    ropes = [entry.problem for entry in entries if entry.op == "rope"]
    assert "dim=4 " in ropes[0] and "dim=2 " in ropes[1] and not [text for text in ropes if "page_size" in text]


@pytest.mark.parametrize("names", [("rope", "write_kv"), ("rope_write_kv",)], ids=["decomposed", "whole"])
def test_a_composite_computes_its_own_problem_by_parts_or_whole(names: tuple[str, ...]) -> None:
    made = turned_plan(*names)
    assert {entry.op for entry in made.plan.entries} == set(names)
    ops = made.programs[0][1].bind(ReferenceSession())
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, heads, 4)).astype(np.float32) for heads in (2, 1, 1))
    at, slots = (ValueArray(np.array(ids, np.int32)) for ids in ([3, 4, 5], [5, 2, 4]))
    step = StepInputs({"slots.0": slots}, StepShape(3, 1, (2,), 1, 3))
    for name, problem in TURNS.items():
        cache = Cache(0, KV, "", {part: np.zeros((4, 2, 1, 4), np.float32) for part in "kv"})
        turned, cache = getattr(ops, name)(cache, *map(ValueArray, (q, k, v)), at, step)
        expected = rope(problem.rope, q, k, at.values, num=Numerics.of("float32", "float32"))
        np.testing.assert_array_equal(turned.values, expected[0])
        for part, written in (("k", expected[1]), ("v", v)):
            np.testing.assert_array_equal(cache.arrays[part].reshape(8, 1, 4)[slots.values], written)
