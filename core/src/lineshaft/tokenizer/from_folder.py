"""Reads a tokenizer from a Hugging Face folder: tokenizer.json and what its neighbours say about special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from lineshaft.errors import TokenizerError
from lineshaft.tokenizer.parts import TokenizerParts
from lineshaft.weights.safetensors_dir import read_json

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


def read_folder(folder: Path) -> TokenizerParts:
    """The tokenizer of a folder. Raises TokenizerError, or CorruptCheckpoint for a JSON file that is damaged."""
    backend = _read_backend(folder / "tokenizer.json")
    config = _optional_json(folder / "tokenizer_config.json")
    special = {key: text for key in _SPECIAL if (text := _token_text(config.get(key))) is not None}
    return TokenizerParts(
        backend=backend,
        special_tokens=special,
        eos_ids=_eos_ids(folder, backend, special.get("eos_token")),
        add_bos=_flag(config, "add_bos_token"),
        add_eos=_flag(config, "add_eos_token"),
        chat_template=_chat_template(folder, config.get("chat_template")),
    )


def _read_backend(path: Path) -> Backend:
    if not path.is_file():
        raise TokenizerError(
            f"{path.parent} has no tokenizer.json; "
            "convert the model's tokenizer (save_pretrained of transformers writes it)"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any fault in the file
        raise TokenizerError(f"{path} cannot be read: {error}; download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _eos_ids(folder: Path, backend: Backend, eos_token: str | None) -> frozenset[int]:
    """All ids that end a text: the tokenizer's, and those of generation_config.json and config.json (int or list)."""
    found: list[Any] = [] if eos_token is None else [backend.token_to_id(eos_token)]
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    wrong = next((item for item in found if item is not None and type(item) is not int), None)
    if wrong is not None:
        raise TokenizerError(f"{folder} has an eos_token_id of {wrong!r:.80}; give an integer or a list of them")
    return frozenset(item for item in found if item is not None)


def _chat_template(folder: Path, configured: Any) -> str | None:
    """chat_template.jinja if there, else what tokenizer_config.json has: a text, or named ones of which "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    if isinstance(configured, list):
        named = (
            entry.get("template") for entry in configured if isinstance(entry, dict) and entry.get("name") == "default"
        )
        configured = next(named, None)
    return configured if isinstance(configured, str) else None
