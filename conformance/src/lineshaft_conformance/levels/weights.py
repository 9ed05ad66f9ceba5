"""L3: what a session makes of parameters: every stored form, parts, ties, reloads; and that packings are pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lineshaft.errors import MisshapenTensor
from lineshaft.plan import ProgramSpec, Resolver
from lineshaft_conformance.checks import Check, Found, NotClaimed, expect, require, rule_of
from lineshaft_conformance.harness.rig import Rig, const_param, stored, whole_param
from lineshaft_conformance.subject import Subject
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.quantize import INT4, LINEAR_SCHEMES
from lineshaft_contract.ops.spec import Size, numpy_dtype
from lineshaft_contract.problems import EmbedProblem, LinearProblem
from lineshaft_contract.schemes import BLOCKS, dequantize
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import InputField, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Local, Param, Stored

ROWS, WIDTH = 3, 64
PLAIN = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn")
QUANTIZED = ("q8_0", "q4_0", "q4_1", "q5_0")


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    for form in (*PLAIN, *QUANTIZED):
        yield _check(f"stored-{form}", partial(_stored, form=form), _stored)
    for name, run in (("parts", _parts), ("stack", _stack), ("tied", _tied), ("reload", _reload)):
        yield _check(name, run, run)
    yield _check("misshapen", _misshapen, _misshapen)
    yield Check("L0/load/packings", _pure, rule=rule_of(_pure), op="linear", shape_class="load")


def _check(name: str, run: Callable[[Subject, int], Found], described: Callable[..., Found]) -> Check:
    return Check(f"L3/weights/{name}", run, rule=rule_of(described), op="weights", shape_class="weights")


def _identity(dtype: str) -> ProgramSpec:
    """x [WIDTH, WIDTH] @ w^T: with the identity for x, the values of w, transposed."""

    def fn(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        return {"values": ops.linear(step.arrays["x"], weights["w"])}, caches

    shape = StepShape(WIDTH, WIDTH, (), WIDTH, 1)
    return ProgramSpec("identity", fn, shape, InputLayout([InputField("x", dtype, (WIDTH, WIDTH))]))


def _product(subject: Subject, parts: tuple[Stored, ...]) -> Rig:
    """A rig whose one weight, of all parts joined, is what `_identity` shows."""
    dtype = subject.main_dtype
    rows = sum(part.shape[0] for part in parts)
    problem = LinearProblem(dtype=dtype, n=rows, k=WIDTH)
    param = Param("w", "w", (rows, WIDTH), dtype, {"linear": problem}, lambda checkpoint, coordinate: Local(parts))
    return Rig(subject, [_identity(dtype)], params={"w": param})


def _show(rig: Rig, rows: int) -> HostArray:
    """The weight's values [rows, WIDTH]."""
    dtype = rig.planned.outputs[0]["values"].dtype
    out: HostArray = rig.run({"x": np.eye(WIDTH).astype(numpy_dtype(dtype))})["values"].T
    require(out.shape[0] == rows, f"a weight of {rows} rows gives {out.shape[0]}")
    return out


def _stored(subject: Subject, seed: int, *, form: str) -> Found:
    """A weight is loaded from whatever form the checkpoint stores it in: plain numbers, or blocks of quantized ones."""
    part, dtype = _part(form, np.random.default_rng(3)), subject.main_dtype
    with _product(subject, (part,)) as rig:
        exact = dequantize(part, dtype).astype(np.float64)
        close = np.allclose(_show(rig, ROWS).astype(np.float64), exact, rtol=0.01, atol=1e-6)
        require(close, f"a weight stored as {form} is loaded with other values")
        return Found(rig.kernels)


def _part(form: str, rng: np.random.Generator) -> Stored:
    if form in PLAIN:
        return stored(rng.standard_normal((ROWS, WIDTH)).astype(numpy_dtype(form)))
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    assert form in BLOCKS
    data = quantize(rng.standard_normal((ROWS, WIDTH)).astype(np.float32), GGMLQuantizationType[form.upper()])
    return Stored(form, (ROWS, WIDTH), {"data": data})


def _parts(subject: Subject, seed: int) -> Found:
    """A share of several parts (fused projections) is joined in their order, whatever form each is stored in."""
    rng = np.random.default_rng(4)
    parts = tuple(_part(form, rng) for form in ("float32", "q8_0", "bfloat16"))
    with _product(subject, parts) as rig:
        exact = np.concatenate([dequantize(part, "float64") for part in parts])
        found = _show(rig, 3 * ROWS).astype(np.float64)
        require(np.allclose(found, exact, rtol=0.01, atol=1e-6), "the parts of a weight are not joined in their order")
        return Found(rig.kernels)


def _stack(subject: Subject, seed: int) -> Found:
    """A parameter of three dims is a stack of the matrices that its parts are, joined one after another."""
    if not any(kernel.op == "head_linear" for kernel in subject.kernels):
        raise NotClaimed("no kernel of head_linear")
    rng, dtype, heads = np.random.default_rng(10), subject.main_dtype, 2
    parts = tuple(stored(rng.standard_normal((ROWS, WIDTH)).astype(np.float32)) for _ in range(2 * heads))
    problem = LinearProblem(dtype=dtype, n=2 * ROWS, k=WIDTH, heads=heads)
    param = Param("w", "w", (heads, 2 * ROWS, WIDTH), dtype, {"linear": problem}, lambda *_: Local(parts))

    def fn(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        return {"values": ops.head_linear(step.arrays["x"], weights["w"])}, caches

    inputs = InputLayout([InputField("x", dtype, (WIDTH, heads, WIDTH))])
    spec = ProgramSpec("stack", fn, StepShape(WIDTH, WIDTH, (), WIDTH, 1), inputs)
    with Rig(subject, [spec], params={"w": param}) as rig:
        x = np.repeat(np.eye(WIDTH)[:, None], heads, 1).astype(numpy_dtype(dtype))
        found = rig.run({"x": x})["values"].astype(np.float64).transpose(1, 2, 0)
        exact = np.concatenate([part.arrays["data"] for part in parts]).reshape(found.shape)
        require(np.allclose(found, exact, rtol=0.01, atol=1e-6), "the matrices of a stack do not lie one after another")
        return Found(rig.kernels)


def _tied(subject: Subject, seed: int) -> Found:
    """Parameters of one source hold the same values, and an update of one reaches them all, in every packing."""
    dtype, vocab = subject.main_dtype, 7
    values = np.random.default_rng(5).integers(-4, 5, (vocab, WIDTH)).astype(numpy_dtype(dtype))
    embed = whole_param("table", values, {"embed": EmbedProblem(dtype=dtype, vocab=vocab, width=WIDTH)})
    head = replace(embed, name="head", problems={"linear": LinearProblem(dtype=dtype, n=vocab, k=WIDTH)})
    ids = InputLayout([InputField("ids", "int32", (vocab,))])

    def fn(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        rows = ops.embed(step.arrays["ids"], weights["embed"], weights["start"])
        return {"rows": rows, "logits": ops.linear(rows, weights["head"])}, caches

    params = {"embed": embed, "head": head, "start": const_param("start", np.zeros(1, np.int32))}
    spec = ProgramSpec("tied", fn, StepShape(vocab, vocab, (), vocab, 1), ids)
    with Rig(subject, [spec], params=params, values={"table": values, "start": np.zeros(1, np.int32)}) as rig:
        for name, now in (("", values), ("table", values[::-1].copy()), ("head", values * 2)):
            if name:
                rig.session.update({name: now})
            out = rig.run({"ids": np.arange(vocab, dtype=np.int32)})
            wide = now.astype(np.float64)
            require(np.array_equal(out["rows"].astype(np.float64), wide), f"after an update of {name!r}: embed is not")
            close = np.allclose(out["logits"].astype(np.float64), wide @ wide.T, rtol=0.01)
            require(close, f"after an update of {name!r}, the product over the tied weight has other values")
        return Found(rig.kernels)


def _reload(subject: Subject, seed: int) -> Found:
    """Other shapes are a reload: thaw, load, capture, freeze; programs of the old weights run no more by mistake."""
    first, second = (_part("float32", np.random.default_rng(i)) for i in (6, 7))
    with _product(subject, (first,)) as rig:
        rig.session.thaw()
        rig.reload({"w": second})
        rig.session.freeze()
        exact = dequantize(second, "float64")
        found = _show(rig, ROWS).astype(np.float64)
        require(np.allclose(found, exact, rtol=0.01, atol=1e-6), "after a reload the weight has other values")
        return Found(rig.kernels)


def _misshapen(subject: Subject, seed: int) -> Found:
    """Parts that do not make up the parameter's shape are a typed error."""
    part = _part("float32", np.random.default_rng(8))
    dtype = subject.main_dtype
    problem = LinearProblem(dtype=dtype, n=ROWS + 1, k=WIDTH)
    wrong = Param(
        "w", "w", (ROWS + 1, WIDTH), dtype, {"linear": problem}, lambda checkpoint, coordinate: Local((part,))
    )
    expect(MisshapenTensor, lambda: Rig(subject, [_identity(dtype)], params={"w": wrong}), "parts of another shape")
    return Found()


def _pure(subject: Subject, seed: int) -> Found:
    """Packing a weight is pure: names and shapes of leaves do not depend on values, and the share stays the same."""
    packing = [kernel for kernel in subject.kernels if kernel.pack is not None]
    if not packing:
        raise NotClaimed("no kernel brings a packing of its own")
    for kernel in packing:
        dtype = subject.main_dtype
        shapes = []
        for values in (np.zeros((ROWS, WIDTH)), np.random.default_rng(9).standard_normal((ROWS, WIDTH))):
            array = values.astype(numpy_dtype(dtype))
            param = whole_param("w", array, {"linear": _taken(subject, kernel, dtype)})
            before = array.copy()
            assert kernel.pack is not None
            leaves = [kernel.pack(param, Local((stored(array),))) for _ in range(2)]
            require(np.array_equal(array, before), f"the packing of {kernel.name} changes the share it is given")
            shapes += [_shapes(item) for item in leaves]
        same = all(item == shapes[0] for item in shapes)
        require(same, f"the packing of {kernel.name} gives leaves of different names or shapes: {shapes}")
    return Found(tuple(kernel.name for kernel in packing))


def _taken(subject: Subject, kernel: Kernel, dtype: str) -> LinearProblem:
    """The problem of a product that the kernel takes, of any scheme; a plain one for a kernel of another op."""
    plain = LinearProblem(dtype=dtype, n=ROWS, k=WIDTH)
    schemes = (replace(plain, scheme=name, group_size=WIDTH // 2 if name == INT4 else 0) for name in LINEAR_SCHEMES)
    resolver = Resolver(subject.info.name, [kernel], {})
    return next((p for p in (plain, *schemes) if resolver.resolvable("linear", p)), plain)


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}
