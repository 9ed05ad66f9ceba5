"""Sessions on GPUs that are not here, the toolchain of both vendors, and the matrix of their kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lineshaft.cli import main as command_line
from lineshaft_conformance.cli import kernels
from lineshaft_contract.backends import World
from lineshaft_contract.errors import ContractViolation, InvalidValue, LayoutError, SessionClosed, Unsupported
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.problems import CollectiveProblem, KVProblem, LinearProblem, NormProblem
from lineshaft_contract.sessions import Packing
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepShape
from lineshaft_contract.weights import Param
from lineshaft_triton.ahead import COLUMNS, AheadSession
from lineshaft_triton.compiling import CACHE, Compiler
from lineshaft_triton.interpreting import VARIABLE, interpreting
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.real_problems import real_problems
from lineshaft_triton.targets import TARGETS, targets_of
from lineshaft_triton.toolchain import TritonToolchain

SHAPE = StepShape(tokens=64, rows=1, pages=(), logits=1, max_query=1)
PRODUCT = Config({"BM": 64, "BN": 64, "BK": 64}, num_stages=1)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("triton")))
        made = Compiler()
        yield made
        made.close()


@pytest.fixture
def session(compiler: Compiler) -> Iterator[AheadSession]:
    with_caches = AheadSession(World(), TARGETS["sm90"], compiler)
    yield with_caches
    with_caches.close()


def kernel_of(name: str, parameters: str) -> Any:
    """What `launch` is given, without Triton in this process: a function with the kernel's name and parameters."""
    made: dict[str, Any] = {}
    exec(f"def {name}({parameters}): ...", made)
    made[name].__module__ = "odd_kernels"
    return SimpleNamespace(fn=made[name])


def captured(session: AheadSession, *launches: tuple[Config, str], arrays: Any = None) -> Any:
    """A program of products of inputs `a` and `b`, each with a configuration and what it expects."""
    constexprs = ", ".join(f"{name}: 'tl.constexpr'" for name in ("BM", "BN", "BK", "kind"))
    kernel = kernel_of("packed", f"a_ptr, b_ptr, c_ptr, size, {constexprs}")

    def fn(ops: Any, weights: Any, caches: Any, step: Any, given: Any) -> Any:
        a, b, c = (step.arrays[name] for name in "abc")
        for config, expects in launches:
            launch(session, kernel, (1,), config, a, b, c, 64, expects=expects, kind=4)
        return {"c": c}, caches

    ops = SimpleNamespace(bind=lambda session: None, prepares=lambda session: ())
    inputs = InputLayout([InputField(name, dtype, (64, 64)) for name, dtype in zip("abc", KINDS, strict=True)])
    return session.capture(fn, SHAPE, inputs, ops, arrays, frozenset({"c"}))


KINDS = ("bfloat16", "bfloat16", "float32")


class Unread:
    """A checkpoint that nobody may look into."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the checkpoint's {name} was asked for")


def test_a_load_makes_shapes_and_reads_nothing(session: AheadSession) -> None:
    def shard(checkpoint: Any, coordinate: Any) -> Any:
        raise AssertionError("a share was read")

    linear = {"linear": LinearProblem(dtype="bfloat16", n=64, k=32)}
    params = [
        Param("plain", "plain", (64, 32), "bfloat16", linear, shard),
        Param("packed", "packed", (64, 32), "bfloat16", linear, shard),
        Param("norm", "norm", (32,), "float32", {"norm": NormProblem(dtype="float32", width=32, eps=1e-5)}, shard),
    ]
    plain, packed, norm = session.load(params, Unread(), {"packed": Packing("int8_rows", pack_rows("int8"))})  # type: ignore[arg-type, misc]
    assert {name: (a.device.type, a.dtype, tuple(a.shape)) for name, a in packed.arrays.items()} == {
        "q": ("meta", _torch("int8"), (64, 32)), "scale": ("meta", _torch("float32"), (64,)),
    }  # fmt: skip
    assert plain.arrays["data"].shape == (64, 32) and plain.arrays["data"].device.type == "meta"
    assert norm.arrays["data"].dtype == _torch("float32")


def _torch(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _meta(*shape: int) -> Any:
    import torch

    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_caches_of_any_size_take_no_memory_and_nothing_moves(session: AheadSession) -> None:
    problem = KVProblem(dtype="bfloat16", kv_heads=8, qk_dim=128, v_dim=128, page_size=16, kv_dtype="bfloat16")
    (cache,) = session.alloc_caches([problem], [1 << 24], "slots")
    assert cache.arrays["k"].shape == (16 << 24, 8, 128)
    ids = np.zeros(1, np.int32)
    for call in (
        lambda: session.read_pages(0, ids), lambda: session.write_pages(0, ids, {}),
        lambda: session.copy_pages(0, ids, ids), lambda: session.update({}),
    ):  # fmt: skip
        with pytest.raises(Unsupported, match="not here"):
            call()
    session.close()
    with pytest.raises(SessionClosed):
        captured(session)


def test_a_capture_compiles_every_launch_once_and_its_program_is_never_run(session: AheadSession) -> None:
    wide = Config({"BM": 64, "BN": 128, "BK": 64}, num_stages=1)
    arrays = {"further": ArraySpec((4,), "float32")}
    program = captured(session, (PRODUCT, "wgmma.bf16"), (wide, "wgmma.bf16"), (PRODUCT, "wgmma.bf16"), arrays=arrays)
    report = program.report
    assert (report.ops, report.outputs, len(session.launches)) == (3, 64 * 64 * 4, 3)
    assert report.arguments == 64 * 64 * 8 + 16
    assert report.details["found"] == report.details["expected"] == "wgmma.bf16"
    assert report.details["configs"] == f"{PRODUCT.text}; {wide.text}"
    assert set(report.details) == set(COLUMNS) - {"scalars"}
    with pytest.raises(Unsupported, match="nothing runs"):
        program(HostStep(program.capture.inputs))


@pytest.mark.parametrize(
    ("config", "expects", "said"),
    [
        (PRODUCT, "wgmma.fp8", "expects wgmma.fp8 and has wgmma.bf16"),
        (PRODUCT, "", "expects no matrix instructions and has wgmma.bf16"),
        (Config({"BM": 128, "BN": 256, "BK": 128}, num_warps=8, num_stages=3), "wgmma.bf16", "of the 232448 B"),
        (Config({**PRODUCT.block, "BK": 48}, num_stages=1), "wgmma.bf16", "power of 2"),
        (Config({**PRODUCT.block}, num_stages=1, extra={"maxnreg": 64}), "wgmma.bf16", "spills in a default"),
    ],
)
def test_a_capture_refuses_code_that_breaks_what_was_stated(
    session: AheadSession, config: Config, expects: str, said: str
) -> None:
    with pytest.raises(ContractViolation, match=said):
        captured(session, (config, expects))


def test_what_is_bound_ahead_is_for_a_compiler_even_where_kernels_are_interpreted(
    session: AheadSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    seen = []

    def fn(ops: Any, weights: Any, caches: Any, step: Any, given: Any) -> Any:
        seen.append(interpreting())
        raise InvalidValue("seen")

    ops = SimpleNamespace(bind=lambda session: seen.append(interpreting()), prepares=lambda session: ())
    with pytest.raises(InvalidValue, match="seen"):
        session.capture(fn, SHAPE, InputLayout([]), ops)
    assert seen == [False, False] and interpreting()


def test_a_program_without_a_launch_is_refused(session: AheadSession) -> None:
    with pytest.raises(ContractViolation, match="starts no kernel"):
        captured(session)


def test_collectives_of_several_ranks_make_shapes_and_are_declared(compiler: Compiler) -> None:
    axes = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 4))
    backend = TritonToolchain("cuda", "nvidia", compiler).start("sm90", World(rank=2, axes=axes))
    session = backend.session(2)
    kernels = {kernel.op: kernel for kernel in backend.kernels() if kernel.name.startswith("torch_")}
    alone = TritonToolchain("cuda", "nvidia", compiler).start("sm90", World()).kernels()
    assert not {kernel.op for kernel in alone} & set(kernels)
    calls: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "all_reduce": ((), (8, 4)), "all_gather": ((1,), (8, 16)), "reduce_scatter": ((0,), (2, 4)),
        "all_to_all": ((0, 1), (2, 16)), "broadcast": ((1,), (8, 4)), "permute": ((1,), (8, 4)),
    }  # fmt: skip
    assert set(kernels) == set(calls)
    x = _meta(8, 4)
    for op, (arguments, shape) in calls.items():
        problem = CollectiveProblem(dtype="bfloat16", axis=("tp",), size=4, shape=(8, 4))
        assert kernels[op].supports(problem) is None
        made = kernels[op].bind(problem, session)(x, ("tp",), *arguments)
        assert (made.device.type, made.dtype, tuple(made.shape)) == ("meta", x.dtype, shape), op
    assert set(session.groups.asked) == set(calls)
    session.close()


def test_weights_are_among_the_arguments_of_a_program(session: AheadSession) -> None:
    linear = {"linear": LinearProblem(dtype="bfloat16", n=64, k=32)}
    names = {"one": "a", "two": "b", "tied": "a"}  # with the source of each
    session.load(
        [Param(name, source, (64, 32), "bfloat16", linear, None) for name, source in names.items()], Unread(), {}
    )  # type: ignore[arg-type]
    assert sum(tensor.numel() for tensor in session.tensors()) == 2 * 64 * 32


# ---- toolchain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "vendor"), [("cuda", "nvidia"), ("rocm", "amd")])
def test_a_toolchain_compiles_for_its_vendors_targets_alone(name: str, vendor: str) -> None:
    toolchain = TritonToolchain(name, vendor)
    assert toolchain.targets() == targets_of(vendor) and len(toolchain.targets()) == 5
    assert toolchain.columns() == COLUMNS
    for target in toolchain.targets():
        backend = toolchain.start(target, World())
        assert (backend.name, backend.target.name) == (name, target)
        assert backend.capabilities.dtypes == ("bfloat16", "float16", "float32")
    with pytest.raises(InvalidValue, match=f"target 'sm75': {name} compiles for .*{toolchain.targets()[0]}"):
        toolchain.start("sm75", World())
    with pytest.raises(LayoutError, match="at most 1024"):
        toolchain.start(toolchain.targets()[0], World(axes=(("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2048))))


def test_a_catalogue_names_libraries_that_are_not_installed_and_is_for_the_target_of_the_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lineshaft_cuda.options import CudaOptions
    from lineshaft_cuda.toolchain import create
    from lineshaft_rocm import toolchain as rocm
    from lineshaft_rocm.options import RocmOptions

    made = create(CudaOptions(interpret=True, target="sm120"))
    monkeypatch.setattr("lineshaft_triton.backend.find_spec", lambda name: None)
    notes = {offer.kernel.name: offer.note for offer in made.catalogue("")}
    assert {"torch_attend", "torch_all_reduce", "triton_rms_norm", "one_shot_all_reduce"} <= set(notes)
    assert notes["cublas_linear"] == "on a GPU, not interpreted"
    assert notes["flashinfer_attend"] == "flashinfer is not installed"
    assert notes["flash3_attend"] == "flash_attn_interface is not installed"
    assert notes["triton_rms_norm"] == ""
    assert {offer.kernel.options.get("target", "sm120") for offer in made.catalogue("")} == {"sm120"}
    assert {offer.kernel.options.get("target", "sm80") for offer in made.catalogue("sm80")} == {"sm80"}
    with pytest.raises(InvalidValue, match="target 'gfx942': cuda compiles for sm80"):
        made.catalogue("gfx942")
    monkeypatch.setattr("lineshaft_triton.backend.find_spec", lambda name: object())
    found = {offer.kernel.name: offer.note for offer in rocm.create(RocmOptions()).catalogue("")}
    assert found["aiter_rms_norm"] == found["hipblas_linear"] == "on a GPU, not interpreted"


def test_real_problems_are_those_of_a_step_of_three_models() -> None:
    linear = real_problems("linear")
    assert linear[0].describe() == "dtype=bfloat16 n=4096 k=4096 m=512"
    assert {problem.dtype for problem in linear} == {"bfloat16", "float16"}
    shapes = {(p.q_heads, p.kv_heads, p.qk_dim, p.max_query) for p in real_problems("attend")}  # type: ignore[attr-defined]
    assert shapes == {(q, kv, d, m) for q, kv, d in ((32, 8, 128), (4, 1, 128), (9, 3, 64)) for m in (1, 512, 2048)}
    assert {p.local for p in real_problems("expert_mlp")} == {8}  # type: ignore[attr-defined]
    for op in ("rms_norm", "rope", "write_kv", "silu_mul", "sample", "router_topk", "gather_rows", "embed"):
        found = real_problems(op)
        assert found and len(set(found)) == len(found)
    assert real_problems("all_reduce") == []


# ---- the command -----------------------------------------------------------------------------------------------


def test_targets_find_their_backends_and_a_table_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(command_line.COMMANDS, "kernels", kernels)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        status = command_line.main(["kernels", "compile", "--jobs", "1", *map(str, arguments)])
        return (status, *capsys.readouterr())

    table, chosen = (
        tmp_path / "t.json",
        ("--targets", "sm90,gfx942", "--kernels", "triton_rms_norm", "--problems", "first"),
    )
    status, out, _ = run(*chosen, "--table", table)
    assert status == 0 and "cuda, rocm: 1 kernels, 2 targets, 0 cells fail; 2 compiled, 0 declined" in out
    rows = json.loads(table.read_text())["rows"]
    assert [(row["target"], row["spills"], row["found"]) for row in rows] == [
        ("sm90", 0, "none"),
        ("gfx942", 0, "none"),
    ]
    assert table.read_text().count('{"kernel": ') == 2
    lines = (
        table.read_text().replace('"registers": ', '"registers": -').replace('"found": "none"', '"found": "mma.bf16"')
    )
    table.write_text(lines)
    status, _, err = run("--backend", "rocm", *chosen[2:], "--targets", "gfx942", "--against", table)
    said = [line for line in err.splitlines() if line.startswith("REGRESSION triton_rms_norm for gfx942: ")]
    assert status == 1 and len(said) == 2
    assert "registers grew from -" in said[0] and "mma.bf16 is not in its code any more" in said[1]
