"""What the native engine makes one call of, and that it computes what the calls apart compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.unit.cpu_plugin.engines import Native

from lineshaft.plan import ProgramSpec
from lineshaft_conformance.harness.rig import Rig, whole_param
from lineshaft_contract.ops.spec import HostArray, epsilon, numpy_dtype
from lineshaft_contract.problems import LinearProblem, NormProblem, PointwiseProblem
from lineshaft_contract.steps import InputField, InputLayout, StepShape
from lineshaft_cpu import native
from lineshaft_cpu.engine import fusion, program
from lineshaft_cpu.engine.fusion import FEW_ROWS
from lineshaft_cpu.engine.tape import Call, HostCall, Tape

LEVELS = [level for level in native.LEVELS if native.reason(level) is None]
WIDTH, INNER = 96, 64
DEEP = 1216  # more than tiles multiply at once: two whole parts, and a shorter one
KINDS = ("plain", "shown", "read twice", "sliced")


def gated(kind: str, rows: int, dtype: str, width: int = WIDTH, inner: int = INNER) -> ProgramSpec:
    """silu(gate) * up of one product of x [rows, inner] that holds both.

    shown       the product itself is an output too
    read twice  another call reads it
    sliced      what is gated is a part of it
    """

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        both = ops.linear(step.arrays["x"], weights["w"])
        out = {"out": ops.silu_mul(both if kind != "sliced" else both[:, : 2 * width - 64])}
        if kind == "shown":
            out["both"] = both
        if kind == "read twice":
            out["twice"] = ops.add(both, both)
        return out, caches

    layout = InputLayout([InputField("x", dtype, (rows, inner))])
    return ProgramSpec("gated", forward, StepShape(rows, 1, (), 1, rows), layout)


def make(spec: ProgramSpec, dtype: str, level: str = "auto", width: int = WIDTH, inner: int = INNER) -> Rig:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((2 * width, inner)).astype(numpy_dtype(dtype)) * numpy_dtype(dtype).type(0.1)
    problem, rows = LinearProblem(dtype=dtype, n=2 * width, k=inner), PointwiseProblem(dtype=dtype)
    uses = {"linear": ("linear", problem), "silu_mul": ("silu_mul", rows), "add": ("add", rows)}
    params = {"w": whole_param("w", w, {"linear": problem})}
    return Rig(Native(3, level), [spec], params=params, values={"w": w}, uses=uses)


def inputs(rows: int, dtype: str, inner: int = INNER) -> HostArray:
    return np.random.default_rng(rows).standard_normal((rows, inner)).astype(numpy_dtype(dtype))


def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "fuse", lambda tape, kept: {})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inner"), [(1, INNER), (5, INNER), (40, INNER), (70, DEEP)])
def test_a_product_and_its_gate_are_one_and_the_same(
    monkeypatch: pytest.MonkeyPatch, level: str, dtype: str, rows: int, inner: int
) -> None:
    x, found, calls = inputs(rows, dtype, inner), [], []
    for apart in (False, True):
        if apart:
            unfused(monkeypatch)
        with make(gated("plain", rows, dtype, inner=inner), dtype, level, inner=inner) as rig:
            report = rig.programs[0].report
            calls.append(report.ops)
            assert report.details.get("fused linear+silu_mul", 0) == (not apart)
            found.append(rig.run({"x": x})["out"].astype(np.float64))
    assert calls[0] == calls[1] - 1
    one, two = found
    # apart, gate and up are rounded before the gate is: each by half a unit of the dtype
    eps = epsilon(dtype)
    scale = np.abs(two).max()
    np.testing.assert_allclose(one, two, rtol=3 * eps, atol=3 * eps * scale)
    assert np.abs(one).max() > 0.1


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_somebody_else_needs_is_not_fused_away(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    x, found = inputs(5, "float32"), []
    for apart in (False, True):
        if apart:
            unfused(monkeypatch)
        with make(gated(kind, 5, "float32"), "float32") as rig:
            assert not rig.programs[0].report.details.get("fused linear+silu_mul")
            found.append(rig.run({"x": x}))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in found[0])


def test_a_width_that_is_no_whole_panel_is_not_fused() -> None:
    with make(gated("plain", 5, "float32", 40), "float32", width=40) as rig:
        assert not rig.programs[0].report.details.get("fused linear+silu_mul")


def test_calls_with_python_between_them_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[Call | HostCall]] = []

    def fuse(tape: Tape, kept: Any) -> Any:
        linear, gate = tape.calls
        middle = HostCall(lambda: None, (), (), "nothing")
        tape.calls = [linear, middle, gate]
        counts = original(tape, kept)
        taken.append(tape.calls)
        assert tape.calls == [linear, middle, gate]
        return counts

    original = program.fuse
    monkeypatch.setattr(program, "fuse", fuse)
    with make(gated("plain", 5, "float32"), "float32") as rig:
        assert len(taken) == 1 and rig.programs[0].report.details["host_calls"] == 1
        assert np.isfinite(rig.run({"x": inputs(5, "float32")})["out"]).all()


def normed(scheme: str, rows: int, dtype: str) -> Rig:
    """Two products of the normed sum of x and y [rows, INNER], which is an output too, as are both products."""
    problem = LinearProblem(dtype=dtype, n=3 * WIDTH, k=INNER, scheme=scheme, group_size=32 if scheme == "int4" else 0)
    rms = NormProblem(dtype=dtype, width=INNER, eps=1e-6)

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        x, total = ops.add_rms_norm(step.arrays["x"], step.arrays["y"], weights["norm"])
        first = ops.linear(x, weights["w"])
        again, _ = ops.add_rms_norm(total, step.arrays["y"], weights["norm"])
        return {"first": first, "total": total, "second": ops.linear(again, weights["w"])}, caches

    layout = InputLayout([InputField(name, dtype, (rows, INNER)) for name in "xy"])
    rng = np.random.default_rng(2)
    values = {"w": rng.standard_normal((3 * WIDTH, INNER)), "norm": rng.standard_normal(INNER)}
    values = {name: array.astype(numpy_dtype(dtype)) for name, array in values.items()}
    used = {"w": {"linear": problem}, "norm": {"norm": rms}}
    params = {name: whole_param(name, values[name], used[name]) for name in used}
    uses = {"linear": ("linear", problem), "norm": ("add_rms_norm", rms)}
    spec = ProgramSpec("normed", forward, StepShape(rows, 1, (), 1, rows), layout)
    return Rig(Native(3), [spec], params=params, values=values, uses=uses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["none", "int8", "int4", "w8a8_int8", "w8a8_fp8"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_few_rows_are_normed_and_quantized_by_each_thread_for_itself(
    monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: str, rows: int
) -> None:
    x, y = inputs(rows, dtype), inputs(rows + 1, dtype)[:rows]
    found: list[list[dict[str, bytes]]] = []
    for apart in (False, True):
        if apart:
            unfused(monkeypatch)
        with normed(scheme, rows, dtype) as rig:
            details = rig.programs[0].report.details
            fused = 0 if apart or rows > FEW_ROWS else 2
            assert details.get("fused norm+linear", 0) == fused
            assert details.get("fused quantize+linear", 0) == (fused if scheme.startswith("w8a8") else 0)
            # what a run leaves in the threads' scratch does not show in the next
            runs = [rig.run(given) for given in ({"x": x, "y": y}, {"x": y, "y": x}, {"x": x, "y": y})]
            found.append([{name: array.tobytes() for name, array in run.items()} for run in runs])
    assert found[0] == found[1]
    assert found[0][0] == found[0][2] != found[0][1]


@pytest.mark.parametrize("level", [level for level in LEVELS if level.startswith("amx")])
@pytest.mark.parametrize("rows", [33, 70])
def test_what_tiles_read_is_written_in_their_order(monkeypatch: pytest.MonkeyPatch, level: str, rows: int) -> None:
    """A norm, a gated product and one after it: as if what lies between them was copied to that order."""
    x, found = inputs(rows, "bfloat16"), []
    for apart in (False, True):
        if apart:
            rest = {name: made for name, made in fusion.PATTERNS.items() if name != "result+order"}
            monkeypatch.setattr(fusion, "PATTERNS", rest)
        with chained(rows, level) as rig:
            assert rig.programs[0].report.details.get("fused result+order", 0) == (0 if apart else 2)
            found.append(rig.run({"x": x})["out"])
    assert np.abs(found[0].astype(np.float32)).max() > 0.1
    assert found[0].tobytes() == found[1].tobytes()


def chained(rows: int, level: str) -> Rig:
    """norm, gate and up, silu_mul, down: x [rows, INNER] -> [rows, INNER]."""
    dtype, rng = "bfloat16", np.random.default_rng(3)
    up, down = LinearProblem(dtype=dtype, n=2 * WIDTH, k=INNER), LinearProblem(dtype=dtype, n=INNER, k=WIDTH)
    rms, pointwise = NormProblem(dtype=dtype, width=INNER, eps=1e-6), PointwiseProblem(dtype=dtype)

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        x = ops.rms_norm(step.arrays["x"], weights["norm"])
        return {"out": ops.linear(ops.silu_mul(ops.linear(x, weights["up"])), weights["down"])}, caches

    used = {"up": {"linear": up}, "down": {"linear": down}, "norm": {"norm": rms}}
    shapes = {"up": (2 * WIDTH, INNER), "down": (INNER, WIDTH), "norm": (INNER,)}
    values = {name: (rng.standard_normal(shape) / 4).astype(numpy_dtype(dtype)) for name, shape in shapes.items()}
    params = {name: whole_param(name, values[name], used[name]) for name in used}
    uses = {"up": ("linear", up), "down": ("linear", down), "norm": ("rms_norm", rms), "gate": ("silu_mul", pointwise)}
    layout = InputLayout([InputField("x", dtype, (rows, INNER))])
    spec = ProgramSpec("chained", forward, StepShape(rows, 1, (), 1, rows), layout)
    return Rig(Native(3, level), [spec], params=params, values=values, uses=uses)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_rows_of_another_width_than_is_read_are_not_fused(
    monkeypatch: pytest.MonkeyPatch, level: str, dtype: str, rows: int
) -> None:
    x, found = inputs(rows, dtype, 128), []
    for apart in (False, True):
        if apart:
            unfused(monkeypatch)
        with regrouped(rows, dtype, level) as rig:
            assert not [name for name in rig.programs[0].report.details if name.startswith("fused")]
            found.append(rig.run({"x": x})["out"])
    assert np.abs(found[0].astype(np.float32)).max() > 0.1
    assert found[0].tobytes() == found[1].tobytes()


def regrouped(rows: int, dtype: str, level: str) -> Rig:
    """x [rows, 128]: norm of 32, product, gate of halves of its halves, product, product of halves of its rows."""
    rng, rms = np.random.default_rng(4), NormProblem(dtype=dtype, width=32, eps=1e-6)
    gate = PointwiseProblem(dtype=dtype)
    sizes = {"both": (256, 128), "down": (128, 128), "half": (64, 64)}
    products = {name: LinearProblem(dtype=dtype, n=n, k=k) for name, (n, k) in sizes.items()}

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        x = ops.rms_norm(step.arrays["x"].reshape(rows, 4, 32), weights["norm"]).reshape(rows, 128)
        x = ops.silu_mul(ops.linear(x, weights["both"]).reshape(2 * rows, 128)).reshape(rows, 128)
        return {"out": ops.linear(ops.linear(x, weights["down"]).reshape(2 * rows, 64), weights["half"])}, caches

    values = {name: (rng.standard_normal(size) / 4).astype(numpy_dtype(dtype)) for name, size in sizes.items()}
    values["norm"] = rng.standard_normal(32).astype(numpy_dtype(dtype))
    used: dict[str, Any] = {name: {"linear": problem} for name, problem in products.items()} | {"norm": {"norm": rms}}
    params = {name: whole_param(name, values[name], used[name]) for name in used}
    uses: dict[str, Any] = {name: ("linear", problem) for name, problem in products.items()}
    uses |= {"norm": ("rms_norm", rms), "gate": ("silu_mul", gate)}
    layout = InputLayout([InputField("x", dtype, (rows, 128))])
    spec = ProgramSpec("regrouped", forward, StepShape(rows, 1, (), 1, rows), layout)
    return Rig(Native(3, level), [spec], params=params, values=values, uses=uses)
