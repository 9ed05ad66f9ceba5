"""Sessions that load, tie or update weights wrongly, packings that are not pure, and inputs read by their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_conformance.mutants.mutant import Make, Mutant, changed, with_kernels, with_program, with_session
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.sessions import map_tree
from lineshaft_contract.weights import Local, Param, Stored


def _with_share(change: Any) -> Make:
    """Makes a mutant that loads `change(local)` of every parameter with more than one dim."""

    def changed_param(param: Param) -> Param:
        def shard(checkpoint: Any, coordinate: Any) -> Local:
            local = param.shard(checkpoint, coordinate)
            return local if len(param.shape) < 2 else change(param, local)

        return replace(param, shard=shard)

    def load(session: Any, original: Any, params: Any, checkpoint: Any, packings: Any) -> Any:
        return original(map_tree(changed_param, params), checkpoint, packings)

    return with_session("load", load)


def _reversed(param: Param, local: Local) -> Local:
    return Local(local.parts[::-1])


def _first_part_only(param: Param, local: Local) -> Local:
    return Local(local.parts[:1] * len(local.parts))


def _in_turns(param: Param, local: Local) -> Local:
    if len(param.shape) < 3:
        return local
    parts = [dequantize(part, param.dtype) for part in local.parts]
    return Local((Stored("none", param.shape, {"data": np.stack(parts, 1).reshape(param.shape)}),))


def _fits_anyway(param: Param, local: Local) -> Local:
    whole = np.concatenate([dequantize(part, param.dtype) for part in local.parts])
    return Local((Stored("none", param.shape, {"data": np.resize(whole, param.shape)}),))


def _low_nibbles_first(param: Param, local: Local) -> Local:
    def swapped(part: Stored) -> Stored:
        if part.scheme != "q4_0":
            return part
        blocks = part.arrays["data"].reshape(*part.arrays["data"].shape[:-1], -1, 18).copy()
        blocks[..., 2:] = (blocks[..., 2:] >> 4) | (blocks[..., 2:] << 4)
        return Stored(part.scheme, part.shape, {"data": blocks.reshape(part.arrays["data"].shape)})

    return Local(tuple(map(swapped, local.parts)))


def _narrow(param: Param, local: Local) -> Local:
    parts = [dequantize(part, "float8_e4m3fn").astype(np.float32) for part in local.parts]
    return Local(tuple(Stored("none", part.shape, {"data": part}) for part in parts))


def _named_only(session: Any, update: Any, weights: Any) -> Any:
    shared = session._shared
    session._shared = {
        key: item for key, item in shared.items() if item[0].name in weights or item[0].source_id not in weights
    }
    try:
        return update(weights)
    finally:
        session._shared = shared


def _old_programs(session: Any, load: Any, *given: Any) -> Any:
    if session.__dict__.get("_mutant_loaded"):
        return session.weights
    session._mutant_loaded = True
    return load(*given)


def _with_packing(change: Callable[[Local, Any], Any]) -> Make:
    """Makes a mutant whose kernels pack a share as `change(share, right leaves)`."""

    def changed_kernel(kernel: Kernel) -> Kernel:
        pack = kernel.pack
        return kernel if pack is None else replace(kernel, pack=lambda p, local: change(local, pack(p, local)))

    return with_kernels(changed_kernel)


def _drops_zero_rows(local: Local, leaves: Any) -> Any:
    return leaves if any(np.any(dequantize(part, "float32")) for part in local.parts) else {}


def _overwrites_share(local: Local, leaves: Any) -> Any:
    for part in local.parts:
        part.arrays["data"][...] = 0
    return leaves


def _new_versions(backend: Any) -> Any:
    def renamed(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
        return [replace(kernel, version=str(next(_STARTS))) for kernel in kernels]

    return changed(backend, change_kernels=renamed)


_STARTS = itertools.count()


def _by_place(session: Any) -> Any:
    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        names = [field.name for field in host.layout.fields]
        if "x" in names and names[0] != "x":
            host = type(host)(host.layout, host.buffer.copy())
            host["x"][...] = host[names[0]]
        return program(host, arrays, after)

    return call


MUTANTS: tuple[Mutant, ...] = (
    Mutant("parts_reversed", "the parts of a share are joined in order", 3, "L3/weights/parts", _with_share(_reversed)),
    Mutant("first_part_only", "a share is all of its parts", 3, "L3/weights/parts", _with_share(_first_part_only)),
    Mutant(
        "stack_in_turns", "the matrices of a stack lie one after another", 3, "L3/weights/stack", _with_share(_in_turns)
    ),
    Mutant(
        "fits_anyway", "parts that do not make up the shape are a typed error", 3, "L3/weights/misshapen",
        _with_share(_fits_anyway),
    ),
    Mutant(
        "nibbles_swapped", "quantized blocks are read as their scheme says", 3, "L3/weights/stored-q4_0",
        _with_share(_low_nibbles_first),
    ),
    Mutant(
        "narrow_weights", "weights are kept in the executed dtype", 1, "L1/linear/*", _with_share(_narrow)
    ),
    Mutant(
        "updates_one_name", "an update reaches every parameter of its source", 3, "L3/weights/tied",
        with_session("update", _named_only),
    ),
    Mutant(
        "never_reloads", "load after thaw brings new values", 3, "L3/weights/reload",
        with_session("load", _old_programs),
    ),
    Mutant(
        "shapes_by_value", "shapes of packed leaves do not depend on values", 0, "L0/load/packings",
        _with_packing(_drops_zero_rows),
    ),
    Mutant(
        "overwrites_share", "a packing leaves the share as it is", 0, "L0/load/packings",
        _with_packing(_overwrites_share),
    ),
    Mutant("new_versions", "the plan's hash does not change from start to start", 0, "L0/load/stable", _new_versions),
    Mutant("by_place", "inputs are read by name", 3, "L3/graph/named_inputs", with_program(_by_place)),
)  # fmt: skip
