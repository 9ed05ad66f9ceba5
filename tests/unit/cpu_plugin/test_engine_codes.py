"""Products of the native engine with weights in codes: packings, blocks of files, several threads, live rows, gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.quantize import (
    ACTIVATION_SCHEMES,
    BLOCK_SCHEMES,
    INT4,
    LINEAR_SCHEMES,
    block_parts,
    quantize_groups,
    quantize_rows,
)
from lineshaft_contract.ops.spec import EXACT, HostArray, numpy_dtype
from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.sessions import Packing
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_cpu import native
from lineshaft_cpu.engine.arrays import Buffer, TapeArray
from lineshaft_cpu.engine.kernels.codes import CODES, MATCHED, pack_codes, pack_matched, recipes
from lineshaft_cpu.engine.memory import pages
from lineshaft_cpu.engine.session import NativeSession
from lineshaft_cpu.engine.tape import Call, Linked, Tape

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
SCHEMES = (*LINEAR_SCHEMES, *BLOCK_SCHEMES)
LEVELS = [level for level in native.LEVELS if native.reason(level) is None]
OFF = {"float32": 2e-5, "bfloat16": 1.2e-2}
"""Most that a result may be off, as a share of the largest one: sums in another order, one rounding, and of many rows
in bfloat16 the rounding of each weight."""


@dataclass
class Product:
    """One product: what it is given, and how."""

    scheme: str
    m: int = 3
    n: int = 72
    k: int = 160
    dtype: str = "float32"
    level: str = "auto"
    threads: int = 3
    gate: int = 0
    bias: bool = False
    live: int | None = None
    seed: int = 0
    parts: Sequence[Stored] | None = None
    x: HostArray = field(init=False)
    w: HostArray = field(init=False)
    added: HostArray | None = field(init=False)

    def __post_init__(self) -> None:
        rng, kind = np.random.default_rng(self.seed), numpy_dtype(self.dtype)
        self.x = rng.standard_normal((self.m, self.k)).astype(kind)
        self.w = (rng.standard_normal((self.n, self.k)) * 2 ** rng.uniform(-2, 2, (self.n, 1))).astype(kind)
        self.added = rng.standard_normal(self.n).astype(kind) if self.bias else None

    @property
    def problem(self) -> LinearProblem:
        group = 32 if self.scheme == INT4 else 0
        return LinearProblem(
            dtype=self.dtype, m=self.m, n=self.n, k=self.k, scheme=self.scheme, group_size=group, bias=self.bias
        )

    def reference(self) -> HostArray:
        """The exact product, and its gate."""
        if self.parts is None:
            y = all_ops()["linear"].reference(self.problem, self.x, self.w, num=EXACT, bias=self.added)
        else:
            whole = np.concatenate([dequantize(part, "float64") for part in self.parts])
            y = self.x.astype(np.float64) @ whole.T
        if not self.gate:
            return np.asarray(y)
        gate, up = y[:, : self.gate], y[:, self.gate :]
        return np.asarray(gate / (1 + np.exp(-gate)) * up)

    def run(self) -> HostArray:
        """What the engine's kernel makes of it."""
        library = native.load(self.level)
        session = NativeSession(library, self.threads)
        try:
            return self._replay(session, library)
        finally:
            session.close()

    def _replay(self, session: NativeSession, library: native.Native) -> HostArray:
        kernel = next(k for k in (make("cpu") for make in recipes(library)) if k.name == f"cpu_linear_{self.scheme}")
        assert kernel.supports(self.problem) is None
        parts = tuple(self.parts or [Stored("none", self.w.shape, {"data": self.w})])
        param = Param("w", "w", (self.n, self.k), self.dtype, {"linear": self.problem}, lambda *_: Local(parts))
        weight = session.load({"w": param}, None, {"w": Packing(kernel.layout, kernel.pack)})["w"]  # type: ignore[arg-type]
        live = None if self.live is None else held(np.array([self.live], np.int32), "int32")
        given = {} if self.added is None else {"bias": held(self.added, self.dtype)}
        tape = Tape()
        with session.recording(tape):
            out = kernel.bind(self.problem, session)(held(self.x, self.dtype, live), weight, **given)
        if self.gate:
            last = tape.calls[-1]
            assert isinstance(last, Call)
            last.fields = {**last.fields, "gate": self.gate, "out_stride": self.gate}
            out = TapeArray(out.buffer, (self.m, self.gate), self.dtype)
        kept = [pages(buffer.nbytes) for buffer in tape.lifetimes()]
        for buffer, memory in zip(tape.lifetimes(), kept, strict=True):
            memory[:] = 0x7F
            buffer.address = memory.ctypes.data
        linked = Linked(library, [call for call in tape.calls if isinstance(call, Call)], self.threads)
        scratch = session.reserve_scratch(linked.scratch)
        session.team.submit(linked.address, linked.count, scratch.ctypes.data, linked.scratch)
        session.team.wait()
        return np.asarray(out.values().astype(np.float64))


def held(array: HostArray, dtype: str, live: TapeArray | None = None) -> TapeArray:
    return TapeArray(Buffer(array.nbytes, array), array.shape, dtype, live=live)


def check(product: Product, rows: int | None = None) -> None:
    got, exact = product.run()[:rows], product.reference()[:rows]
    allowed = OFF[product.dtype] * np.abs(exact).max(initial=0)
    if product.scheme in ACTIVATION_SCHEMES:  # a code of x that falls on the other side of a half
        allowed *= 2
    np.testing.assert_allclose(got, exact, rtol=0, atol=allowed)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_every_number_meet_codes_with_several_threads(scheme: str, level: str) -> None:
    for m in (1, 2, 13, 33):
        for dtype in OFF:
            check(Product(scheme, m=m, dtype=dtype, level=level, bias=m == 2))


@pytest.mark.parametrize("scheme", [name for name in LINEAR_SCHEMES if name != INT4])
def test_k_need_not_be_even(scheme: str) -> None:
    for m in (1, 3, 14):
        check(Product(scheme, m=m, k=67, n=33))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_k_of_many_blocks(scheme: str) -> None:
    for m in (1, 20):
        check(Product(scheme, m=m, k=4384, n=40))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_not_live_change_nothing(scheme: str) -> None:
    for m, live in ((16, 1), (16, 13), (4, 3), (2, 0)):
        product = Product(scheme, m=m, live=live)
        product.x[live:] = np.nan
        check(product, live)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", OFF)
def test_a_gate_is_multiplied_where_its_products_are_made(scheme: str, dtype: str) -> None:
    for m in (1, 5, 40):
        product = Product(scheme, m=m, n=128, gate=64, bias=True, dtype=dtype)
        product.w /= 16
        check(product)


@pytest.mark.parametrize("scheme", BLOCK_SCHEMES)
@pytest.mark.parametrize("dtype", OFF)
def test_blocks_are_taken_as_they_are(scheme: str, dtype: str) -> None:
    """Blocks that no rounding of their numbers gives again, of two tensors that are joined."""
    rng = np.random.default_rng(5)
    parts = []
    for rows in (40, 17):
        w = rng.standard_normal((rows, 96)).astype(np.float32)
        data = quantize(w, GGMLQuantizationType[scheme.upper()]).reshape(rows, 3, -1).copy()
        codes = data[..., 2 + 2 * BLOCK_SCHEMES[scheme].offset :]
        codes[...] = rng.integers(0, 256, codes.shape) & (0x77 if BLOCK_SCHEMES[scheme].bits == 4 else 0x3F)
        parts.append(Stored(scheme, (rows, 96), {"data": data.reshape(rows, -1)}))
    for m in (1, 4, 30):
        check(Product(scheme, m=m, n=57, k=96, dtype=dtype, parts=parts))


def test_a_scale_of_any_float16_is_the_number_it_stands_for() -> None:
    rng = np.random.default_rng(6)
    scales = np.concatenate([[0, 6e-8, -5.9e-5, 6.104e-5, 65504, -1], rng.standard_normal(26) * 1e-6])
    data = np.zeros((32, 34), np.uint8)
    data[:, :2] = scales.astype(np.float16)[:, None].view(np.uint8)
    data[:, 2:] = rng.integers(-127, 128, (32, 32)).astype(np.int8).view(np.uint8)
    part = Stored("q8_0", (32, 32), {"data": data})
    for level in LEVELS:
        product = Product("q8_0", m=1, n=32, k=32, level=level, parts=[part])
        np.testing.assert_allclose(product.run(), product.reference(), rtol=1e-4)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("m", [1, 4, 30])
def test_nan_and_infinite_weights_show_in_their_columns_and_nowhere_else(scheme: str, m: int) -> None:
    product = Product(scheme, m=m, n=40, k=64)
    product.w[1, 7], product.w[39, 40] = np.nan, -np.inf
    found = np.isnan(product.run())
    assert np.array_equal(found, np.isnan(product.reference())) and found[:, [1, 39]].all() and found.sum() == 2 * m


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("m", [1, 4, 30])
def test_nan_and_infinite_activations_show_in_their_rows_and_nowhere_else(scheme: str, m: int) -> None:
    product = Product(scheme, m=m)
    product.x[0, 5], product.x[-1, 9] = np.nan, np.inf
    found = np.isnan(product.run())
    assert found[0].all() and found[-1].all() and found.sum() == len({0, m - 1}) * product.n


def pack(scheme: str, w: HostArray) -> HostArray:
    group = 32 if scheme == INT4 else 0
    problem = LinearProblem(dtype="float32", n=len(w), k=w.shape[1], scheme=scheme, group_size=group)
    param = Param("w", "w", w.shape, "float32", {"linear": problem}, lambda *_: Local(()))
    local = Local((Stored("none", w.shape, {"data": w}),))
    found: dict[str, Any] = pack_matched(param, local) if scheme == "w8a8_int8" else pack_codes(scheme, param, local)
    return np.asarray(found["data"])


def test_a_record_holds_pairs_of_codes_and_the_scales_behind_them() -> None:
    w = np.random.default_rng(7).standard_normal((33, 5)).astype(np.float32)
    (codes, scale), data = quantize_rows(w, "int8"), pack("int8", w)
    assert data.shape == (2, 1, 6 * 32 + 128)
    pairs = data[:, 0, : 6 * 32].view(np.int8).reshape(2, 3, 32, 2)
    for row, k in ((0, 0), (31, 4), (32, 3)):
        assert pairs[row // 32, k // 2, row % 32, k % 2] == codes[row, k]
    assert not pairs[:, 2, :, 1].any() and not pairs[1, :, 1:].any()
    assert np.array_equal(data[0, 0, 6 * 32 :].view(np.float32), scale[:32])


def test_codes_of_four_bits_take_half_a_byte_and_blocks_what_the_file_has() -> None:
    w = np.random.default_rng(8).standard_normal((64, 64)).astype(np.float32)
    codes, scale = quantize_groups(w, 32)
    data = pack(INT4, w)
    assert data.shape == (2, 2, 32 * 16 + 128)
    lanes = data[..., : 32 * 16].copy().view(np.uint16).reshape(2, 2, 4, 32, 2)
    for row, k in ((0, 0), (40, 21), (63, 63)):
        lane = int(lanes[row // 32, k // 32, k % 32 // 8, row % 32, k % 2])
        assert (lane >> 4 * (k % 8 // 2)) % 16 - 8 == codes[row, k]
    assert np.array_equal(data[1, 1, 512:].copy().view(np.float32), scale[32:, 1])
    for scheme, block in BLOCK_SCHEMES.items():
        assert pack(scheme, w).nbytes == 64 * 2 * block.nbytes


def test_codes_that_meet_codes_come_with_their_sums() -> None:
    w = np.random.default_rng(9).standard_normal((32, 70)).astype(np.float32)
    codes, scale = quantize_rows(w, "int8")
    (data,) = pack("w8a8_int8", w)
    assert np.array_equal(data[128 * 32 :].copy().view(np.int32)[32:], codes.sum(axis=1, dtype=np.int32))
    assert np.array_equal(data[128 * 32 :].copy().view(np.float32)[:32], scale)
    fours = data[: 128 * 32].view(np.int8).reshape(32, 32, 4)
    assert fours[17, 5, 1] == codes[5, 69] and not fours[18:].any()


def test_parts_of_a_block_are_in_the_order_of_the_file() -> None:
    data = np.zeros((1, 20), np.uint8)
    data[0, :4] = np.array([2, -3], np.float16).view(np.uint8)
    data[0, 4], data[0, 19] = 0x71, 0xF2
    codes, scale, offset = block_parts(data, "q4_1")
    assert [codes[0, k] for k in (0, 15, 16, 31)] == [1, 2, 7, 15] and (scale[0, 0], offset[0, 0]) == (2, -3)


def test_jobs_begin_with_the_fields_of_other_products() -> None:
    """A pass over the tape sets `gate`, `out` and `out_stride` without knowing which product it has before it."""
    for job in (CODES, MATCHED):
        names = [name for name, _ in job.fields]
        assert {"x", "bias", "out", "out_stride", "gate"} < set(names) and names[-1] != "gate"


def test_a_weight_is_held_as_codes_alone() -> None:
    session = NativeSession(native.load(), 1)
    try:
        w = np.ones((64, 64), np.float32)
        problem = LinearProblem(dtype="float32", n=64, k=64, scheme="q4_1")
        param = Param(
            "w", "w", w.shape, "float32", {"linear": problem}, lambda *_: Local((Stored("none", w.shape, {"data": w}),))
        )
        kernel = next(k for k in (make("cpu") for make in recipes(native.load())) if k.name == "cpu_linear_q4_1")
        found = session.load({"w": param}, None, {"w": Packing(kernel.layout, kernel.pack)})["w"]  # type: ignore[arg-type]
        assert isinstance(found, Weight) and list(found.arrays) == ["data"] and found.arrays["data"].nbytes == 64 * 40
        session.update({"w": 2 * w})
        codes = found.arrays["data"]
        assert codes.dtype == np.uint8 and np.array_equal(codes, pack("q4_1", 2 * w))
    finally:
        session.close()
