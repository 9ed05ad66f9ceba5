"""Text that comes token by token is the text of all tokens, never with half a character."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.tokenizer import Detokenizer, Tokenizer
from lineshaft.tokenizer.from_gguf import read_metadata
from lineshaft.tokenizer.pieces import Pieces


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    return [*map(detokenizer.feed, ids), detokenizer.finish()]


def spellable(tokenizer: Tokenizer, text: str) -> str:
    """The characters that the vocabulary has all bytes of: SmolLM2's lacks some and drops what needs them."""
    known = set(b"".join(map(tokenizer.pieces.piece, range(tokenizer.vocab_size))))
    return "".join(char for char in text if known.issuperset(char.encode()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(drawn=st.text())
def test_valid_text_comes_whole(smollm2: Tokenizer, drawn: str) -> None:
    text = spellable(smollm2, drawn)
    parts = stream(smollm2, smollm2.encode(text), skip=False)
    assert "".join(parts) == text
    assert "\ufffd" in text or all("\ufffd" not in part for part in parts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(-1, 49160), max_size=40), skip=st.booleans())
def test_any_ids_come_as_decode_gives_them(smollm2: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(stream(smollm2, ids, skip)) == smollm2.decode(ids, skip)


def test_a_character_of_several_tokens_comes_with_its_last(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("\U0001f9ff")
    assert len(ids) > 1
    assert stream(smollm2, ids) == [""] * (len(ids) - 1) + ["\U0001f9ff", ""]


def test_a_character_cut_short_comes_at_the_end(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("\U0001f9ff")[:-1]
    assert stream(smollm2, ids)[:-1] == [""] * len(ids) and stream(smollm2, ids)[-1] == "\ufffd"


def test_spaces_between_words_are_kept(smollm2: Tokenizer) -> None:
    assert stream(smollm2, smollm2.encode("  a b")) != ["a b"]
    assert "".join(stream(smollm2, smollm2.encode("  a b"))) == "  a b"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(alphabet="helo wrd\u00e9\u20ac\U0001f9ff\n"))
def test_sentencepiece_text_comes_whole(text: str) -> None:
    tokenizer = Tokenizer(read_metadata(SPM))
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == text
    assert tokenizer.decode(ids) == text
    assert all("\ufffd" not in part for part in stream(tokenizer, ids))


def test_each_token_is_looked_up_once(smollm2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a token does not grow with what came before: one piece is decoded for one token."""
    asked: list[int] = []
    piece = Pieces.piece
    monkeypatch.setattr(Pieces, "piece", lambda self, token: (asked.append(token), piece(self, token))[1])
    detokenizer = Detokenizer(smollm2)
    ids = [28] * 500
    for token_id in ids:
        detokenizer.feed(token_id)
    assert asked == ids


def _spm() -> dict[str, Any]:
    from pathlib import Path
    from runpy import run_path

    metadata: dict[str, Any] = run_path(str(Path(__file__).with_name("conftest.py")))["spm_metadata"]()
    return metadata


SPM = _spm()
