"""Text to token ids and back, with a model's special tokens and its chat template.

Owns what a tokenizer does; where it is read from is `from_folder` and `from_gguf`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from lineshaft.errors import ChatError, RequestError, TokenizerError
from lineshaft.tokenizer.chat import ChatTemplate
from lineshaft.tokenizer.from_folder import read_folder
from lineshaft.tokenizer.from_gguf import read_metadata
from lineshaft.tokenizer.parts import TokenizerParts
from lineshaft.tokenizer.pieces import Pieces
from lineshaft.weights.gguf_parse import is_gguf, parse_gguf

# Special tokens that end a turn of chat; a file's eos id is often only the one that ends a document, or the reverse.
_TURN_ENDS: Final = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")


class Tokenizer:
    """A model's tokenizer. Immutable, and safe to share between threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self.pieces = Pieces(parts.backend)
        bos = parts.special_tokens.get("bos_token")
        eos = parts.special_tokens.get("eos_token")
        self.bos_id: int | None = None if bos is None else parts.backend.token_to_id(bos)
        self.eos_ids: frozenset[int] = parts.eos_ids | self._turn_ends()
        self._prefix, self._suffix = _template_ids(parts.backend)
        self._prefix = _adjusted(self._prefix, self.bos_id, parts.add_bos)
        self._suffix = _adjusted(self._suffix, None if eos is None else parts.backend.token_to_id(eos), parts.add_eos)
        self._special_tokens = parts.special_tokens
        self._chat = None if parts.chat_template is None else ChatTemplate(parts.chat_template, parts.special_tokens)

    @classmethod
    def from_checkpoint(cls, path: Path) -> Tokenizer:
        """The tokenizer of a GGUF file or a Hugging Face folder. Raises TokenizerError, or CorruptCheckpoint for a
        damaged file."""
        if is_gguf(path):
            return cls(read_metadata(parse_gguf(path).metadata))
        if path.is_file():
            raise TokenizerError(f"{path} is no GGUF file, and holds no tokenizer: give a model's file or folder")
        return cls(read_folder(path))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included. The model's matrices may have more, unused, rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled in it count as such. Raises RequestError for lone surrogates.

        `add_special` adds what the model expects around a prompt (BOS); pass False for the result of `chat`.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"this text cannot be encoded ({error}); give a string of valid Unicode") from error
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        detokenizer = Detokenizer(self, skip_special)
        return "".join([*map(detokenizer.feed, ids), detokenizer.finish()])

    def chat(self, messages: Sequence[Mapping[str, Any]] | str, *, template: str | None = None, **more: Any) -> str:
        """The prompt's text for a conversation; a string is one message of the user.

        `template` takes the place of the model's own; `more` is what `ChatTemplate.render` takes, and what the template
        reads (enable_thinking, ...). Raises ChatError.
        """
        chat = self._chat if template is None else ChatTemplate(template, self._special_tokens)
        if chat is None:
            raise ChatError("this model has no chat template; give one, send a plain prompt, or use an instruct model")
        return chat.render([{"role": "user", "content": messages}] if isinstance(messages, str) else messages, **more)

    def _turn_ends(self) -> frozenset[int]:
        ids = {self._backend.token_to_id(text) for text in _TURN_ENDS}
        return frozenset(token_id for token_id in ids if token_id in self.pieces.special_ids and token_id is not None)


class Detokenizer:
    """Turns one sequence's ids into text as they come, never half a character. `feed` costs O(1).

    All texts from `feed` and the one from `finish`, joined, equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.pieces.special_ids if skip_special else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.pieces.strips_space

    def feed(self, token_id: int) -> str:
        """The text that this token completes; "" if it ends inside a character."""
        if token_id in self._skipped:
            return ""
        return self._strip(self._utf8.decode(self._pieces.piece(token_id)))

    def finish(self) -> str:
        """What is left when no token will follow: U+FFFD for a character cut short, else ""."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def _template_ids(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids that the backend's post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    starts = (at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain)
    start = next(starts, len(full))
    return full[:start], full[start + len(plain) :]


def _adjusted(ids: list[int], token_id: int | None, wanted: bool | None) -> list[int]:
    """`ids` with `token_id` once or not at all, as `wanted`; None leaves them as they are."""
    if wanted is None or token_id is None or wanted == (token_id in ids):
        return ids
    return [token_id, *ids] if wanted else [other for other in ids if other != token_id]
