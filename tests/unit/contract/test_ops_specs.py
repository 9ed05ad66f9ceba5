"""What must hold of every OpSpec: stable cases, finite outcomes, shapes that planner and reference agree on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, named_outputs, operand, run_reference
from lineshaft_contract.ops.spec import EXACT, CacheArg, Call, Case, Numerics, OpSpec, StepArg, WeightArg
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem, RopeWriteProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import ArraySpec, StepInputs
from lineshaft_contract.weights import Weight

OPS = all_ops()
SEED = 0
SMOKE = [(spec, case) for spec in OPS.values() for case in spec.cases(np.random.default_rng(SEED), "smoke")]
NAMES = [f"{spec.name}/{case.id}" for spec, case in SMOKE]

EXPECTED = set(
    """
    embed linear head_linear concat add rms_norm add_rms_norm silu_mul gelu_mul rope write_kv rope_write_kv attend
    merge_states latent_attend router_topk expert_mlp grouped_mlp moe_dispatch moe_combine gather_rows merge_rows
    apply_logits sample argmax logprobs read_pages write_pages copy_pages copy_slots all_reduce
    all_gather reduce_scatter all_to_all broadcast permute
    """.split()  # noqa: SIM905
)

each_case = pytest.mark.parametrize(("spec", "case"), SMOKE, ids=NAMES)
each_op = pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())


def reference_run(spec: OpSpec, case: Case) -> Any:
    return run_reference(spec, case, Numerics.of(case.problem.dtype, spec.accumulate))


def widened(spec: OpSpec, case: Case) -> Any:
    """The reference run's outputs in float64, whose NaNs compare equal."""
    return {name: a.astype(np.float64) for name, a in named_outputs(spec, reference_run(spec, case)).items()}


def find(op: str, case_id: str) -> Case:
    return next(case for case in OPS[op].cases(np.random.default_rng(SEED), "smoke") if case.id == case_id)


def test_every_op_of_the_contract_is_there() -> None:
    assert set(OPS) == EXPECTED
    assert all(name == spec.name and spec.signature.startswith(name + "(") for name, spec in OPS.items())


@each_op
def test_ids_are_unique_and_values_depend_on_seed_and_id_alone(spec: OpSpec) -> None:
    smoke = list(spec.cases(np.random.default_rng(SEED), "smoke"))
    full = {case.id: case for case in spec.cases(np.random.default_rng(SEED), "full")}
    assert len({case.id for case in smoke}) == len(smoke) > 1
    assert all("float32" not in case.id and " " not in case.id for case in smoke)
    for case in smoke:
        np.testing.assert_equal(widened(spec, case), widened(spec, full[case.id]))


@each_op
def test_another_seed_gives_other_values_under_the_same_ids(spec: OpSpec) -> None:
    one, two = (list(spec.cases(np.random.default_rng(seed), "smoke")) for seed in (1, 2))
    assert [case.id for case in one] == [case.id for case in two]
    assert [case.problem for case in one] == [case.problem for case in two]


FUZZED = [spec for spec in OPS.values() if spec.fuzz]


@pytest.mark.parametrize("spec", FUZZED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("n", range(12))
def test_random_problems_depend_on_their_number_and_their_values_on_the_seed(spec: OpSpec, n: int) -> None:
    assert spec.fuzz is not None
    one, two = (spec.fuzz(np.random.default_rng(seed), n) for seed in (1, 2))
    assert one.id == two.id == f"fuzz/{n}-{one.id.rpartition('-')[2]}"
    assert one.problem == two.problem
    assert compare(spec, one, reference_run(spec, one)) == []


def test_the_ops_with_random_problems() -> None:
    names = "embed linear rms_norm add_rms_norm rope write_kv rope_write_kv attend gather_rows"
    assert {spec.name for spec in FUZZED} == set(names.split())


def test_every_public_bug_has_cases_with_its_link() -> None:
    links = "vllm/issues/45562 vllm/issues/53856 vllm/issues/57493 vllm/issues/57094 vllm/issues/50427 ATOM/issues/702"
    reasons = [case.why for _, case in SMOKE]
    assert all(any(link in why for why in reasons) for link in links.split())


@each_case
def test_reference_run_is_within_tolerance_and_finite(spec: OpSpec, case: Case) -> None:
    run = reference_run(spec, case)
    assert compare(spec, case, run) == []
    if "cache" in "".join(spec.consumes) or spec.name in ("read_pages", "apply_logits", "logprobs"):
        return  # garbage pages are moved as they are, masks give -inf
    if any(name in case.id for name in ("nan_row", "nan_token", "nan_weight")):
        return
    for name, values in named_outputs(spec, run).items():
        lse = spec.name == "attend" and name == "1"
        assert np.isfinite(values[values > -np.inf] if lse else values).all()


@each_case
def test_one_wrong_value_is_seen(spec: OpSpec, case: Case) -> None:
    """A check that accepts anything would be worthless: disturb one value of each output."""
    run = reference_run(spec, case)
    for name, values in named_outputs(spec, run).items():
        if not values.size:
            continue
        wrong = values.copy()
        sizes = np.nan_to_num(np.abs(values.astype(float)), posinf=0)
        spot = np.unravel_index(int(np.argmax(sizes)), values.shape)
        value = float(wrong[spot])
        wrong[spot] = 0 if np.isnan(value) or abs(value) > 100 else value + 1 + abs(value)
        exact = named_outputs(spec, run_reference(spec, case, EXACT))[name]
        assert spec.tolerance_of(name).check(case.problem, wrong, exact, values) is not None


# ---- planner and reference agree on problems and shapes ----------------------------------------------------------


@dataclass(frozen=True)
class Abstract:
    spec: ArraySpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape


def abstract(value: Any, case: Case, spec: OpSpec) -> Any:
    """What a forward passes while it is traced, for an argument of a case."""
    if isinstance(value, WeightArg):
        return Weight(0, "w", {value.kind: weight_base(case, spec, value)}, "")
    if isinstance(value, CacheArg):
        pages = {name: abstract(array, case, spec) for name, array in value.pages.items()}
        return pages if spec.name == "write_pages" and len(case.args[1]) == len(value.pages["k"]) else the_cache(case)
    if isinstance(value, StepArg):
        return StepInputs({name: abstract(array, case, spec) for name, array in value.arrays.items()}, value.shape)
    if isinstance(value, dict):
        return {name: abstract(item, case, spec) for name, item in value.items()}
    if isinstance(value, list):
        items = [abstract(item, case, spec) for item in value]
        return items[0] if spec.collective else items
    if isinstance(value, np.ndarray):
        return Abstract(ArraySpec(value.shape, operand(value, case.problem).dtype.name))
    return value


def weight_base(case: Case, spec: OpSpec, value: WeightArg) -> Any:
    if spec.name == "latent_attend":
        heads, out, width = value.array.shape
        return LinearProblem(dtype=case.problem.dtype, n=out, k=width, heads=heads)
    return unsized(case.problem)


def unsized(problem: Any) -> Any:
    """What the model declares: the problem without what a call's shapes add to it."""
    sizes = ("m", "rows", "tokens", "pages", "max_query")
    return replace(problem, **{name: 0 for name in sizes if hasattr(problem, name)})


def the_cache(case: Case) -> Cache:
    p: Any = case.problem
    if isinstance(p, KVProblem):
        return Cache(0, replace(p.kv if isinstance(p, RopeWriteProblem) else p, rows=0), "")
    v_dim = 0 if p.value_in_key else p.v_dim
    names = ("dtype", "kv_heads", "qk_dim", "page_size", "kv_dtype", "group", "kv_scheme")
    shared = {name: getattr(p, name) for name in names}
    return Cache(0, KVProblem(v_dim=v_dim, **shared), "")


@each_case
def test_specialise_gives_the_problem_and_infer_the_shapes(spec: OpSpec, case: Case) -> None:
    degrees = {"dp": 2, "tp": case.problem.size // (2 if len(case.problem.axis) > 1 else 1)} if spec.collective else {}
    args = tuple(abstract(value, case, spec) for value in case.args)
    call = Call(args, {name: abstract(value, case, spec) for name, value in case.kwargs.items()}, degrees)
    declared = None if spec.weight else unsized(case.problem)
    problem = spec.specialise(declared, call)
    assert problem == case.problem
    inferred = spec.infer(problem, call)
    out = reference_run(spec, case)
    expected = inferred if isinstance(inferred, tuple) else (inferred,)
    got = out if isinstance(out, tuple) else (out[0],) if spec.collective else (out,)
    assert ("cache" in expected) == (spec.consumes == ("cache",))
    for array, wanted in zip(got, expected, strict=True):
        if wanted == "cache":
            before = {name: pages.shape for name, pages in case.args[0].pages.items()}
            assert {name: pages.shape for name, pages in array.items()} == before
        else:
            assert (tuple(array.shape), array.dtype.name) == (wanted.shape, wanted.dtype)


@each_op
def test_work_and_bytes_are_positive_for_real_sizes(spec: OpSpec) -> None:
    case = next(iter(spec.cases(np.random.default_rng(SEED), "smoke")))
    assert spec.moved(case.problem) > 0
    assert spec.flops(case.problem) >= 0


@each_op
def test_optional_arrays_of_cases_follow_the_problem(spec: OpSpec) -> None:
    for case in spec.cases(np.random.default_rng(SEED), "smoke"):
        assert set(case.kwargs) <= set(spec.optional)
        for keyword, feature in spec.optional.items():
            declared = getattr(case.problem, feature)
            wanted = declared not in (False, "none")
            assert (keyword in case.kwargs) == wanted, case.id


# ---- composites ---------------------------------------------------------------------------------------------------


class ReferenceOps:
    """Runs a composite's default with references; `problems` gives the problem of each inner op."""

    def __init__(self, num: Numerics, problems: dict[str, Any]) -> None:
        self.num, self.problems = num, problems

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kw: OPS[name].reference(self.problems.get(name), *args, num=self.num, **kw)


COMPOSITES = [(spec, case) for spec, case in SMOKE if spec.default]


@pytest.mark.parametrize(("spec", "case"), COMPOSITES, ids=[f"{spec.name}/{case.id}" for spec, case in COMPOSITES])
def test_default_decomposition_computes_the_same(spec: OpSpec, case: Case) -> None:
    num = Numerics.of(case.problem.dtype, spec.accumulate)
    own = dict.fromkeys(("rms_norm", "write_kv", "moe_dispatch", "grouped_mlp", "moe_combine"), case.problem)
    problems = {**own, **spec.parts(case.problem)}
    args = [operand(arg, case.problem) for arg in case.args]
    assert spec.default is not None
    kwargs = {name: operand(array, case.problem) for name, array in case.kwargs.items()}
    result = spec.default(ReferenceOps(num, problems), case.problem, *args, **kwargs)
    got = {name: array.astype(np.float64) for name, array in named_outputs(spec, result).items()}
    np.testing.assert_equal(got, widened(spec, case))


def test_composites_are_those_of_the_contract() -> None:
    assert {name for name, spec in OPS.items() if spec.default} == {
        "add_rms_norm", "rope_write_kv", "latent_attend", "expert_mlp",
    }  # fmt: skip
    assert not any(spec.required for spec in OPS.values() if spec.default)
    assert isinstance(find("latent_attend", "decode/latent12-rope4-f32").problem, AttendProblem)
