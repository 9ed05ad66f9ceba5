"""What a compiled program takes and uses of a chip: its fast memory, and products of matrices."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mosaic.python import tpu

VMEM = "1"
"""The number of VMEM among the memory spaces of compiled text."""


COLUMNS = ("vmem_bytes", "mxu")


def inspect(compiled_text: Callable[[], str]) -> dict[str, int]:
    """Facts of a compiled program, made of kernels of our own, of the compiler's, or of both.

    vmem_bytes  most scoped VMEM that one operation takes (0 where the platform has none)
    mxu         products of matrices: in the bodies of Pallas kernels, each as often as it is written there, and outside
    """
    text = compiled_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    outside = re.findall(r"= \S+ (?:dot|convolution)\(", text)
    return {
        "vmem_bytes": max(map(int, _scoped(text)), default=0),
        "mxu": len(outside) + sum(_products(line) for line in calls),
    }


def _scoped(text: str) -> list[str]:
    used = "".join(re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', text))
    return re.findall(rf'"memory_space":"{VMEM}","offset":"\d+","size":"(\d+)"', used)


def _products(call: str) -> int:
    """How often the body of a kernel, which the compiled text holds as MLIR bytecode, multiplies matrices."""
    body = re.search(r'"body":"([^"]+)"', call)
    if body is None:
        return 0
    context = mlir.make_ir_context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context:
        return len(re.findall(r"\btpu\.matmul\b", str(ir.Module.parse(base64.b64decode(body.group(1))))))
