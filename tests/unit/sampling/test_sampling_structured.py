"""Structured outputs: what comes out parses, the end comes with the last token, and no structure can hang an engine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import InvalidSamplingParams, InvalidStructure
from lineshaft.sampling import SamplingParams, Structured
from lineshaft.sampling.choice import Choice, make_choice
from lineshaft.sampling.pack import pack_adjust
from lineshaft.sampling.vocabulary import Vocabulary
from lineshaft.tokenizer import Tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "é"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}


def parses(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags", "next"] and len(value["name"]) <= 8 and 0 <= value["age"] <= 130
        and len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b c", "é"} and value["next"] in (None, True, False)
    )  # fmt: skip


def whole(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


KINDS: dict[str, tuple[Structured, Callable[[str], bool]]] = {
    "json": (Structured(json=SCHEMA), parses),
    "json text": (Structured(json=json.dumps(SCHEMA)), parses),
    "regex": (Structured(regex=r"[0-9]{3}-[a-zé]{2,6}"), whole(r"[0-9]{3}-[a-zé]{2,6}")),
    "open regex": (Structured(regex=r"(ab|c)+"), whole(r"(ab|c)+")),
    "choice": (Structured(choice=["yes", "yes, sir", "日本", '"q"']), {"yes", "yes, sir", "日本", '"q"'}.__contains__),
    "lark": (Structured(grammar='start: "<" /[a-c]{1,4}/ ">" ("!" | "?")'), whole(r"<[a-c]{1,4}>[!?]")),
    "gbnf": (Structured(grammar='root ::= "(" [0-9]+ ("," [0-9]+)* ")"'), whole(r"\([0-9]+(,[0-9]+)*\)")),
    "special": (Structured(choice=["<|im_end|>", "<|im_start|>x"]), {"<|im_end|>", "<|im_start|>x"}.__contains__),
}


def started(structured: Structured, vocabulary: Vocabulary) -> Choice:
    choice = make_choice(SamplingParams(structured=structured), [1], vocabulary.size, vocabulary.eos_ids, vocabulary)
    assert choice is not None
    return choice


def allowed(choice: Choice, vocabulary: Vocabulary) -> Any:
    [host] = pack_adjust([choice], 1, vocabulary.size)
    return np.flatnonzero(np.unpackbits(host["mask"][0].view(np.uint8), bitorder="little"))


def generate(structured: Structured, vocabulary: Vocabulary, seed: int, most: int = 400) -> list[int] | None:
    """Random tokens among those allowed, rarely blank ones, up to the end; None where it does not come in time."""
    rng, choice = np.random.default_rng(seed), started(structured, vocabulary)
    ids: list[int] = []
    for _ in range(most):
        found = allowed(choice, vocabulary)
        assert len(found)
        piece = vocabulary._tokenizer.pieces.piece
        texts = np.array([int(token) for token in found if piece(int(token)).strip()])
        found = texts if len(texts) and rng.random() < 0.9 else found
        ends = [token for token in found if int(token) in vocabulary.eos_ids]
        token = int(ends[0]) if ends and rng.random() < 0.3 else int(rng.choice(found[rng.integers(0, len(found), 8)]))
        if token in vocabulary.eos_ids:
            return ids
        ids.append(token)
        if choice.token(token):
            return ids
    return None


@pytest.mark.parametrize("name", KINDS)
def test_what_a_random_model_writes_is_of_the_structure(name: str, vocabulary: Vocabulary, smollm2: Tokenizer) -> None:
    structured, right = KINDS[name]
    texts = []
    for seed in range(12):
        ids = generate(structured, vocabulary, seed)
        if ids is not None:
            assert not vocabulary._tokenizer.pieces.special_ids & set(ids)
            texts.append(smollm2.decode(ids))
    assert len(texts) >= 6 and len(set(texts)) > 1
    assert all(map(right, texts)), texts


def test_the_end_comes_with_the_last_token_where_nothing_may_follow(vocabulary: Vocabulary, smollm2: Tokenizer) -> None:
    choice = started(Structured(choice=["yes", "no"]), vocabulary)
    [token] = smollm2.encode("yes", add_special=False)
    assert choice.token(token)
    longer = started(Structured(choice=["yes", "yes!"]), vocabulary)
    assert not longer.token(token)
    assert vocabulary.eos_ids <= set(allowed(longer, vocabulary).tolist())


def test_masks_of_many_rows_are_those_of_each(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    choices = [started(KINDS[name][0], vocabulary) for name in KINDS] * 3
    mixed: list[Choice | None] = [
        None,
        *choices[: len(KINDS)],
        make_choice(SamplingParams(allowed_token_ids=[5]), [1], 49152),
    ]
    for _ in range(3):
        [host] = pack_adjust(mixed, len(mixed) + 2, vocabulary.size)
        mask = host["mask"].copy()
        assert (mask[0] == 0xFFFFFFFF).all()
        for row, choice in enumerate(mixed):
            if choice is not None and choice.grammar is not None:
                [alone] = pack_adjust([choice], 1, vocabulary.size)
                assert np.array_equal(alone["mask"][0], mask[row])
                found = allowed(choice, vocabulary)
                if choice.token(int(rng.choice(found))):
                    mixed[row] = None


def test_a_token_that_is_not_allowed_leaves_no_token(vocabulary: Vocabulary) -> None:
    choice = started(Structured(regex="[0-9]+"), vocabulary)
    assert not choice.token(5000)
    assert choice.grammar is not None and choice.grammar.failed
    assert len(allowed(choice, vocabulary)) == 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-ahead"),
    ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
    ({"json": {"$ref": "#"}}, "structured.json: nothing can be written that follows it"),
    ({"json": {"type": "nonsense"}}, "structured.json"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "structured.json"),
    ({"json": {"$ref": "http://localhost/schema.json"}}, "structured.json"),
    ({"grammar": "start: missing"}, "structured.grammar"),
    ({"grammar": "root ::= ("}, "structured.grammar"),
    ({"grammar": "start: start"}, "structured.grammar"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_wrong_structure_is_refused_in_one_line(given: Any, message: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidStructure, match=re.escape(message)) as caught:
        started(Structured(**given), vocabulary)
    assert isinstance(caught.value, InvalidSamplingParams)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350


@pytest.mark.parametrize(
    "given",
    [{}, {"regex": ""}, {"regex": 3}, {"json": "{"}, {"json": [1]}, {"choice": []}, {"choice": "yes"}, {"choice": [1]},
     {"regex": "a", "json": {}}, {"json": {"a": {1, 2}}}, {"regex": "a" * (1 << 20) + "b"}, {"choice": [""]}],
)  # fmt: skip
def test_nothing_twice_and_no_text_are_refused_when_made(given: Any) -> None:
    with pytest.raises(InvalidStructure, match="structured") as caught:
        Structured(**given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


HUGE = [
    {"regex": "(a*)*b"}, {"regex": "(a|aa)+$"}, {"regex": "(x+x+)+y"}, {"regex": "(a{1000}b){100000}"},
    {"regex": "[ab]*a[ab]{100000}"}, {"regex": "(.*a.*b.*c){30}"}, {"regex": "a{1000000000}"},
    {"json": {"enum": [f"x{i}" for i in range(60_000)]}}, {"choice": [f"{i * 7919}" for i in range(40_000)]},
    {"grammar": "start: s\ns: s s s | s s | \"a\""},
]  # fmt: skip


@pytest.mark.parametrize("given", HUGE, ids=lambda given: str(given)[:40])
def test_a_structure_that_explodes_is_followed_or_refused_in_bounded_time(given: Any, vocabulary: Vocabulary) -> None:
    """Each step too, for a few of them. The bound leaves a slow machine ten times what a quick one takes."""
    began = time.perf_counter()
    try:
        choice = started(Structured(**given), vocabulary)
    except InvalidStructure:
        choice = None
    for _ in range(4 if choice else 0):
        assert choice is not None
        found = allowed(choice, vocabulary)
        if not len(found) or choice.token(int(found[-1])):
            break
    assert time.perf_counter() - began < 15


def test_a_known_structure_is_compiled_once(smollm2: Tokenizer) -> None:
    vocabulary = Vocabulary(smollm2, 49152, smollm2.eos_ids)
    first = started(Structured(json=SCHEMA), vocabulary)
    for token in smollm2.encode('{"name": "A', add_special=False):
        first.token(token)
    second = started(Structured(json=json.dumps(SCHEMA)), vocabulary)
    assert vocabulary._compiled.cache_info().misses == 1
    assert not np.array_equal(allowed(first, vocabulary), allowed(second, vocabulary))


def test_a_model_without_an_end_token_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidStructure, match="no end-of-sequence token"):
        started(Structured(regex="a"), Vocabulary(smollm2, 49152, frozenset()))
