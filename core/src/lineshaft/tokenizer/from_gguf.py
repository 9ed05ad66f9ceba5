"""Builds a tokenizer from a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

Owns the names of pre-tokenizers and their split patterns. Knows nothing of the binary format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from lineshaft.errors import TokenizerError
from lineshaft.tokenizer.parts import TokenizerParts

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types of the format
_SPACE: Final = "\u2581"
_ID_KEYS: Final = MappingProxyType(
    {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
)
_EOS_KEYS: Final = ("eos", "eot", "eom")

_PRE_KEY: Final = "tokenizer.ggml.pre"
_BOS_PRE: Final = ("llama-bpe", "llama3", "llama-v3")  # begin with BOS unless the file says otherwise

# Split patterns as the models' own tokenizer.json files have them.
_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT: Final = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _Pre:
    """How text is split before merging. `split` None is GPT-2's own pattern."""

    split: str | None = None
    single_digits: bool = False
    whole_words: bool = False  # a word that is a token is taken without looking at merges
    nfc: bool = False


_GPT2: Final = _Pre()
_SMOLLM: Final = _Pre(single_digits=True)
_LLAMA3: Final = _Pre(_LLAMA3_SPLIT, whole_words=True)
_QWEN2: Final = _Pre(_QWEN2_SPLIT, nfc=True)
_PRE: Final[Mapping[str, _Pre]] = MappingProxyType(
    {
        "default": _GPT2,
        "gpt-2": _GPT2,
        "gpt2": _GPT2,
        "smollm": _SMOLLM,
        "starcoder": _SMOLLM,
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
    }
)


def read_metadata(metadata: Mapping[str, Any]) -> TokenizerParts:
    """The tokenizer of a GGUF file. Raises TokenizerError for one that is missing, damaged or of an unknown kind."""
    vocabulary = _Vocabulary.read(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, vocabulary), False
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(metadata, vocabulary), True
    else:
        raise TokenizerError(f"the GGUF tokenizer model {kind!r} is not supported; allowed are gpt2 and llama")
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in vocabulary.special()])
    backend.add_tokens([AddedToken(text, normalized=False) for text in vocabulary.of_type(_USER_DEFINED)])
    special = {name: vocabulary.text(metadata, key) for name, key in _ID_KEYS.items()}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        backend=backend,
        special_tokens={name: text for name, text in special.items() if text is not None},
        eos_ids=frozenset(index for key in _EOS_KEYS if (index := vocabulary.index(metadata, key)) is not None),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos or metadata.get(_PRE_KEY) in _BOS_PRE)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
    )


@dataclass(frozen=True)
class _Vocabulary:
    tokens: Sequence[str]
    types: Sequence[int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> _Vocabulary:
        tokens = _list(metadata, "tokenizer.ggml.tokens", str)
        if "tokenizer.ggml.token_type" not in metadata:
            return cls(tokens, [_NORMAL] * len(tokens))
        types = _list(metadata, "tokenizer.ggml.token_type", int)
        if len(types) != len(tokens):
            raise TokenizerError(f"the GGUF file has {len(tokens)} tokens but {len(types)} types; download it again")
        return cls(tokens, types)

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def of_type(self, *wanted: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in wanted]

    def special(self) -> list[str]:
        return self.of_type(_CONTROL, _UNKNOWN)

    def index(self, metadata: Mapping[str, Any], key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(self.tokens)):
            raise TokenizerError(
                f"the GGUF key tokenizer.ggml.{key}_token_id is {value!r} of {len(self.tokens)} tokens; convert again"
            )
        return value

    def text(self, metadata: Mapping[str, Any], key: str) -> str | None:
        index = self.index(metadata, key)
        return None if index is None else self.tokens[index]


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
        raise TokenizerError(f"the GGUF key {key} must be a list of {kind.__name__}; use a file with a tokenizer")
    return value


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Backend:
    name = metadata.get(_PRE_KEY, "default")
    if name not in _PRE:
        raise TokenizerError(
            f"the GGUF pre-tokenizer {name!r} is not supported; allowed are {', '.join(sorted(_PRE))}: use the "
            "model's safetensors folder with its tokenizer.json"
        )
    pre = _PRE[name]
    merges = [_pair(merge) for merge in _list(metadata, "tokenizer.ggml.merges", str)]
    backend = Backend(_bpe(vocabulary, merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_splits(pre))
    backend.decoder = decoders.ByteLevel()
    return backend


def _splits(pre: _Pre) -> list[pre_tokenizers.PreTokenizer]:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None)]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocabulary.ids(), merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"the GGUF tokenizer cannot be built: {error}; download the file again") from error


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Backend:
    scores = _list(metadata, "tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(
            f"the GGUF file has {len(vocabulary.tokens)} tokens but {len(scores)} scores; download it again"
        )
    unknown = vocabulary.text(metadata, "unknown")
    merges = _merges_of_scores(vocabulary, scores)
    backend = Backend(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whatever neighbours form the best-scored piece: every split of a piece, best piece first."""
    normal = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
        if kind == _NORMAL
    }
    return [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
