"""The example packages do what the documentation says of them, installed by their metadata as a user's would be."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lineshaft import LLM, SamplingParams
from lineshaft.config import make_config
from lineshaft.errors import AmbiguousBackend, InvalidValue, UnknownBackend, Unsupported
from lineshaft.explain import explain
from lineshaft.plan import Plan
from lineshaft.registry import discover

ROOT = Path(__file__).parents[3]
TOY, KERNEL = ROOT / "examples" / "plugin", ROOT / "examples" / "kernel"
SMALL: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 64, "max_logprobs": 0, "scheduler": {"max_rows": 2, "token_budget": 16},
}  # fmt: skip
PROMPTS = ["The capital of France is", "a"]
Install = Callable[[Path], None]


def tokens(model: Path, **config: Any) -> list[list[int]]:
    """Greedy continuations of the prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(str(model), **{**SMALL, **config}) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, progress=False)]


def kernels(plan: Plan, op: str) -> set[str]:
    return {entry.kernel for entry in plan.entries if entry.op == op}


def plan_of(model: Path, **config: Any) -> Plan:
    return explain(make_config(model=str(model), **{**SMALL, **config}))


# ---- the backend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["tape", "eager"])
def test_the_toy_backend_generates_what_the_reference_does(install: Install, tiny_llama: Path, program: str) -> None:
    install(TOY)
    expected = tokens(tiny_llama, backend="numpy")
    assert [len(item) for item in expected] == [12, 12]
    assert tokens(tiny_llama, backend="toy", backend_options={"program": program}) == expected


def test_the_toy_backend_is_listed_with_its_distribution(install: Install) -> None:
    install(TOY)
    (found,) = [status for status in discover().status() if status.name == "toy"]
    assert (found.usable, found.distribution, found.version) == (True, "lineshaft-toy", "0.1.0")


def test_without_it_there_is_no_such_backend() -> None:
    with pytest.raises(UnknownBackend, match="toy"):
        discover().select("toy")


def test_beside_another_host_backend_auto_is_a_tie(install: Install) -> None:
    install(TOY)
    with pytest.raises(AmbiguousBackend, match='backend = "cpu" or backend = "toy"'):
        discover().select("auto")


def test_its_kernel_brings_its_packing(install: Install, tiny_llama: Path) -> None:
    install(TOY)
    plan = plan_of(tiny_llama, backend="toy")
    assert kernels(plan, "linear") == {"toy_linear"}
    assert {plan.weight_layouts[name] for name in ("layers.0.qkv", "layers.1.down", "head")} == {"toy_transposed"}
    assert plan.weight_layouts["embed"] == "dense"


def test_its_options_are_checked(install: Install, tiny_llama: Path) -> None:
    install(TOY)
    with pytest.raises(InvalidValue, match=r"backend_options\.program"):
        plan_of(tiny_llama, backend="toy", backend_options={"program": "fast"})


# ---- one kernel for another's backend --------------------------------------------------------------------------------


def test_a_contributed_kernel_is_chosen_and_explained(install: Install, tiny_llama: Path) -> None:
    before = plan_of(tiny_llama, backend="cpu")
    assert kernels(before, "rms_norm") == {"cpu_native_rms_norm"}
    install(KERNEL)
    plan = plan_of(tiny_llama, backend="cpu")
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
    assert tokens(tiny_llama, backend="cpu") == expected


def test_the_configuration_settles_which_kernel(install: Install, tiny_llama: Path) -> None:
    install(KERNEL)
    named = plan_of(tiny_llama, backend="cpu", kernels={"rms_norm": "torch_rms_norm"})
    assert kernels(named, "rms_norm") == {"torch_rms_norm"}
    with pytest.raises(Unsupported, match="it has torch_rms_norm, cpu_native_rms_norm, exact_rms_norm"):
        plan_of(tiny_llama, backend="cpu", kernels={"rms_norm": "absent"})


# ---- the script ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_python_api_runs(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "generate.py"))["main"](str(tiny_llama))
    shown = capsys.readouterr().out
    assert all(f"--- {part}\n" in shown for part in ("batch", "chat", "stream", "logprobs"))
    assert "(length)" in shown
