"""Launches compiled for GPUs that are not here, in a process of its own: what came out, and what is refused."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lineshaft_contract.backends import World
from lineshaft_contract.errors import ContractViolation, InvalidValue
from lineshaft_triton.compiling import CACHE, Compiler, Launch, cache_folder, check, describe_launch, environment
from lineshaft_triton.inspection import Code
from lineshaft_triton.interpreting import VARIABLE
from lineshaft_triton.launch import Config
from lineshaft_triton.targets import TARGETS
from lineshaft_triton.toolchain import TritonToolchain

NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e4m3fnuz": "fp8e4b8",
    "int8": "int8",
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    """One for all tests; it interprets nothing, whatever this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv(VARIABLE, "1")
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("triton")))
        made = Compiler()
        yield made
        made.close()


def product(
    dtype: str, expects: str, tile: tuple[int, int, int] = (64, 64, 64), stages: int = 1, **more: Any
) -> Launch:
    """A product of tiles of `dtype`."""
    operand, sums = ("tensor", dtype, True, True), "int32" if dtype == "int8" else "fp32"
    result = ("tensor", "int32" if dtype == "int8" else "float32", True, True)
    named = [(name, ("value", size)) for name, size in zip(("BM", "BN", "BK"), tile, strict=True)]
    options = (("num_warps", 4), ("num_stages", stages), *more.items())
    return Launch(
        "odd_kernels:product", (operand, operand, result, ("value", 16)), (*named, ("sums", ("dtype", sums))), options,
        expects, "config",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "dtype", "found"),
    [
        ("sm80", "bfloat16", "mma.bf16"), ("sm89", "float8_e4m3fn", "mma.fp8"), ("sm90", "float8_e4m3fn", "wgmma.fp8"),
        ("sm100", "bfloat16", "tcgen05.bf16"), ("sm100", "float16", "tcgen05.f16"), ("sm120", "int8", "mma.i8"),
        ("gfx90a", "float16", "mfma.f16"), ("gfx942", "float8_e4m3fnuz", "mfma.fp8"),
        ("gfx950", "float8_e4m3fn", "mfma.fp8"), ("gfx1100", "bfloat16", "wmma.bf16"),
        ("gfx1201", "float8_e4m3fn", "wmma.fp8"),
    ],
)  # fmt: skip
def test_each_target_multiplies_by_the_class_that_its_facts_name(
    compiler: Compiler, target: str, dtype: str, found: str
) -> None:
    where = TARGETS[target]
    assert where.expects(dtype) == found
    launch = product(dtype, found)
    code = compiler.compile(launch, where)
    assert code.classes == (found,)
    check(launch, code, where)
    assert 16 <= code.registers <= 512 and (code.spills, code.stack) == (0, 0)
    assert 0 < code.occupancy <= where.sm_warps and 0 <= code.shared <= where.shared
    assert (code.scalars > 0) == (where.vendor == "amd")
    again = [timed(lambda: compiler.compile(replace(launch), where)) for _ in range(5)]
    assert all(found is code for found, _ in again) and min(seconds for _, seconds in again) < 0.1


def timed(call: Callable[[], Code]) -> tuple[Code, float]:
    """What a call gives, and the seconds that it takes."""
    began = time.monotonic()
    return call(), time.monotonic() - began


def test_a_float_that_the_target_does_not_multiply_is_found_out(compiler: Compiler) -> None:
    launch = product("float8_e4m3fn", "mfma.fp8", (32, 32, 32))  # gfx942 reads fnuz alone: these become float16
    code = compiler.compile(launch, TARGETS["gfx942"])
    with pytest.raises(ContractViolation, match=r"product \(config\) for gfx942 expects mfma.fp8 and has mfma.f16"):
        check(launch, code, TARGETS["gfx942"])
    with pytest.raises(ContractViolation, match=r"expects no matrix instructions and has mfma.f16"):
        check(replace(launch, expects=""), code, TARGETS["gfx942"])


def test_shared_memory_over_the_limit_is_refused(compiler: Compiler) -> None:
    launch = product("bfloat16", "mma.bf16", (64, 64, 128), stages=5)
    code = compiler.compile(launch, TARGETS["sm89"])
    with pytest.raises(ContractViolation, match=rf"takes {code.shared} B of shared memory of the 101376 B"):
        check(launch, code, TARGETS["sm89"])
    check(launch, replace(code, occupancy=1), TARGETS["sm80"])


def test_a_block_that_no_multiprocessor_holds_is_refused() -> None:
    code = Code(255, 0, 0, 0, 0, occupancy=0, classes=())
    with pytest.raises(ContractViolation, match="255 registers a thread, with which no block fits a multiprocessor"):
        check(Launch("m:k", (), (), ()), code, TARGETS["sm90"])
    check(Launch("m:k", (), (), ()), replace(code, occupancy=8), TARGETS["sm90"])


@pytest.mark.parametrize(("target", "option"), [("sm90", {"maxnreg": 24}), ("gfx942", {"waves_per_eu": 8})])
def test_a_default_configuration_that_spills_is_refused(
    compiler: Compiler, target: str, option: dict[str, int]
) -> None:
    pointer = ("tensor", "float32", True, True)
    options = (("num_warps", 1), ("num_stages", 1), *option.items())
    block = (("BLOCK", ("value", 128)),)
    launch = Launch("odd_kernels:transposed", (pointer, pointer, ("value", 16)), block, options, "", "block=128")
    code = compiler.compile(launch, TARGETS[target])
    assert code.stack > 0
    with pytest.raises(ContractViolation, match=r"transposed \(block=128\) .* spills in a default configuration"):
        check(launch, code, TARGETS[target])
    check(replace(launch, default=False), code, TARGETS[target])


def test_what_does_not_compile_has_the_compilers_message_in_one_line(compiler: Compiler) -> None:
    pointer = (("tensor", "float32", True, True),)
    with pytest.raises(ContractViolation) as caught:
        compiler.compile(Launch("odd_kernels:uneven", pointer, (), (("num_warps", 4),), "", "c"), TARGETS["sm90"])
    assert re.match(r"uneven \(c\) for sm90: .*power of 2", str(caught.value)) and "\n" not in str(caught.value)
    with pytest.raises(ContractViolation, match="absent"):
        compiler.compile(Launch("odd_kernels:absent", (), (), ()), TARGETS["sm90"])
    with pytest.raises(ContractViolation, match="fine_tuned"):
        compiler.compile(replace(product("bfloat16", ""), options=(("fine_tuned", 3),)), TARGETS["sm90"])


def test_a_compiler_that_crashes_or_hangs_is_told_and_replaced(compiler: Compiler) -> None:
    launch = product("bfloat16", "mma.bf16")
    with pytest.raises(ContractViolation, match=r"signal 6 \(Aborted\); it said '.*in the register allocator"):
        compiler.compile(replace(launch, kernel="ending_kernels:any"), TARGETS["sm80"])
    assert compiler.compile(launch, TARGETS["sm80"]).classes == ("mma.bf16",)
    hurried = Compiler(limit=0.01)
    with pytest.raises(ContractViolation, match=r"still ran after 0.01 s"):
        hurried.compile(launch, TARGETS["sm80"])
    hurried.close()
    hurried.close()


# ---- launches as data ------------------------------------------------------------------------------------------


def kernel(x_ptr, y_ptr, rows, width, eps, SIZE: constexpr, KIND: tl.constexpr = 3):  # type: ignore[no-untyped-def] # noqa: F821
    """Never run: what is looked at are its parameters."""


def described(*args: Any, config: Config | None = None, **constexprs: Any) -> Launch:
    return describe_launch(SimpleNamespace(fn=kernel), config or Config(), args, constexprs, "mma.bf16")


def test_a_launch_is_plain_data_that_tells_what_code_depends_on() -> None:
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    config = Config({"SIZE": 64}, num_warps=2, num_stages=3, extra={"waves_per_eu": 1}, default=False)
    launch = described(x, x[1:], 640, 1, 1e-5, config=config, KIND=tuple[int])
    assert launch.kernel == f"{__name__}:kernel"
    assert launch.args == (
        ("tensor", "bfloat16", True, True), ("tensor", "bfloat16", False, True), ("value", 16), ("value", 1),
        ("value", 0.5),
    )  # fmt: skip
    assert dict(launch.named)["SIZE"] == ("value", 64)
    assert launch.options == (("num_warps", 2), ("num_stages", 3), ("waves_per_eu", 1))
    assert (launch.expects, launch.config, launch.default, launch.name) == ("mma.bf16", config.text, False, "kernel")


def test_launches_are_equal_exactly_where_their_code_is() -> None:
    x = torch.empty(64, device="meta")
    y = torch.empty(1 << 30, device="meta")
    same = described(x, x, 17, 32, 0.1, 64)
    assert described(x, x, 19, 48, 0.2, 64) == same
    for other in (
        described(x, x, 16, 32, 0.1, 64), described(x, x, 1, 32, 0.1, 64), described(x, x, 17, 1 << 40, 0.1, 64),
        described(x, x, 17, 32, 0.1, 65), described(x, y, 17, 32, 0.1, 64), described(x, x[2:], 17, 32, 0.1, 64),
        described(x, x, 17, 32, 0.1, 64, KIND=4), described(x, None, 17, 32, 0.1, 64),
        described(x.half(), x, 17, 32, 0.1, 64), described(x, x, True, 32, 0.1, 64),
    ):  # fmt: skip
        assert other != same


def test_the_compiler_interprets_nothing_and_keeps_its_code_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/a/user")
    assert cache_folder() == Path("/of/a/user/lineshaft/triton")
    assert environment()[CACHE] == "/of/a/user/lineshaft/triton" and VARIABLE not in environment()
    monkeypatch.setenv(CACHE, "")  # as good as none
    assert environment()[CACHE] == "/of/a/user/lineshaft/triton"
    monkeypatch.setenv(CACHE, "/elsewhere")
    assert environment()[CACHE] == "/elsewhere"
    assert str(Path(__file__).parents[3]) in environment()["PYTHONPATH"] or sys.path[0] in environment()["PYTHONPATH"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_cache_that_is_no_folder_is_one_error_before_any_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / name))
    words = rf"kept in .*{name} \(Not a directory\).* set {CACHE} to a folder"
    with pytest.raises(InvalidValue, match=words) as raised:
        TritonToolchain("gpu", "nvidia").start("sm90", World())
    assert "\n" not in str(raised.value)


def test_a_cache_on_a_full_disk_is_an_error_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "new"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InvalidValue, match="make room"):
            TritonToolchain("gpu", "nvidia").start("sm90", World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert TritonToolchain("gpu", "nvidia").start("sm90", World()).target.name == "sm90"
    assert list((tmp_path / "new").iterdir()) == []
