"""Turns one token id into the bytes that it stands for, so that text can be put together token by token.

Owns the spelling of byte-level and SentencePiece vocabularies. Knows no file format.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from lineshaft.errors import TokenizerError

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_IDS: Final = 1 << 32  # the library's ids are uint32
_SPACE: Final = "\u2581"  # how SentencePiece spells a space
_PRINTABLE: Final = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def byte_alphabet() -> dict[str, int]:
    """The character that spells each byte in a byte-level vocabulary (GPT-2): printable ones spell themselves."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(others)}


class Pieces:
    """The bytes of every token of a vocabulary.

    `strips_space` says that a leading space of the whole text is no part of it. Raises TokenizerError for a
    vocabulary that is neither byte-level nor SentencePiece.
    """

    def __init__(self, backend: Backend) -> None:
        kinds = _decoder_steps(backend)
        self.byte_level = "ByteLevel" in kinds
        self.strips_space = "Strip" in kinds or "Metaspace" in kinds
        if not self.byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise TokenizerError(
                f"the tokenizer's decoder {sorted(kinds)} is not supported; allowed are byte-level BPE, SentencePiece: "
                "convert the tokenizer"
            )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = frozenset(added)
        self._backend = backend
        self._alphabet = byte_alphabet() if self.byte_level else {}
        self._cache: dict[int, bytes] = {}

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None if there is no such id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < _MAX_IDS else None

    def piece(self, token_id: int) -> bytes:
        """UTF-8 bytes of a token, perhaps a part of a character; nothing for an id without a token (padding)."""
        found = self._cache.get(token_id)
        if found is None:
            token = self.token(token_id)
            found = self._cache[token_id] = b"" if token is None else self._spell(token, token_id in self._added)
        return found

    def _spell(self, token: str, added: bool) -> bytes:
        if self.byte_level:
            known = not added and all(char in self._alphabet for char in token)
            return bytes(self._alphabet[char] for char in token) if known else token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()


def _decoder_steps(backend: Backend) -> frozenset[str]:
    """The type names of the decoder and, if it is a sequence, of its steps."""
    decoder: Any = backend.decoder
    if decoder is None:
        return frozenset()
    state = json.loads(decoder.__getstate__())
    return frozenset(step["type"] for step in (state, *state.get("decoders", ())))
