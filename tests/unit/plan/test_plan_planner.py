"""What the plan says of a tensor that two parameters share: one packing where it serves both, else one for each."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from lineshaft.plan import Plan, ProgramSpec, Resolver, Workload, make_plan
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.problems import EmbedProblem, ExpertProblem, LinearProblem, Problem
from lineshaft_contract.steps import InputField, InputLayout, StepShape
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
    assert made.weight_bytes == BYTES and made.notes == ()


def test_it_counts_twice_in_two_packings_and_the_plan_says_so() -> None:
    made = plan(TIED, linear="tiles")
    assert made.weight_layouts == {"embed": "dense", "head": "tiles"}
    assert made.weight_bytes == 2 * BYTES
    note = f"embed and head hold one tensor in 2 packings: dense, tiles (+{BYTES} bytes)"
    assert made.notes == (note,) and note in made.summary()
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
