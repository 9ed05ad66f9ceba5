"""Kernels of packages that are installed beside: called as their sources say, planned for every step, and right over
ragged steps, in graphs too. The packages themselves are stand-ins here, so that this shows nothing of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401  names bfloat16 to NumPy
import numpy as np
import pytest
import torch
from tests.unit.gpu import fake_packages

from lineshaft_conformance.harness.op_case import prepare
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.cases import Paging, paged_step
from lineshaft_contract.ops.run import compare
from lineshaft_contract.ops.spec import CacheArg
from lineshaft_contract.problems import AttendProblem, NormProblem, PointwiseProblem
from lineshaft_cuda import backend as cuda
from lineshaft_cuda import flash_attend, flashinfer_attend
from lineshaft_cuda.options import CudaOptions
from lineshaft_rocm import aiter_ops
from lineshaft_rocm import backend as rocm
from lineshaft_torch.fake import FakeDevice
from lineshaft_triton import backend as shared
from lineshaft_triton.backend import GpuBackend, installed
from lineshaft_triton.targets import TARGETS

OPS = all_ops()


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    fake_packages.install(monkeypatch)
    yield
    torch.set_num_threads(before)
    fake_packages._Wrapper.made.clear()


def subject(program: str) -> Any:
    """A backend on the fake device, as the suite's harness sees one."""
    options = CudaOptions(interpret=True, program=program)
    backend = GpuBackend("cuda", options, World(threads=1), TARGETS["sm90"], FakeDevice(), lambda target: [])
    return SimpleNamespace(info=SimpleNamespace(name="cuda"), ops=OPS, backend=backend)


def attention(kernel: str) -> Kernel:
    recipes = [*flashinfer_attend.recipes(), *(each for each, _ in flash_attend.recipes(TARGETS["sm90"]))]
    return {recipe("cuda").name: recipe("cuda") for recipe in recipes}[kernel]


def problem_of(paging: Paging, **fields: Any) -> AttendProblem:
    given = {"dtype": "bfloat16", "q_heads": 8, "kv_heads": 2, "qk_dim": 64, "v_dim": 64, "scale": 0.125, **fields}
    return AttendProblem(
        kv_dtype=given["dtype"], page_size=paging.page_size, tokens=paging.tokens, rows=len(paging.lengths),
        pages=paging.columns, max_query=max(q for q, _ in paging.lengths), **given,
    )  # fmt: skip


def case_of(paging: Paging, seed: int = 0, **fields: Any) -> Case:
    rng, problem = np.random.default_rng(seed), problem_of(paging, **fields)
    step = paged_step(rng, paging)
    pages = {name: step.fill(rng, (problem.kv_heads, problem.qk_dim)) for name in "kv"}
    q = rng.standard_normal((paging.tokens, problem.q_heads, problem.qk_dim))
    q[paging.tokens - paging.padding :] = np.nan
    return Case("random", problem, (q, CacheArg(pages), step.step), {})


STEPS: dict[str, Sequence[tuple[int, int]]] = {
    "decode": ((1, 1), (1, 16), (1, 17), (1, 300)),
    "decode-of-rows-without-query": ((1, 40), (0, 0), (1, 7), (0, 12), (1, 19)),
    "prefill": ((33, 33), (5, 5)),
    "mixed": ((1, 40), (20, 90), (0, 3), (1, 1), (7, 7)),
}
KERNELS = {"flashinfer_attend": 16, "flash_attend": 256, "flash3_attend": 16}


@pytest.mark.parametrize(("program", "padding"), [("graph", 3), ("eager", 0)])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_of_ragged_steps_is_right(kernel: str, step: str, padding: int, program: str) -> None:
    case = case_of(Paging(tuple(STEPS[step]), KERNELS[kernel], padding=padding, pool=40))
    op = prepare(OPS["attend"], case)
    with op.rig(subject(program), [attention(kernel)]) as rig:
        for _ in range(2):
            assert not compare(OPS["attend"], case, op.run(rig).result)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fields", [{"softcap": 3.0}, {"q_heads": 2}, {"q_heads": 6}, {"dtype": "float16"}], ids=str)
def test_attention_heeds_every_field_that_it_takes(kernel: str, fields: dict[str, Any]) -> None:
    case = case_of(Paging(STEPS["mixed"], KERNELS[kernel], padding=2), **fields)
    op = prepare(OPS["attend"], case)
    with op.rig(subject("graph"), [attention(kernel)]) as rig:
        assert not compare(OPS["attend"], case, op.run(rig).result)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_program_follows_steps_that_change(kernel: str) -> None:
    """One program, three steps of one shape: what was planned for one is not used for the next."""
    lengths = [((1, 40), (4, 90), (1, 1)), ((4, 7), (1, 95), (1, 60)), ((0, 0), (4, 30), (2, 90))]
    cases = [case_of(Paging(each, KERNELS[kernel], pool=40), seed) for seed, each in enumerate(lengths)]
    ops = [prepare(OPS["attend"], case) for case in cases]
    with ops[0].rig(subject("graph"), [attention(kernel)]) as rig:
        for case, op in zip(cases, ops, strict=True):
            op.refill(rig)
            assert not compare(OPS["attend"], case, op.run(rig).result)


def test_layers_share_a_plan_and_steps_have_their_own() -> None:
    case = case_of(Paging(STEPS["mixed"]))
    op = prepare(OPS["attend"], case)
    with op.rig(subject("graph"), [attention("flashinfer_attend")]) as rig:
        (wrapper,) = fake_packages._Wrapper.made
        before = wrapper.plans
        op.run(rig)
        assert wrapper.plans == before + 1


def test_tensor_cores_decode_where_many_heads_share_a_key() -> None:
    for q_heads, wanted in ((2, False), (6, False), (8, True), (14, True)):
        fake_packages._Wrapper.made.clear()
        op = prepare(OPS["attend"], case_of(Paging(STEPS["decode"]), q_heads=q_heads))
        with op.rig(subject("graph"), [attention("flashinfer_attend")]):
            assert fake_packages._Wrapper.made[0].use_tensor_cores == wanted


@pytest.mark.parametrize(
    ("kernel", "fields", "reason"),
    [
        ("flashinfer_attend", {"qk_dim": 96, "v_dim": 96}, "heads of 64, 128, 256"),
        ("flashinfer_attend", {"qk_dim": 128}, "keys as values, not 128 and 64"),
        ("flashinfer_attend", {"dtype": "float32"}, "not in float32"),
        ("flashinfer_attend", {"kv_dtype": "float8_e4m3fn"}, "not of float8_e4m3fn"),
        ("flashinfer_attend", {"q_heads": 7}, "2 do not divide 7"),
        ("flash_attend", {"page_size": 16}, "a multiple of 256 tokens, not of 16 (cache.page_size)"),
        ("flash_attend", {"qk_dim": 264, "v_dim": 264, "page_size": 256}, "multiples of 8 up to 256"),
        ("flash3_attend", {"qk_dim": 60, "v_dim": 60}, "multiples of 8"),
    ],
)
def test_what_a_package_cannot_do_is_declined_with_the_reason(kernel: str, fields: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {
        "dtype": "bfloat16", "q_heads": 8, "kv_heads": 2, "qk_dim": 64, "v_dim": 64, "page_size": 16, "scale": 1.0,
    }  # fmt: skip
    given |= fields
    found = attention(kernel).supports(AttendProblem(**{"kv_dtype": given["dtype"], **given}))
    assert found is not None and reason in found


@pytest.mark.parametrize("field", ["window", "sinks", "return_lse", "causal", "page_starts", "kv_scheme"])
def test_a_feature_that_was_not_tried_is_not_claimed(field: str) -> None:
    assert all(field not in attention(kernel).handles for kernel in KERNELS)


def test_version_three_is_for_hopper() -> None:
    made = [recipe("cuda") for recipe, module in flash_attend.recipes(TARGETS["sm100"]) if "interface" in module]
    assert [kernel.name for kernel in made] == ["flash3_attend"]
    assert "not for sm100" in str(made[0].supports(problem_of(Paging(STEPS["decode"]))))


# ---- AITER -----------------------------------------------------------------------------------------------------------


def rows(kernel: str, target: str = "gfx942") -> Kernel:
    (found,) = [
        made for made in (recipe("cuda") for recipe in aiter_ops.recipes(TARGETS[target])) if made.name == kernel
    ]
    return found


@pytest.mark.parametrize("program", ["graph", "eager"])
@pytest.mark.parametrize(("kernel", "op"), [("aiter_rms_norm", "rms_norm"), ("aiter_silu_mul", "silu_mul")])
def test_rows_are_right(kernel: str, op: str, program: str) -> None:
    taken = 0
    for case in OPS[op].cases(np.random.default_rng(1), "smoke"):
        if rows(kernel).supports(case.problem) is None:
            made = prepare(OPS[op], case)
            with made.rig(subject(program), [rows(kernel)]) as rig:
                assert not compare(OPS[op], case, made.run(rig).result)
            taken += 1
    assert taken > 3


def test_aiter_declines_other_gpus_and_dtypes() -> None:
    norm = NormProblem(dtype="bfloat16", width=64, eps=1e-5)
    assert "not for gfx1100" in str(rows("aiter_rms_norm", "gfx1100").supports(norm))
    assert "not in float32" in str(rows("aiter_silu_mul").supports(PointwiseProblem(dtype="float32")))


# ---- which are registered --------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_not_registered_and_nothing_is_imported_to_find_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in fake_packages.PACKAGES:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(shared, "find_spec", lambda name: None)
    assert names(installed(cuda.libraries(TARGETS["sm90"]))) == ["cublas_linear"]
    assert names(installed(rocm.libraries(TARGETS["gfx942"]))) == ["hipblas_linear"]
    monkeypatch.setattr(shared, "find_spec", lambda name: object())
    assert names(installed(cuda.libraries(TARGETS["sm90"]))) == [
        "cublas_linear",
        *sorted(KERNELS, reverse=True)[1:],
        "flashinfer_attend",
    ]
    assert names(installed(rocm.libraries(TARGETS["gfx942"]))) == ["hipblas_linear", "aiter_rms_norm", "aiter_silu_mul"]
    assert not set(fake_packages.PACKAGES) & set(sys.modules)


def names(recipes: Sequence[Any]) -> list[str]:
    return [recipe("any").name for recipe in recipes]
