"""Products with weights in codes (`native/codes.h`): quantized when they are loaded, or in a GGUF file's own blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from lineshaft_contract.ops.quantize import (
    ACTIVATION_SCHEMES,
    BLOCK,
    BLOCK_SCHEMES,
    INT4,
    LINEAR_SCHEMES,
    block_parts,
    unpack_nibbles,
)
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.packing import pack_blocks, pack_groups, pack_rows
from lineshaft_contract.problems import LinearProblem, itemsize
from lineshaft_contract.weights import Local, Param, Weight
from lineshaft_cpu.engine.kernels.common import (
    EXTENT,
    Job,
    Recipe,
    TapeArray,
    c_int64,
    c_void_p,
    copied,
    dense,
    extent,
    floats_only,
    grain,
    narrow,
    operand,
    recipe,
    tail_of,
)
from lineshaft_cpu.engine.kernels.products import ITEM_BYTES, LINEAR
from lineshaft_cpu.engine.stored import PANEL
from lineshaft_cpu.engine.tape import Field, Tape
from lineshaft_cpu.native import Native

BLOCK_ROWS = 512
"""Rows of an item, at most: a panel is expanded once for them."""
FEW = 12
"""Rows up to which a panel is not expanded whole (`native/linear.h`)."""
TILE = 64
"""Codes along k that a tile takes at once: codes of x and of weights that meet each other come in as many."""
INTEGERS, FLOATS, FOUR = range(3)
CODES = Job(
    "codes",
    (
        *LINEAR.fields, *((name, c_int64) for name in ("kind", "group", "zero", "half", "offset")),
    ),
)  # fmt: skip
MATCHED = Job("matched", LINEAR.fields)
QUANTIZE = Job(
    "quantize",
    (
        *EXTENT, ("grain", c_int64), *((name, c_void_p) for name in ("x", "codes", "scales")),
        *((name, c_int64) for name in ("width", "x_stride", "out_stride", "kind", "narrow")),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """Weights in codes: what a record of `codes.h` holds."""

    kind: int
    zero: int = 0
    half: bool = False
    offset: bool = False

    def record_bytes(self, group: int) -> int:
        """Bytes of a record of `group` numbers of each of PANEL outputs."""
        codes = -(-group // 8) * 4 if self.kind == FOUR else group + group % 2
        return PANEL * (codes + (1 + self.offset) * (2 if self.half else 4))


SCHEMES: Final = MappingProxyType(
    {
        "int8": Codes(INTEGERS), "fp8": Codes(FLOATS), INT4: Codes(FOUR, zero=8), "w8a8_fp8": Codes(FLOATS),
        **{
            name: Codes(FOUR if block.bits == 4 else INTEGERS, block.zero, True, block.offset)
            for name, block in BLOCK_SCHEMES.items()
        },
    }
)  # fmt: skip
"""All whose codes are multiplied as floats."""


def recipes(native: Native) -> Iterator[Recipe]:
    for scheme in (*LINEAR_SCHEMES, *BLOCK_SCHEMES):
        rule = ACTIVATION_SCHEMES.get(scheme, scheme)
        bind, pack = (bind_codes, partial(pack_codes, scheme)) if scheme in SCHEMES else (bind_matched, pack_matched)
        layout = f"cpu_{rule}_{'records' if scheme in SCHEMES else 'panels'}"
        yield recipe(
            f"linear_{scheme}", "linear", bind, partial(only, scheme), layout=layout, pack=pack,
            handles=frozenset({"bias", "scheme"}),
        )  # fmt: skip


def only(scheme: str, problem: LinearProblem) -> str | None:
    """The `supports` of a kernel for weights of one scheme."""
    if problem.scheme != scheme:
        return f"is for weights of scheme {scheme}, not {problem.scheme}"
    return floats_only(problem)


def group_of(problem: LinearProblem) -> int:
    """Numbers along k that share a scale."""
    return BLOCK if problem.scheme in BLOCK_SCHEMES else problem.group_size or problem.k


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack_codes(scheme: str, param: Param, local: Local) -> dict[str, HostArray]:
    """{"data": a weight [n, k] as uint8 [n / 32, groups, bytes of a record]}, codes and scales to the bit those of the
    contract's rule, or the file's."""
    rule, codes = ACTIVATION_SCHEMES.get(scheme, scheme), SCHEMES[scheme]
    if scheme in BLOCK_SCHEMES:
        q, *scales = block_parts(pack_blocks(scheme)(param, local)["data"], scheme)
    elif rule == INT4:
        leaves = pack_groups(param, local)
        q, scales = unpack_nibbles(leaves["q"]), [leaves["scale"]]
    else:
        leaves = pack_rows(rule)(param, local)
        q, scales = leaves["q"], [leaves["scale"][:, None]]
    groups = scales[0].shape[1]
    laid = four_bits(q + np.int8(codes.zero), groups) if codes.kind == FOUR else eight_bits(q, groups)
    parts = [laid, *(by_panel(scale) for scale in scales)]
    return {"data": np.concatenate(parts, axis=2)}


def panels(x: HostArray) -> HostArray:
    """x [n, ...] -> [n / 32, 32, ...], zeros where it ends."""
    padded = np.pad(x, ((0, -len(x) % PANEL), *((0, 0) for _ in x.shape[1:])))
    return padded.reshape(-1, PANEL, *x.shape[1:])


def by_panel(scales: HostArray) -> HostArray:
    """scales [n, groups] -> the bytes [n / 32, groups, those of 32 scales]."""
    found = np.ascontiguousarray(panels(scales).swapaxes(1, 2))
    return found.view(np.uint8)


def eight_bits(q: HostArray, groups: int) -> HostArray:
    """Codes [n, k] of 8 bits -> bytes [n / 32, groups, group / 2 * 32 * 2]."""
    grouped = panels(q.view(np.uint8).reshape(len(q), groups, -1))
    grouped = np.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, grouped.shape[3] % 2)))
    pairs = grouped.reshape(*grouped.shape[:3], -1, 2).transpose(0, 2, 3, 1, 4)
    return pairs.reshape(len(grouped), groups, -1)


def four_bits(q: HostArray, groups: int) -> HostArray:
    """Codes [n, k] from 0 to 15 -> bytes [n / 32, groups, group / 8 * 32 * 4]."""
    grouped = panels(q.view(np.uint8).reshape(len(q), groups, -1))
    grouped = np.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, -grouped.shape[3] % 8)))
    eights = grouped.reshape(*grouped.shape[:3], -1, 4, 2)
    lanes = np.zeros((*eights.shape[:4], 2), np.uint16)
    for j in range(4):
        lanes |= eights[..., j, :].astype(np.uint16) << 4 * j
    laid = np.ascontiguousarray(lanes.transpose(0, 2, 3, 1, 4)).view(np.uint8)
    return laid.reshape(len(grouped), groups, -1)


def pack_matched(param: Param, local: Local) -> dict[str, HostArray]:
    """{"data": a weight [n, k] as uint8 [n / 32, bytes of a panel]}: int8 codes [k / 4, 32, 4] with zeros to a multiple
    of 64, float32 scales [32], and the int32 sum of each output's codes [32]."""
    leaves = pack_rows("int8")(param, local)
    q, scale = panels(leaves["q"]), panels(leaves["scale"])
    q = np.pad(q, ((0, 0), (0, 0), (0, tiled(q.shape[2]) - q.shape[2])))
    codes = np.ascontiguousarray(q.reshape(len(q), PANEL, -1, 4).swapaxes(1, 2)).view(np.uint8)
    parts = [codes.reshape(len(q), -1), scale.view(np.uint8), q.sum(axis=2, dtype=np.int32).view(np.uint8)]
    return {"data": np.concatenate(parts, axis=1)}


def tiled(k: int) -> int:
    return -(-k // TILE) * TILE


# ---- calls -----------------------------------------------------------------------------------------------------------


def fields_of(
    tape: Tape, problem: LinearProblem, x: TapeArray, w: Weight, bias: Any, share: int
) -> tuple[TapeArray, list[TapeArray], dict[str, Field]]:
    """The result [T, n], what else than x is read, and the fields of all products; `share`: panels of an item."""
    out = tape.new((x.shape[0], problem.n), problem.dtype, x.live)
    added = None if bias is None else operand(bias, problem.dtype)
    if isinstance(added, TapeArray):
        added = dense(tape, added)
    fields: dict[str, Field] = {
        **extent(x, x.shape[0]), "x": x, "panels": w.arrays["data"], "bias": added, "out": out, "n": problem.n,
        "k": problem.k, "x_stride": x.strides[0], "out_stride": problem.n, "gate": 0, "block": BLOCK_ROWS,
        "grain": share, "narrow": narrow(problem.dtype), "norm": None, "rope": None, "quantize": None, "tokens": None,
    }  # fmt: skip
    return out, [added] if isinstance(added, TapeArray) else [], fields


def panels_of_an_item(problem: LinearProblem, threads: int, panel_bytes: int) -> int:
    units = -(-problem.n // PANEL)
    share = -(-units // (4 * threads))
    return min(share, max(1, ITEM_BYTES // panel_bytes))


def bind_codes(problem: LinearProblem, session: Any) -> Callable[..., TapeArray]:
    codes, group = SCHEMES[problem.scheme], group_of(problem)
    groups = problem.k // group
    share = panels_of_an_item(problem, session.team.threads, groups * codes.record_bytes(group))
    numbers = 2 * (problem.k + 8) * PANEL * (2 if problem.scheme in ACTIVATION_SCHEMES else itemsize(problem.dtype))
    scratch = max(numbers, (FEW * groups + problem.k) * 4)

    def linear(x: TapeArray, w: Weight, *, bias: Any = None) -> TapeArray:
        """x [T, I], w [O, I] in records, bias [O] -> x w^T + bias [T, O], summed in float32 and rounded once."""
        tape = session.tape
        x = x if tail_of(x) >= problem.k else copied(tape, x)
        tokens = None
        if problem.scheme in ACTIVATION_SCHEMES:
            x, tokens = quantized(tape, x, FLOATS, "bfloat16")
        out, added, fields = fields_of(tape, problem, x, w, bias, share)
        fields |= {
            "tokens": tokens, "kind": codes.kind, "group": group, "zero": codes.zero, "half": int(codes.half),
            "offset": int(codes.offset),
        }  # fmt: skip
        reads = (x, *added) if tokens is None else (x, tokens, *added)
        tape.add(CODES, "linear", reads, (out,), fields, scratch)
        return out

    return linear


def bind_matched(problem: LinearProblem, session: Any) -> Callable[..., TapeArray]:
    share = panels_of_an_item(problem, session.team.threads, PANEL * (tiled(problem.k) + 8))

    def linear(x: TapeArray, w: Weight, *, bias: Any = None) -> TapeArray:
        """x [T, I], whose rows are quantized to int8, w [O, I] in panels of such codes, bias [O] -> [T, O]: products of
        codes are summed as integers."""
        tape = session.tape
        x = x if tail_of(x) >= problem.k else copied(tape, x)
        x, tokens = quantized(tape, x, INTEGERS, "int8")
        out, added, fields = fields_of(tape, problem, x, w, bias, share)
        tape.add(MATCHED, "linear", (x, tokens, *added), (out,), {**fields, "tokens": tokens})
        return out

    return linear


def quantized(tape: Tape, x: TapeArray, kind: int, dtype: str) -> tuple[TapeArray, TapeArray]:
    """Record the quantization of the rows of x [T, I]: their codes in `dtype`, with zeros to a multiple of TILE, and
    float32 scales [T]."""
    rows, width = x.shape[0], tiled(x.shape[1])
    codes, scales = tape.new((rows, width), dtype, x.live), tape.new((rows,), "float32", x.live)
    fields: dict[str, Field] = {
        **extent(x, rows), "grain": grain(width), "x": x, "codes": codes, "scales": scales, "width": x.shape[1],
        "x_stride": x.strides[0], "out_stride": width, "kind": kind, "narrow": narrow(x.dtype),
    }  # fmt: skip
    tape.add(QUANTIZE, "linear", (x,), (codes, scales), fields)
    return codes, scales
