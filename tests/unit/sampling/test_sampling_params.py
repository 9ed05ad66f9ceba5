"""SamplingParams: what is refused, and what form the accepted values take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import InvalidSamplingParams
from lineshaft.sampling import SamplingParams, Structured
from lineshaft.sampling.params import check_extras

REFUSED = [
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", -0.1),
    ("temperature", True),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", 10**400),
    ("top_p", 0.0),
    ("top_p", 1.0001),
    ("top_p", math.nan),
    ("top_p", False),
    ("top_k", -2),
    ("top_k", 1.0),
    ("top_k", True),
    ("top_k", 2**31),
    ("min_p", -0.1),
    ("min_p", 1.0),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", True),
    ("seed", 1.5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", 1]),
    ("stop", b"a"),
    ("stop", 3),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", "1"),
    ("stop_token_ids", 1),
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", None),
    ("max_tokens", True),
    ("logprobs", -1),
    ("logprobs", True),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", None),
    ("n", 0),
    ("n", None),
    ("best_of", 0),
    ("typical_p", 0.0),
    ("typical_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 101),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", math.nan),
    ("min_tokens", -1),
    ("prompt_logprobs", -1),
    ("truncate_prompt_tokens", 0),
    ("detokenize", 1),
    ("logit_bias", [1]),
    ("logit_bias", {1: 101}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", {"1": 1}),
    ("logit_bias", {1: "a"}),
    ("allowed_token_ids", 5),
    ("allowed_token_ids", [-1]),
    ("bad_words", "no"),
    ("bad_words", [""]),
    ("bad_words", [[]]),
    ("bad_words", [[1, "a"]]),
    ("structured", {"regex": "a"}),
    ("logits_processors", [3]),
    ("logits_processors", len),
]

CONTRADICTIONS: list[dict[str, Any]] = [
    {"n": 3, "best_of": 2},
    {"n": 2, "temperature": 0},
    {"best_of": 2, "temperature": 0},
    {"min_tokens": 5, "max_tokens": 4},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [1], "structured": Structured(regex="a")},
    {"min_tokens": 1, "structured": Structured(regex="a")},
    {"stop": "a", "detokenize": False},
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_meaningless_value_is_refused_in_one_line_that_names_it(name: str, value: object) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{name} = ") and "give" in message
    assert "\n" not in message and len(message) < 250


@pytest.mark.parametrize("settings", CONTRADICTIONS, ids=lambda settings: "+".join(settings))
def test_a_contradiction_is_refused_in_one_line_that_names_what_contradicts(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        SamplingParams(**settings)
    message = str(caught.value)
    assert all(name in message for name in settings if name not in ("n", "best_of")) and "\n" not in message
    assert len(message) < 200 and ("give" in message or "leave" in message)


@pytest.mark.parametrize(
    ("settings", "extras"),
    [
        ({}, {}),
        ({"temperature": 0, "typical_p": 0.5}, {}),
        ({"typical_p": 0.5}, {"typical_p": "typical_p"}),
        ({"min_tokens": 1, "bad_words": ["a"]}, {"edits": "min_tokens"}),
        (
            {"frequency_penalty": 1, "structured": Structured(regex="a")},
            {"edits": "frequency_penalty", "mask": "structured"},
        ),
        ({"logit_bias": {}, "bad_words": [], "repetition_penalty": 1}, {}),
    ],
)
def test_extras_name_what_needs_a_program_of_its_own(settings: Any, extras: dict[str, str]) -> None:
    params = SamplingParams(**settings)
    assert params.extras == extras
    check_extras(params, {})
    for kind, name in extras.items():
        with pytest.raises(InvalidSamplingParams, match=f"^{name} is not possible here: the reason$"):
            check_extras(params, {kind: "the reason"})


def test_extremes_that_mean_something_are_accepted() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=2**31 - 1, min_p=0, seed=2**64 - 1, logprobs=0, max_tokens=1)
    SamplingParams(temperature=1e30, top_p=1e-9, min_p=0.999, seed=0, stop=[], stop_token_ids=[0])


def test_values_are_normalised() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=1,
        top_k=-1,
        seed=np.uint64(7),  # type: ignore[arg-type]
        stop="end",
        stop_token_ids=[3, np.int64(4)],  # type: ignore[list-item]
    )
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 1.0, 0, 7)
    assert [type(x) for x in (params.temperature, params.top_p, params.seed)] == [float, float, int]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4) and type(params.stop_token_ids[1]) is int
    assert SamplingParams().stop == () and SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_collections_are_normalised() -> None:
    params = SamplingParams(logit_bias=None, allowed_token_ids={3, 1}, bad_words=["a", [1, 2]])  # type: ignore[arg-type]
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == ({}, (1, 3), ("a", (1, 2)))
    assert SamplingParams(logit_bias={np.int64(2): 1}).logit_bias == {2: 1.0}  # type: ignore[dict-item]
    assert (SamplingParams(n=2).width, SamplingParams(n=2, best_of=5).width) == (2, 5)


def test_equal_values_are_equal_and_hashable() -> None:
    assert len({SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias={1: 2})}) == 1
    assert SamplingParams(stop="a", top_k=-1) == SamplingParams(stop=["a"])
    assert len({SamplingParams(stop=["a"]), SamplingParams(stop="a")}) == 1


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=-0.0).greedy
    assert not SamplingParams(temperature=0.01).greedy
