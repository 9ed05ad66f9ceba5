"""SmolLM2's tokenizer, built from its GGUF file, does what transformers' does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.errors import ChatError, LineshaftError, RequestError
from lineshaft.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "a\tb\n\nc\r\n d \n",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "don't you'll WE'VE it's",
    "naïve café Ünïcödé ﬁ ½ ² ①",
    "日本語のテキストと한국어 그리고 العربية",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 emoji",
    "x = 3.14159 + 2024/12/31 1 000 000",
    "<|im_start|>user\nhi<|im_end|>\n",
    "zero\u200bwidth\u00a0nbsp\ufeffbom",
    "\x00\x01\x7f",
    "{}[]()<>!@#$%^&*~`|\\",
]
BEFORE_DIGITS = ["a  1", "\n\n42", "x =   7  8", "٣٤  ５"]


@pytest.fixture(scope="module")
def published(smollm2_path: Path) -> Any:
    """transformers' tokenizer of the same file, with the split that the model's own tokenizer.json has.

    From the GGUF file transformers takes GPT-2's split, which parts runs of spaces before a digit otherwise.
    """
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return theirs


@pytest.mark.parametrize("text", TEXTS + BEFORE_DIGITS)
def test_ids_and_text_agree(smollm2: Tokenizer, published: Any, text: str) -> None:
    ids = smollm2.encode(text)
    assert ids == published(text).input_ids
    for skip in (False, True):
        assert smollm2.decode(ids, skip) == published.backend_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text())
def test_ids_agree_on_any_text(smollm2: Tokenizer, published: Any, text: str) -> None:
    assert smollm2.encode(text) == published(text).input_ids


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), skip=st.booleans())
def test_any_ids_decode_alike(smollm2: Tokenizer, published: Any, ids: list[int], skip: bool) -> None:
    assert smollm2.decode(ids, skip) == published.backend_tokenizer.decode(ids, skip_special_tokens=skip)


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "why?\n"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3 {{x}}"}],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_agree(smollm2: Tokenizer, published: Any, messages: list[dict[str, str]], prompt: bool) -> None:
    theirs = published.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert smollm2.chat(messages, add_generation_prompt=prompt) == theirs


def test_a_string_is_one_message_of_the_user(smollm2: Tokenizer) -> None:
    assert smollm2.chat("hi") == smollm2.chat([{"role": "user", "content": "hi"}])


def test_special_ids(smollm2: Tokenizer) -> None:
    assert smollm2.bos_id == 1 and smollm2.vocab_size == 49152
    assert smollm2.pieces.token(2) == "<|im_end|>" and smollm2.eos_ids == {0, 2}


@pytest.mark.parametrize("token_id", [-1, 49152, 1 << 40])
def test_an_id_outside_the_vocabulary_is_no_text(smollm2: Tokenizer, token_id: int) -> None:
    assert smollm2.pieces.token(token_id) is None and smollm2.decode([token_id]) == ""
    assert smollm2.decode([19556, token_id]) == "Hello"


def test_a_lone_surrogate_is_a_typed_error(smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError, match="valid Unicode"):
        smollm2.encode("a\ud800b")


@pytest.mark.parametrize(
    "messages", [[], [3], [{}], [{"content": "x"}], [{"role": 1, "content": "x"}], [{"role": "user"}], None]
)
def test_wrong_messages_are_a_typed_error(smollm2: Tokenizer, messages: Any) -> None:
    with pytest.raises(LineshaftError) as caught:
        smollm2.chat(messages)
    assert isinstance(caught.value, ChatError) and "\n" not in str(caught.value)
