"""Finding and reading models: references, checkpoint formats, stored schemes, and the memory they need."""

from lineshaft.weights.checkpoint import CONFIG_ALONE, FORMATS, CheckpointFormat, open_checkpoint
from lineshaft.weights.mapped import MappedCheckpoint
from lineshaft.weights.memory import breakdown, check_fits, local_bytes, quantized, repacked
from lineshaft.weights.refs import resolve
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.schemes import BLOCKS, Block, as_dtype, dequantize

__all__ = [
    "BLOCKS",
    "CONFIG_ALONE",
    "FORMATS",
    "Block",
    "CheckpointFormat",
    "MappedCheckpoint",
    "as_dtype",
    "breakdown",
    "check_fits",
    "dequantize",
    "local_bytes",
    "open_checkpoint",
    "pack_rows",
    "quantized",
    "repacked",
    "resolve",
]
