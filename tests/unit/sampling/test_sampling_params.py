"""SamplingParams: what is refused, and what form the accepted values take."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lineshaft.errors import InvalidSamplingParams
from lineshaft.sampling import SamplingParams

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
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_meaningless_value_is_refused_in_one_line_that_names_it(name: str, value: object) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{name} = ") and "give" in message
    assert "\n" not in message and len(message) < 250


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
    assert params.stop == params.stop_strings == ("end",)
    assert params.stop_token_ids == (3, 4) and type(params.stop_token_ids[1]) is int
    assert SamplingParams().stop == () and SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_equal_values_are_equal_and_hashable() -> None:
    assert SamplingParams(stop="a", top_k=-1) == SamplingParams(stop=["a"])
    assert len({SamplingParams(stop=["a"]), SamplingParams(stop="a")}) == 1


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=-0.0).greedy
    assert not SamplingParams(temperature=0.01).greedy
