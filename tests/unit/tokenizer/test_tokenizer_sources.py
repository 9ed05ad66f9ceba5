"""Tokenizers from GGUF metadata and from Hugging Face folders: kinds, special tokens, chat templates, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from lineshaft.errors import ChatError, CorruptCheckpoint, TokenizerError
from lineshaft.tokenizer import Tokenizer
from lineshaft.tokenizer.from_gguf import read_metadata
from lineshaft.tokenizer.pieces import byte_alphabet

ALPHABET = sorted(byte_alphabet())


def byte_level(pre: str | None = "gpt-2", **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level vocabulary: 256 bytes, a few merges, two control tokens."""
    merges = ["1 2", "12 3", "\u0120 a", "\u0120 \u0120", "a b", "e \u00cc", "C \u00a9"]
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges), "<s>", "</s>", "<think>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def spelled(metadata: dict[str, Any], text: str) -> list[str]:
    tokenizer = Tokenizer(read_metadata(metadata))
    return [str(tokenizer.pieces.token(index)) for index in tokenizer.encode(text, add_special=False)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["123", "4"]),
        (None, "1234", ["123", "4"]),
        ("default", "1234", ["123", "4"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1212", ["12", "1", "2"]),
        ("gpt-2", "1212", ["12", "12"]),
        ("smollm", "a  1", ["a", "\u0120\u0120", "1"]),
        ("gpt-2", "a  1", ["a", "\u0120", "\u0120", "1"]),
        ("gpt-2", ".ab", [".", "ab"]),
    ],
)
def test_pre_tokenizers_split_as_they_should(pre: str | None, text: str, expected: list[str]) -> None:
    assert spelled(byte_level(pre), text) == expected


def test_qwen2_composes_characters_and_gpt2_does_not() -> None:
    decomposed = "e\u0301"
    assert (
        Tokenizer(read_metadata(byte_level("qwen2"))).decode(
            Tokenizer(read_metadata(byte_level("qwen2"))).encode(decomposed)
        )
        == "\u00e9"
    )
    tokenizer = Tokenizer(read_metadata(byte_level()))
    assert tokenizer.decode(tokenizer.encode(decomposed)) == decomposed


def test_special_tokens_are_whole_and_only_control_ones_are_skipped() -> None:
    tokenizer = Tokenizer(read_metadata(byte_level()))
    ids = tokenizer.encode("a<think>b</s>")
    assert [tokenizer.pieces.token(index) for index in ids] == ["a", "<think>", "b", "</s>"]
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special=False) == "a<think>b</s>"
    assert tokenizer.eos_ids == {ids[-1]}


@pytest.mark.parametrize(
    ("pre", "flag", "bos"),
    [("gpt-2", None, False), ("llama-bpe", None, True), ("gpt-2", True, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_as_the_file_says(pre: str, flag: bool | None, bos: bool) -> None:
    metadata = byte_level(pre) if flag is None else byte_level(pre, add_bos_token=flag)
    tokenizer = Tokenizer(read_metadata(metadata))
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) == bos
    assert tokenizer.bos_id not in tokenizer.encode("a", add_special=False)


def test_all_ends_that_a_gguf_file_names_count() -> None:
    tokens = byte_level()["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(read_metadata(byte_level(eot_token_id=3, eom_token_id=4)))
    assert tokenizer.eos_ids == {3, 4, tokens.index("</s>")}


def test_sentencepiece_merges_best_scores_first(spm: dict[str, Any]) -> None:
    tokenizer = Tokenizer(read_metadata(spm))
    ids = tokenizer.encode("hello world")
    assert [tokenizer.pieces.token(index) for index in ids] == ["<s>", "\u2581hello", "\u2581world"]
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.decode(ids, skip_special=False) == "<s> hello world"


@pytest.mark.parametrize(("scores", "expected"), [((-1.0, -2.0), ["ab", "c"]), ((-2.0, -1.0), ["a", "bc"])])
def test_the_better_of_two_overlapping_pieces_wins(
    spm: dict[str, Any], scores: tuple[float, float], expected: list[str]
) -> None:
    for key, more in (("tokens", ["ab", "bc"]), ("scores", list(scores)), ("token_type", [1, 1])):
        spm[f"tokenizer.ggml.{key}"] = [*spm[f"tokenizer.ggml.{key}"], *more]
    assert spelled(spm | {"tokenizer.ggml.add_space_prefix": False}, "abc") == expected


def test_sentencepiece_falls_back_to_bytes(spm: dict[str, Any]) -> None:
    tokenizer = Tokenizer(read_metadata(spm))
    ids = tokenizer.encode("\u20ac", add_special=False)
    assert [tokenizer.pieces.token(index) for index in ids] == ["\u2581", "<0xE2>", "<0x82>", "<0xAC>"]
    assert tokenizer.decode(ids) == "\u20ac"


def test_sentencepiece_puts_a_space_before_every_stretch_of_text(spm: dict[str, Any]) -> None:
    tokenizer = Tokenizer(read_metadata(spm))
    ids = tokenizer.encode("hello<think>world", add_special=False)
    assert [tokenizer.pieces.token(index) for index in ids] == ["\u2581hello", "<think>", "\u2581world"]


@pytest.mark.parametrize("text", ["hello world", "hel lo", "world, hello!", "a1\u00e9\u20ac", "bo  ld"])
def test_sentencepiece_agrees_with_transformers(spm: dict[str, Any], text: str) -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    words = {key.removeprefix("tokenizer.ggml."): value for key, value in spm.items()}
    theirs, _ = convert_gguf_tokenizer("llama", words | {"tokenizer_type": "llama"})
    ids = Tokenizer(read_metadata(spm)).encode(text, add_special=False)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert Tokenizer(read_metadata(spm)).decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "made-up"}, "pre-tokenizer 'made-up' is not supported; allowed are"),
        ({"model": "bert"}, "model 'bert' is not supported"),
        ({"model": None}, "model None is not supported"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens must be a list of str"),
        ({"tokens": ["a", 3]}, "must be a list of str"),
        ({"token_type": [1]}, "but 1 token_type"),
        ({"merges": ["nothere really"]}, "cannot be built"),
        ({"merges": None}, "merges must be a list"),
        ({"eos_token_id": 1 << 31}, "eos_token_id is 2147483648"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"model": "llama"}, "scores must be a list"),
        ({"model": "llama", "scores": [1.0]}, "but 1 scores"),
    ],
)
def test_wrong_metadata_is_a_typed_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words) as caught:
        Tokenizer(read_metadata(byte_level(**changes)))
    assert "\n" not in str(caught.value)


def backend() -> Backend:
    tokens = [*ALPHABET, "<s>", "</s>", "<|eot_id|>"]
    made = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token) for token in tokens[-3:]])
    return made


BOS, EOS, EOT = 256, 257, 258


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backend().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    return tmp_path


def change(folder: Path, file: str, **changes: Any) -> Path:
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changes))
    return folder


def test_a_folder_says_its_special_tokens(folder: Path) -> None:
    change(folder, "generation_config.json", eos_token_id=[6, 7])
    tokenizer = Tokenizer.from_checkpoint(folder)
    assert tokenizer.bos_id == BOS
    assert tokenizer.eos_ids == {5, 6, 7, EOS, EOT}
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize(
    ("template", "flag", "expected"),
    [(False, None, []), (False, True, [BOS]), (True, None, [BOS]), (True, True, [BOS]), (True, False, [])],
)
def test_bos_comes_from_the_post_processor_unless_the_config_decides(
    folder: Path, template: bool, flag: bool | None, expected: list[int]
) -> None:
    made = backend()
    if template:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.enable_truncation(2)
    made.save(str(folder / "tokenizer.json"))
    if flag is not None:
        change(folder, "tokenizer_config.json", add_bos_token=flag)
    ids = Tokenizer.from_checkpoint(folder).encode("abcd")
    assert ids[: len(ids) - 4] == expected


def test_templates_of_a_folder(folder: Path) -> None:
    assert Tokenizer.from_checkpoint(folder).chat("x") == "<s>old"
    change(
        folder,
        "tokenizer_config.json",
        chat_template=[
            {"name": [], "template": "x"},
            {"name": "tools", "template": "t"},
            {"name": "default", "template": "d"},
        ],
    )
    assert Tokenizer.from_checkpoint(folder).chat("x") == "d"
    (folder / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert Tokenizer.from_checkpoint(folder).chat("x") == "new x"


def test_no_template_says_so(folder: Path) -> None:
    change(folder, "tokenizer_config.json", chat_template=None)
    tokenizer = Tokenizer.from_checkpoint(folder)
    with pytest.raises(ChatError, match="no chat template"):
        tokenizer.chat("x")


def test_wrong_folders_are_typed_errors(folder: Path) -> None:
    for wrong in ("x", {}, [[0]]):
        change(folder, "generation_config.json", eos_token_id=wrong)
        with pytest.raises(TokenizerError, match="give an integer or a list of them"):
            Tokenizer.from_checkpoint(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="generation_config"):
        Tokenizer.from_checkpoint(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_checkpoint(folder)


def test_an_unknown_decoder_is_refused(folder: Path) -> None:
    made = backend()
    made.decoder = decoders.WordPiece()
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer.from_checkpoint(folder)


def test_a_file_that_is_no_gguf_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGU")
    with pytest.raises(TokenizerError, match=r"model\.gguf is no GGUF file"):
        Tokenizer.from_checkpoint(tmp_path / "model.gguf")
