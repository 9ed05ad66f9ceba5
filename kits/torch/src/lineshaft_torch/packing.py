"""From a parameter's local share, as stored, to tensors: the dense packing, and packings that a kernel brings."""

from __future__ import annotations

import numpy as np
import torch

from lineshaft_contract.kernels import Pack
from lineshaft_contract.schemes import check_parts, dequantize
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_torch.arrays import dtype_name, from_host, host_view, torch_dtype


def dense_leaves(param: Param, local: Local) -> dict[str, torch.Tensor]:
    """{"data": the parts joined along dim 0, in the param's shape and dtype}, on the host.

    Raises MisshapenTensor if the parts do not make up the shape.
    """
    out = torch.empty(param.shape, dtype=torch_dtype(param.dtype))
    check_parts(param, local)
    start, joined = 0, out.view(-1, *local.parts[0].shape[1:])
    for part in local.parts:
        stop = start + part.shape[0]
        _fill(joined[start:stop], part)
        start = stop
    return {"data": out}


def _fill(out: torch.Tensor, part: Stored) -> None:
    data = part.arrays["data"] if part.scheme == "none" else dequantize(part, dtype_name(out.dtype))
    if data.dtype.name == dtype_name(out.dtype):
        np.copyto(host_view(out), data)
    else:
        out.copy_(from_host(data))


def host_pack(pack: Pack, param: Param, local: Local, device: torch.device) -> dict[str, torch.Tensor]:
    """What a kernel's own packing makes of the share (NumPy arrays or tensors), as tensors on `device`.

    Raises MisshapenTensor if the parts do not make up the shape.
    """
    check_parts(param, local)
    leaves = pack(param, local)
    return {name: (x if isinstance(x, torch.Tensor) else from_host(x)).to(device) for name, x in leaves.items()}
