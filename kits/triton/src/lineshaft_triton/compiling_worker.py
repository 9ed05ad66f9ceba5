"""The process that compiles: reads launches from standard input, a line each, and answers on standard output.

`python -m lineshaft_triton.compiling_worker`, until its input ends. It never runs a kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lineshaft_triton.inspection import Code, amd_code, nvidia_code
from lineshaft_triton.targets import TARGETS, Target

LONGEST = 400
"""Characters of a compiler's message that are kept."""


@dataclass(frozen=True)
class Pointer:
    """What Triton looks at in a tensor: its dtype, whether 16 divides its address, whether 32 bits reach its end."""

    dtype: torch.dtype
    aligned: bool
    small: bool

    def data_ptr(self) -> int:
        return 16 if self.aligned else 1

    def ptr_range(self) -> int:
        return 1 if self.small else 1 << 40


def value(given: list[Any]) -> Any:
    """An argument of a launch."""
    kind, *rest = given
    if kind == "tensor":
        return Pointer(getattr(torch, rest[0]), *rest[1:])
    if kind == "dtype":
        return triton.language.dtype(rest[0])
    return named(rest[0]) if kind == "function" else rest[0]


def named(path: str) -> Any:
    """The object "module:name"."""
    module, _, name = path.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def gpu(target: Target) -> GPUTarget:
    if target.vendor == "nvidia":
        return GPUTarget("cuda", int(target.name.removeprefix("sm")), target.warp)
    return GPUTarget("hip", target.name, target.warp)


@cache
def backend_of(target: Target) -> Any:
    return make_backend(gpu(target))


def compile_launch(launch: Mapping[str, Any], target: Target) -> Code:
    """Compile as Triton's own launch does, from the binding of the arguments on. Raises what Triton does."""
    kernel, backend = named(launch["kernel"]), backend_of(target)
    options = dict(launch["options"])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {name: value(given) for name, given in launch["named"]}
    bound, specialization, kwargs = binder(*map(value, launch["args"]), **arguments, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, kwargs)
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attrs), target=gpu(target), options=parsed.__dict__
    )
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.vendor == "amd":
        return amd_code(target, compiled.asm["amdgcn"], shared, warps)
    return nvidia_code(target, compiled.asm["ptx"], resources(compiled.asm["cubin"]), shared, warps)


def resources(cubin: bytes) -> str:
    """What cuobjdump tells of a compiled kernel's registers and memory."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def message(error: BaseException) -> str:
    """An error in one line: the end of what the innermost says, which is where Triton says what is wrong, without the
    command of an assembler, whose files are gone."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).partition("Repro command")[0].split())
    shown = text if len(text) <= LONGEST else f"... {text[-LONGEST:]}"
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def answer(request: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return {"code": asdict(compile_launch(request["launch"], TARGETS[request["target"]]))}
    except Exception as error:
        return {"failed": message(error)}


def main() -> None:
    warnings.simplefilter("ignore")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print meets no answer
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
