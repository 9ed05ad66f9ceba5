"""From parameters' local shares, as stored, to host arrays: the dense packing, and packings that a kernel brings."""

from __future__ import annotations

import numpy as np

from lineshaft_contract.schemes import check_parts, dequantize
from lineshaft_contract.sessions import Packing
from lineshaft_contract.weights import Local, Param
from lineshaft_jax.arrays import HostArray


def host_leaves(param: Param, local: Local, packing: Packing) -> dict[str, HostArray]:
    """What the packing makes of one rank's share; dense: {"data": the joined parts, in the param's shape and dtype}.

    Raises MisshapenTensor if the parts do not make up the shape.
    """
    check_parts(param, local)
    if packing.pack is not None:
        return {name: np.asarray(leaf) for name, leaf in packing.pack(param, local).items()}
    parts = [dequantize(part, param.dtype) for part in local.parts]
    return {"data": (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(param.shape)}
