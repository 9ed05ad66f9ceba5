"""The samples of a prompt, read while another thread feeds them."""

from __future__ import annotations

from typing import cast

from lineshaft.frontend.group import Group
from lineshaft.frontend.prompts import Ask
from lineshaft.outputs import StreamDelta
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Request
from lineshaft.tokenizer import Tokenizer


def test_the_output_comes_although_the_last_delta_was_taken_just_before_the_end_was_marked() -> None:
    params = SamplingParams(detokenize=False)
    group = Group(Ask([1], None, params), [Request(7, (1,), params)], cast(Tokenizer, None), None, streamed=True)
    (text,) = group.texts
    text.pending.append(StreamDelta(7, "", (5,), "length"))
    assert [delta.output for delta in group.take()] == [None] and not group.read
    text.finish_reason = "length"
    (last,) = group.take()
    assert group.read and last.finish_reason == "length" and last.output is not None and last.output.finished
