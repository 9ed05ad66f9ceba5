"""The tutorial's edits, made to what new-plugin writes, have the outcomes that it tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft.config import make_config
from lineshaft.explain import explain
from lineshaft_conformance.checks import Failure
from lineshaft_conformance.cli.new_plugin import write
from lineshaft_conformance.levels import collect
from lineshaft_conformance.scaffold import render
from lineshaft_conformance.subject import Subject, Target

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "tutorial-backend.md").read_text(encoding="utf-8")
EDITS = dict(re.findall(r"^```python title=\S+#(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
WORDS = " ".join(PAGE.split())
KERNELS = "src/lineshaft_mychip/kernels.py"
Outcomes = dict[str, str]


@pytest.fixture
def edited(install: Callable[[Path], None], tmp_path: Path) -> Callable[..., None]:
    """Installs a new plugin whose kernels.py has these of the page's functions, and ends as `register` says."""

    def put(*names: str, register: str = "register") -> None:
        files = render("mychip", "torch")
        text = files[KERNELS].replace("import LinearProblem\n", "import LinearProblem, PointwiseProblem\n")
        functions = "\n\n".join(EDITS[name] for name in names)
        text = text.replace("def own_kernels", f"{functions}\n\ndef own_kernels")
        assert text.endswith("    return [make(backend)]\n")
        files[KERNELS] = text.removesuffix("    return [make(backend)]\n") + EDITS[register]
        write(files, tmp_path / "mychip")
        install(tmp_path / "mychip")

    return put


def outcomes(**options: str) -> Outcomes:
    """What each case of silu_mul says: "" for a pass."""
    subject, found = Subject(Target("mychip", options)), {}
    for check in collect(subject, "smoke", 1):
        if check.id.startswith("L1/silu_mul/"):
            try:
                found[check.id] = ""
                check.run(subject, 0)
            except Failure as failure:
                found[check.id] = str(failure)
    return found


def failures_told(found: Outcomes, case: str) -> None:
    """The page shows this case's failure as it is."""
    assert f"fail {case} {' '.join(found[case].split())}" in WORDS


def test_the_first_kernel_passes(edited: Callable[..., None]) -> None:
    edited("right")
    assert set(outcomes().values()) == {""}


def test_the_narrow_kernel_fails_in_float32_alone(edited: Callable[..., None]) -> None:
    edited("narrow")
    found = outcomes()
    failed = {case for case, reason in found.items() if reason}
    assert failed == {case for case in found if case.endswith("-f32")}
    assert {case.rpartition("-")[2] for case in found} == {"f32", "bf16"}
    failures_told(found, "L1/silu_mul/t1-f5-f32")
    failures_told(found, "L1/silu_mul/t6-f32-f32")


def test_the_kernel_that_declines_passes_and_its_reason_is_told(edited: Callable[..., None], tiny_llama: Path) -> None:
    edited("narrow", "declines", register="register_declines")
    assert set(outcomes().values()) == {""}
    config = make_config(
        model=str(tiny_llama), backend="mychip", dtype="float32", max_model_len=64,
        scheduler={"max_rows": 2, "token_budget": 16},
    )  # fmt: skip
    (reason,) = {r.reason for e in explain(config).entries for r in e.rejected if r.kernel == "mychip_silu_mul"}
    assert f"mychip_silu_mul: {reason}" in WORDS


def test_the_forgetful_kernel_fails_in_replays_and_not_without(edited: Callable[..., None]) -> None:
    edited("forgetful")
    found = outcomes()
    failures_told(found, "L1/silu_mul/t6-f32-f32")
    assert set(outcomes(program="eager").values()) == {""}
