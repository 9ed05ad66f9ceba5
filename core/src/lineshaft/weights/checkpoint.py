"""Opens a checkpoint by what it contains, not by what it is called.

Owns the list of formats; a plugin's formats are passed in front of it. Knows no format from within.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lineshaft.errors import CorruptCheckpoint, ModelNotFound
from lineshaft.weights.gguf_file import open_gguf
from lineshaft.weights.gguf_parse import is_gguf
from lineshaft.weights.safetensors_dir import (
    is_config_alone,
    is_safetensors_dir,
    open_config_alone,
    open_safetensors_dir,
)
from lineshaft_contract.weights import Checkpoint


@dataclass(frozen=True)
class CheckpointFormat:
    """A file format: `matches` looks at the content of an existing path (a few bytes), `open` opens it."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]


FORMATS: Final = (
    CheckpointFormat("a GGUF file", is_gguf, open_gguf),
    CheckpointFormat("a folder with config.json and safetensors", is_safetensors_dir, open_safetensors_dir),
)

CONFIG_ALONE: Final = CheckpointFormat("a folder with config.json alone", is_config_alone, open_config_alone)
"""For those who read no tensor; it goes in front of FORMATS."""


def open_checkpoint(path: Path, formats: Sequence[CheckpointFormat] = FORMATS) -> Checkpoint:
    """Open the checkpoint at `path` with the first of `formats` that matches its content.

    Raises ModelNotFound if nothing is there, CorruptCheckpoint if no format matches or its content is damaged.
    """
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist; give {_allowed(formats)}")
    try:
        found = next((candidate for candidate in formats if candidate.matches(path)), None)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if found is not None:
        return found.open(path)
    raise CorruptCheckpoint(f"{path} is no checkpoint; it must be {_allowed(formats)}")


def _allowed(formats: Sequence[CheckpointFormat]) -> str:
    return " or ".join(candidate.name for candidate in formats)
