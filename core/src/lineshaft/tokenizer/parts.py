"""What a tokenizer is made of, whatever it was read from. Holds no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend


@dataclass(frozen=True)
class TokenizerParts:
    """`add_bos` and `add_eos`: None leaves it to the backend's post-processor.

    `special_tokens` maps names such as "bos_token" to the tokens' text, for chat templates.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    eos_ids: frozenset[int]
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None
