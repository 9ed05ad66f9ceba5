"""A packed sampling step: every row has its own filters and draws, whoever stands beside it; greedy rows stay zero."""

from __future__ import annotations

import numpy as np

from lineshaft.sampling import SamplingParams
from lineshaft.sampling.draw import draws
from lineshaft.sampling.pack import pack_sampling

HOT = SamplingParams(temperature=0.7, top_k=5, seed=42)
COLD = SamplingParams(temperature=0.0, seed=1)


def test_greedy_rows_alone_need_no_sampling() -> None:
    assert pack_sampling([COLD, COLD], [0, 0], [1, 2], 4) is None


def test_inputs_depend_on_the_row_alone() -> None:
    alone, among = pack_sampling([HOT], [2], [3], 1), pack_sampling([COLD, HOT], [0, 2], [9, 3], 4)
    assert alone is not None and among is not None
    assert alone["u"][0, 0] == among["u"][1, 0] == draws([42], [2], [3], 0, 0)[0]
    assert among["temperature"].tolist() == [0.0, np.float32(0.7), 0.0, 0.0]
    assert among["top_k"].tolist() == [0, 5, 0, 0]
    assert among["top_p"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert among["u"][[0, 2, 3]].tolist() == [[0.0]] * 3


def test_typical_p_is_packed_where_some_row_has_one() -> None:
    plain, typical = (
        pack_sampling([HOT], [0], [1], 2),
        pack_sampling([HOT, SamplingParams(typical_p=0.5, seed=0)], [0, 0], [1, 1], 2),
    )
    assert plain is not None and typical is not None
    assert "typical_p" not in plain.views
    assert typical["typical_p"].tolist() == [1.0, 0.5]
