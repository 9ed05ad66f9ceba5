"""Builds a tokenizer from a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

Owns the names of pre-tokenizers and their split patterns. Knows nothing of the binary format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from lineshaft.errors import TokenizerError
from lineshaft.tokenizer.parts import TokenizerParts

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types of the format
_SPACE: Final = "\u2581"
_ID_KEYS: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_EOS_KEYS: Final = ("eos", "eot", "eom")

# Split patterns as the models' own tokenizer.json files have them.
_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT: Final = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _Pre:
    """How text is split before merging, under the names of the format. `split` None is GPT-2's own pattern."""

    names: tuple[str, ...]
    split: str | None = None
    single_digits: bool = False
    whole_words: bool = False  # a word that is a token is taken without looking at merges
    nfc: bool = False
    bos: bool = False  # begin with BOS unless the file says otherwise


_PRES: Final = (
    _Pre(("default", "gpt-2", "gpt2")),
    _Pre(("smollm", "starcoder"), single_digits=True),
    _Pre(("llama-bpe", "llama3", "llama-v3"), _LLAMA3_SPLIT, whole_words=True, bos=True),
    _Pre(("qwen2", "deepseek-r1-qwen"), _QWEN2_SPLIT, nfc=True),
)


def read_metadata(metadata: Mapping[str, Any]) -> TokenizerParts:
    """The tokenizer of a GGUF file. Raises TokenizerError for one that is missing, damaged or of an unknown kind."""
    words = _Words(metadata)
    kind = words.get("model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(words)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(words), True
    else:
        raise TokenizerError(f"the GGUF tokenizer model {kind!r} is not supported; allowed are gpt2 and llama")
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in words.of_type(_CONTROL, _UNKNOWN)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in words.of_type(_USER_DEFINED)])
    special = {name: words.token(key) for name, key in _ID_KEYS.items()}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        backend=backend,
        special_tokens={name: text for name, text in special.items() if text is not None},
        eos_ids=frozenset(index for key in _EOS_KEYS if (index := words.index(key)) is not None),
        add_bos=bool(words.get("add_bos_token", adds_bos)),
        add_eos=bool(words.get("add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
    )


class _Words:
    """What a file says below `tokenizer.ggml.`: its vocabulary, and typed look-ups of the other keys."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: list[str] = self.items("tokens", str)
        self.types: list[int] = [_NORMAL] * len(self.tokens)
        if self.get("token_type") is not None:
            self.types = self.of_each("token_type", int)

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def items(self, key: str, kind: type) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            raise TokenizerError(
                f"the GGUF key tokenizer.ggml.{key} must be a list of {kind.__name__}; use a file with a tokenizer"
            )
        return value

    def of_each(self, key: str, kind: type) -> list[Any]:
        """An item for each token."""
        value = self.items(key, kind)
        if len(value) != len(self.tokens):
            raise TokenizerError(
                f"the GGUF file has {len(self.tokens)} tokens but {len(value)} {key}; download it again"
            )
        return value

    def of_type(self, *wanted: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in wanted]

    def index(self, key: str) -> int | None:
        value = self.get(f"{key}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(self.tokens)):
            raise TokenizerError(
                f"the GGUF key tokenizer.ggml.{key}_token_id is {value!r} of {len(self.tokens)} tokens; convert again"
            )
        return value

    def token(self, key: str) -> str | None:
        index = self.index(key)
        return None if index is None else self.tokens[index]

    def bpe(self, merges: list[tuple[str, str]], **options: Any) -> Backend:
        try:
            return Backend(BPE({token: index for index, token in enumerate(self.tokens)}, merges, **options))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"the GGUF tokenizer cannot be built: {error}; download the file again") from error


def _byte_level(words: _Words) -> tuple[Backend, bool]:
    """The tokenizer, and whether it begins with BOS unless the file says otherwise."""
    name = words.get("pre", "default")
    pre = next((pre for pre in _PRES if name in pre.names), None)
    if pre is None:
        raise TokenizerError(
            f"the GGUF pre-tokenizer {name!r} is not supported; allowed are "
            f"{', '.join(name for pre in _PRES for name in pre.names)}: use the model's safetensors folder with its "
            "tokenizer.json"
        )
    merges = [merge.partition(" ")[::2] for merge in words.items("merges", str)]
    backend = words.bpe(merges, ignore_merges=pre.whole_words)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.bos


def _sentencepiece(words: _Words) -> Backend:
    merges = _merges_of_scores(words)
    backend = words.bpe(merges, unk_token=words.token("unknown"), fuse_unk=True, byte_fallback=True)
    prefix = words.get("add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of_scores(words: _Words) -> list[tuple[str, str]]:
    """SentencePiece merges whatever neighbours form the best-scored piece: every split of a piece, best piece first."""
    scores = words.of_each("scores", float)
    normal = {
        token: score for token, kind, score in zip(words.tokens, words.types, scores, strict=True) if kind == _NORMAL
    }
    return [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
