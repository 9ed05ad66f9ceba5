"""A trace on disk: a folder that is written whole or not at all, and read only if nothing in it was changed.

trace.json           header: versions, backend, model, configuration, buckets, the calls of each, sha256 of every file
steps.safetensors    each step's packed inputs, page copies and chosen ids
digests.jsonl        a line for each output of each call of each step
sketches.safetensors the sketch of each of those, in the same order
outputs-N.safetensors  with `full`: all outputs of step N
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
from safetensors.numpy import save

from lineshaft.plan.plan import make_shape
from lineshaft.runner.messages import StepMessage
from lineshaft_conformance.trace.digests import BUCKETS, Digest
from lineshaft_conformance.trace.errors import TraceError
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import HostStep, StepShape, aligned_zeros, forward_inputs

VERSION: Final = 1
HEADER, STEPS, DIGESTS, SKETCHES = "trace.json", "steps.safetensors", "digests.jsonl", "sketches.safetensors"
FIELDS: Final = {
    "full": bool, "count": int, "page_size": int, "backend": str, "model": str, "dtype": str, "lineshaft": str,
    "fingerprint": str, "config": dict, "files": dict, "calls": list, "shapes": list, "steps": list, "pages": list,
}  # fmt: skip
"""What a header holds, beside its version."""
LARGEST: Final = 256 << 20
"""Bytes of a header; more is not read."""
PLAIN_FIELDS: Final = ("dtype", "sha256", "l2", "top", "nan", "inf")
DTYPES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64",
}  # fmt: skip
"""The contract's dtypes as safetensors names them; its own NumPy reader knows no bfloat16."""


Key = tuple[int, int, str]
"""Of an output: its step, its call and its name."""


@dataclass
class Kept:
    """One output of one call as recorded. `sensitivity`: the RMS by which random roundings of the weights moved it."""

    digest: Digest
    sensitivity: float = 0.0


@dataclass(frozen=True)
class Trace:
    """A trace that was read: `header` as written, every step, the ids that each chose, and every output's digest."""

    folder: Path
    header: Mapping[str, Any]
    steps: Sequence[StepMessage]
    chosen: Sequence[HostArray]
    kept: Mapping[Key, Kept]

    @property
    def full(self) -> bool:
        return bool(self.header["full"])

    def calls(self, shape: StepShape) -> list[dict[str, Any]]:
        """The recorded calls of a bucket, in their order: name, op, layer, problem, kernel."""
        index = self.shapes.index(shape)
        return list(self.header["calls"][index])

    @property
    def shapes(self) -> list[StepShape]:
        return [make_shape(shape) for shape in self.header["shapes"]]

    def outputs(self, step: int) -> dict[str, HostArray]:
        """The tensors of a step by "CALL.OUTPUT"; empty unless the trace is full. Raises TraceError."""
        return read_tensors(self.folder / outputs_file(step)) if self.full else {}


def outputs_file(step: int) -> str:
    return f"outputs-{step:05d}.safetensors"


# ---- writing ---------------------------------------------------------------------------------------------------


class Writer:
    """Fills the folder of a trace step by step; `finish` writes the header, and the folder is whole."""

    def __init__(self, folder: Path, *, full: bool) -> None:
        self.folder, self.full = folder, full
        self._steps: dict[str, HostArray] = {}
        self.kept: dict[Key, Kept] = {}

    def add_step(self, index: int, step: StepMessage, chosen: HostArray, outputs: Mapping[str, HostArray]) -> None:
        """The step's inputs and the ids it chose; `outputs` are kept where the trace is full."""
        self._steps |= {f"{index}.forward": step.forward.buffer, f"{index}.copies": step.copies}
        self._steps[f"{index}.chosen"] = chosen
        if self.full:
            write_tensors(self.folder / outputs_file(index), outputs)

    def finish(self, header: Mapping[str, Any]) -> None:
        write_tensors(self.folder / STEPS, self._steps)
        write_tensors(self.folder / SKETCHES, {"sketches": np.stack([k.digest.sketch for k in self.kept.values()])})
        lines = (json.dumps(as_line(key, kept)) for key, kept in self.kept.items())
        (self.folder / DIGESTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files = {path.name: sha256(path) for path in sorted(self.folder.iterdir())}
        content = {"version": VERSION, "full": self.full, "count": len(self.kept), **header, "files": files}
        text = json.dumps({**content, "sha256": sha256_of(content)}, indent=1)
        (self.folder / HEADER).write_text(text, encoding="utf-8")


@contextmanager
def writing(folder: Path, *, full: bool) -> Iterator[Writer]:
    """A Writer whose files appear as `folder` once everything is written, or not at all.

    Raises TraceError at once if there is something at `folder` that is no empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TraceError(f"{folder} is there and not an empty folder; give another one or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}")
    draft.mkdir()
    try:
        yield Writer(draft, full=full)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_tensors(path: Path, arrays: Mapping[str, HostArray]) -> None:
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


# ---- reading ---------------------------------------------------------------------------------------------------


def read(folder: Path) -> Trace:
    """The trace in a folder. Raises TraceError for one that is missing, of another version, or not as written."""
    header = read_header(folder)
    for name, wanted in header["files"].items():
        if not (folder / name).is_file():
            raise TraceError(f"{folder / name} is missing; record the trace anew")
        if sha256(folder / name) != wanted:
            raise TraceError(f"{folder / name} is not what was recorded: its sha256 differs; record the trace anew")
    try:
        return assemble(folder, header)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TraceError(
            f"{folder} does not hold what its header promises ({error!r}); record the trace anew"
        ) from error


def read_header(folder: Path) -> dict[str, Any]:
    """The checked header."""
    path = folder / HEADER
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):
            raise TraceError(f"{path} is no file of at most {LARGEST >> 20} MiB; record the trace anew")
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read ({error.strerror}); give a folder of `lineshaft trace record`"
        ) from error
    except ValueError as error:
        raise TraceError(f"{path} is damaged ({error}); record the trace anew") from error
    if not isinstance(header, dict) or "version" not in header:
        raise TraceError(f"{path} is no header of a trace; give a folder of `lineshaft trace record`")
    if header["version"] != VERSION:
        raise TraceError(f"{path} is of version {header['version']!r}, this reads {VERSION}; record the trace anew")
    if header.pop("sha256", None) != sha256_of(header):
        raise TraceError(f"{path} is not what was recorded: its sha256 differs; record the trace anew")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(header.get(name), kind)]
    odd = [] if wrong else [name for name in header["files"] if Path(name).name != name]
    if wrong or odd or len(header["calls"]) != len(header["shapes"]):
        what = ", ".join(map(repr, wrong or odd)) or "'calls' and 'shapes'"
        raise TraceError(f"{path} is no header of a trace: see {what}; record the trace anew")
    return header


def assemble(folder: Path, header: Mapping[str, Any]) -> Trace:
    tensors = read_tensors(folder / STEPS)
    shapes = [make_shape(shape) for shape in header["shapes"]]
    steps = [message(shapes[at], tensors, index) for index, at in enumerate(header["steps"])]
    chosen = [tensors[f"{index}.chosen"] for index in range(len(steps))]
    sketches = read_tensors(folder / SKETCHES)["sketches"]
    lines = (folder / DIGESTS).read_text(encoding="utf-8").splitlines()
    if not (len(lines) == header["count"] == len(sketches)) or sketches.shape[1:] != (BUCKETS,):
        raise ValueError(f"{len(lines)} digests and {sketches.shape} sketches")
    kept = dict(from_line(json.loads(line), row) for line, row in zip(lines, sketches, strict=True))
    return Trace(folder, header, steps, chosen, kept)


def message(shape: StepShape, tensors: Mapping[str, HostArray], index: int) -> StepMessage:
    layout = forward_inputs(shape)
    buffer = aligned_zeros(layout.nbytes)
    buffer[:] = tensors[f"{index}.forward"]
    return StepMessage(shape, HostStep(layout, buffer), tensors[f"{index}.copies"])


def as_line(key: Key, kept: Kept) -> dict[str, Any]:
    """What stands in a line of the digests; the sketch goes elsewhere."""
    place = dict(zip(("step", "call", "output"), key, strict=True))
    fields = {name: getattr(kept.digest, name) for name in ("shape", *PLAIN_FIELDS)}
    return {**place, **fields, "sensitivity": kept.sensitivity}


def from_line(line: Mapping[str, Any], row: HostArray) -> tuple[Key, Kept]:
    """The inverse of `as_line`."""
    found = Digest(shape=tuple(line["shape"]), sketch=row, **{name: line[name] for name in PLAIN_FIELDS})
    return (line["step"], line["call"], line["output"]), Kept(found, line["sensitivity"])


def read_tensors(path: Path) -> dict[str, HostArray]:
    """The arrays of a safetensors file. Raises TraceError for a damaged one."""
    try:
        found = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        return {name: tensor(item) for name, item in found}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise TraceError(f"{path} cannot be read ({error}); record the trace anew") from error


def tensor(item: Mapping[str, Any]) -> HostArray:
    values = np.frombuffer(item["data"], numpy_dtype(DTYPES[item["dtype"]]))
    return values.reshape(item["shape"])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
