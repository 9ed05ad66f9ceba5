"""The example packages do what the documentation says of them, installed by their metadata as a user's would be."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineshaft import LLM, SamplingParams
from lineshaft.config import make_config
from lineshaft.errors import (
    AmbiguousBackend,
    ContractViolation,
    InvalidSamplingParams,
    InvalidValue,
    MisshapenTensor,
    SessionClosed,
    UnknownBackend,
    Unsupported,
)
from lineshaft.explain import explain
from lineshaft.plan import Plan
from lineshaft.registry import discover
from lineshaft_conformance.checks import NotClaimed
from lineshaft_conformance.cli.new_plugin import write
from lineshaft_conformance.harness.rig import Values, whole_param
from lineshaft_conformance.levels import collect
from lineshaft_conformance.scaffold import render
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.problems import EmbedProblem, LinearProblem, Problem
from lineshaft_contract.sessions import Packing
from lineshaft_contract.weights import Local, Param

ROOT = Path(__file__).parents[3]
PLAIN, KERNEL = ROOT / "examples" / "numpy_backend", ROOT / "examples" / "kernel"
SMALL: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 64, "max_logprobs": 0, "sampling_extras": False,
    "scheduler": {"max_rows": 2, "token_budget": 16},
}  # fmt: skip
TORCH: dict[str, Any] = {"backend": "cpu", "backend_options": {"engine": "torch"}}
"""What a kernel that works on PyTorch's tensors needs of the CPU backend."""
PROMPTS = ["The capital of France is", "a"]
Install = Callable[[Path], None]


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tokens(model: Path, params: SamplingParams = GREEDY, **config: Any) -> list[list[int]]:
    """Continuations of the prompts."""
    with LLM(str(model), **{**SMALL, **config}) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, progress=False)]


def kernels(plan: Plan, op: str) -> set[str]:
    return {entry.kernel for entry in plan.entries if entry.op == op}


def plan_of(model: Path, **config: Any) -> Plan:
    return explain(make_config(model=str(model), **{**SMALL, **config}))


# ---- a new plugin, on the torch kit ----------------------------------------------------------------------------------


@pytest.fixture
def mychip(install: Install, tmp_path: Path) -> None:
    """What `lineshaft new-plugin mychip` writes, installed."""
    write(render("mychip", "torch"), tmp_path / "mychip")
    install(tmp_path / "mychip")


@pytest.mark.usefixtures("mychip")
@pytest.mark.parametrize("program", ["tape", "eager"])
def test_a_new_backend_generates_what_the_reference_does(tiny_llama: Path, program: str) -> None:
    expected = tokens(tiny_llama, backend="numpy")
    assert [len(item) for item in expected] == [12, 12]
    assert tokens(tiny_llama, backend="mychip", backend_options={"program": program}) == expected


@pytest.mark.usefixtures("mychip")
def test_a_new_backend_is_listed_with_its_distribution() -> None:
    (found,) = [status for status in discover().status() if status.name == "mychip"]
    assert (found.usable, found.distribution, found.version) == (True, "lineshaft-mychip", "0.1.0")


def test_without_it_there_is_no_such_backend() -> None:
    with pytest.raises(UnknownBackend, match="mychip"):
        discover().select("mychip")


@pytest.mark.usefixtures("mychip")
def test_beside_another_host_backend_auto_is_a_tie() -> None:
    with pytest.raises(AmbiguousBackend, match='backend = "cpu" or backend = "mychip"'):
        discover().select("auto")


@pytest.mark.usefixtures("mychip")
def test_its_kernel_brings_its_packing(tiny_llama: Path) -> None:
    plan = plan_of(tiny_llama, backend="mychip")
    assert kernels(plan, "linear") == {"mychip_linear"}
    layouts = {plan.weight_layouts[name] for name in ("layers.0.qkv", "layers.1.down", "head")}
    assert layouts == {"mychip_transposed"}
    assert plan.weight_layouts["embed"] == "dense"


@pytest.mark.usefixtures("mychip")
def test_its_options_are_checked(tiny_llama: Path) -> None:
    with pytest.raises(InvalidValue, match=r"backend_options\.program"):
        plan_of(tiny_llama, backend="mychip", backend_options={"program": "fast"})


# ---- and on the JAX kit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
def test_a_new_xla_backend_generates_what_the_reference_does(
    tp: int, install: Install, tiny_llama: Path, tmp_path: Path
) -> None:
    write(render("myxla", "jax"), tmp_path / "myxla")
    install(tmp_path / "myxla")
    config: dict[str, Any] = {"backend": "myxla", "layout": {"tp": tp}}
    assert kernels(plan_of(tiny_llama, **config), "linear") == {"myxla_linear"}
    assert tokens(tiny_llama, **config) == tokens(tiny_llama, backend="numpy")


def test_a_new_xla_backend_keeps_its_programs_where_asked(install: Install, tiny_llama: Path, tmp_path: Path) -> None:
    write(render("myxla", "jax"), tmp_path / "myxla")
    install(tmp_path / "myxla")
    tokens(tiny_llama, backend="myxla", backend_options={"cache_dir": str(tmp_path / "programs")})
    assert list((tmp_path / "programs").iterdir())


# ---- a backend from scratch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_block", [128, 3])
def test_plain_numpy_generates_what_the_reference_does(install: Install, tiny_llama: Path, query_block: int) -> None:
    install(PLAIN)
    expected = tokens(tiny_llama, backend="numpy")
    assert tokens(tiny_llama, backend="plainnp", backend_options={"query_block": query_block}) == expected


def test_plain_numpy_samples_what_the_reference_does(install: Install, tiny_llama: Path) -> None:
    install(PLAIN)
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, seed=7, max_tokens=12, ignore_eos=True)
    expected = tokens(tiny_llama, params, backend="numpy")
    assert expected != tokens(tiny_llama, backend="numpy")
    assert tokens(tiny_llama, params, backend="plainnp") == expected


def test_plain_numpy_edits_logits_as_the_reference_does_and_declines_typical_p(
    install: Install, tiny_llama: Path
) -> None:
    install(PLAIN)
    extras = {"sampling_extras": True}
    params = SamplingParams(
        repetition_penalty=1.3, allowed_token_ids=list(range(40, 90)), seed=7, max_tokens=12, ignore_eos=True
    )
    expected = tokens(tiny_llama, params, backend="numpy", **extras)
    assert tokens(tiny_llama, params, backend="plainnp", **extras) == expected
    assert {token for output in expected for token in output} <= set(range(40, 90))
    reason = (
        "^typical_p is not possible here: backend 'plainnp' has no kernel for sample .*does not handle typical; leave"
    )
    with pytest.raises(InvalidSamplingParams, match=reason):
        tokens(tiny_llama, SamplingParams(typical_p=0.5), backend="plainnp", **extras)
    assert "without typical_p: " in plan_of(tiny_llama, backend="plainnp", **extras).summary()


def test_plain_numpy_runs_one_worker_and_says_so(install: Install, tiny_llama: Path) -> None:
    install(PLAIN)
    with pytest.raises(InvalidValue, match="set every degree to 1"):
        plan_of(tiny_llama, backend="plainnp", layout={"tp": 2})


def test_plain_numpy_declines_other_dtypes_with_a_reason(install: Install, tiny_llama: Path) -> None:
    install(PLAIN)
    subject = Subject(Target("plainnp"))
    for kernel in subject.kernels:
        assert kernel.supports(Problem(dtype="float32")) is None
        assert kernel.supports(Problem(dtype="bfloat16")) == "NumPy computes in float32 here, not in bfloat16"


def test_plain_numpy_has_a_kernel_of_each_required_op_and_of_edits_and_passes_the_ops(install: Install) -> None:
    install(PLAIN)
    subject = Subject(Target("plainnp"))
    required = {spec.name for spec in subject.ops.values() if spec.required}
    assert {kernel.op for kernel in subject.kernels} == required | {"apply_logits"}
    for check in collect(subject, "smoke", 2):
        if check.dtype in ("", "float32"):
            try:
                check.run(subject, 1)
            except NotClaimed as reason:
                assert str(reason), check.id


def test_plain_numpy_updates_weights_in_every_parameter_of_their_source(install: Install) -> None:
    install(PLAIN)
    with closing(Subject(Target("plainnp")).backend.session(0)) as session:
        table = np.arange(6, dtype=np.float32).reshape(3, 2)
        embed = whole_param("embed", table, {"embed": EmbedProblem(dtype="float32", vocab=3, width=2)})
        head = replace(embed, name="head", problems={"linear": LinearProblem(dtype="float32", n=3, k=2)})
        tree = session.load([embed, head], Values({"embed": table}), {"head": Packing("turned", turned)})
        assert [weight.key for weight in tree] == [0, 1]
        session.update({"head": table + 1})
        assert np.array_equal(tree[0].arrays["data"], table + 1)
        assert np.array_equal(tree[1].arrays["turned"], (table + 1).T)
        with pytest.raises(MisshapenTensor):
            session.update({"embed": table, "head": table.T})
        assert np.array_equal(tree[0].arrays["data"], table + 1)
    with pytest.raises(SessionClosed):
        session.update({"head": table})


def turned(param: Param, local: Local) -> dict[str, np.ndarray[Any, Any]]:
    """A packing of somebody else's kernel."""
    return {"turned": np.ascontiguousarray(local.parts[0].arrays["data"].T)}


def test_plain_numpy_is_small_and_free_of_other_array_libraries() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (PLAIN / "src").rglob("*.py")]
    assert sum(bool(line.strip()) for text in sources for line in text.splitlines()) <= 300
    assert not re.search(
        r"^\s*(import|from) (torch|jax|lineshaft_(?!plainnp|contract))", "\n".join(sources), re.MULTILINE
    )


# ---- one kernel for another's backend --------------------------------------------------------------------------------


def test_a_contributed_kernel_is_chosen_and_explained(install: Install, tiny_llama: Path) -> None:
    before = plan_of(tiny_llama, **TORCH)
    assert kernels(before, "rms_norm") == {"cpu_native_rms_norm"}
    install(KERNEL)
    plan = plan_of(tiny_llama, **TORCH)
    assert kernels(plan, "rms_norm") == {"exact_rms_norm"}
    assert plan.hash != before.hash
    reasons = {(r.kernel, r.reason) for e in plan.entries if e.op == "rms_norm" for r in e.rejected}
    assert reasons == {
        ("cpu_native_rms_norm", "priority 15 is below 20 of exact_rms_norm"),
        ("torch_rms_norm", "priority 0 is below 20 of exact_rms_norm"),
    }


def test_a_contributed_kernel_runs(install: Install, tiny_llama: Path) -> None:
    expected = tokens(tiny_llama, backend="numpy")
    install(KERNEL)
    assert tokens(tiny_llama, **TORCH) == expected


def test_a_kernel_of_pytorch_tells_the_native_engine_what_it_needs(install: Install, tiny_llama: Path) -> None:
    install(KERNEL)
    with pytest.raises(ContractViolation, match='needs backend_options engine = "torch"'):
        tokens(tiny_llama, backend="cpu", backend_options={"engine": "native"})


def test_the_configuration_settles_which_kernel(install: Install, tiny_llama: Path) -> None:
    install(KERNEL)
    named = plan_of(tiny_llama, **TORCH, kernels={"rms_norm": "torch_rms_norm"})
    assert kernels(named, "rms_norm") == {"torch_rms_norm"}
    with pytest.raises(Unsupported, match="it has torch_rms_norm, cpu_native_rms_norm, exact_rms_norm"):
        plan_of(tiny_llama, **TORCH, kernels={"rms_norm": "absent"})


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_python_api_runs(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "generate.py"))["main"](str(tiny_llama))
    shown = capsys.readouterr().out
    assert all(f"--- {part}\n" in shown for part in ("batch", "chat", "stream", "logprobs"))
    assert "(length)" in shown


def test_the_tiny_llama_of_the_example_answers(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "examples" / "tiny_llama.py"))["main"](tmp_path / "made" / "llama")
    found = tokens(tmp_path / "made" / "llama", backend="cpu")
    assert [len(ids) for ids in found] == [12, 12] and found[0] != found[1]
