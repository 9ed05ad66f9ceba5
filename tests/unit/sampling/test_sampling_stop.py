"""StopStrings: chunk borders do not matter, nothing unsafe is shown, nothing is lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.sampling import StopStrings

texts = st.text("abc", max_size=30)
stops_strategy = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def cut_whole(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: walk the text to the first place at which a stop string ends; the longest one there counts."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(derandomize=True, max_examples=1000)
@given(texts, stops_strategy, st.booleans(), st.lists(st.integers(0, 30), max_size=8))
def test_any_chunks_equal_cutting_the_whole(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    whole, stop = cut_whole(text, stops, include)
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stream = StopStrings(stops, include)
    shown = ""
    for start, end in pairwise(borders):
        safe, hit = stream.feed(text[start:end])
        shown += safe
        assert whole.startswith(shown)
        assert hit == (cut_whole(text[:end], stops, include)[1] is not None)
    shown += stream.flush()
    assert shown == whole and stream.hit == stop


@settings(derandomize=True, max_examples=300)
@given(texts, stops_strategy)
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    shown, hit = stream.feed(text)
    if not hit:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stops_text_passes_at_once() -> None:
    stream = StopStrings(())
    assert stream.feed("text") == ("text", False) and stream.flush() == "" and stream.hit is None


def test_after_a_hit_nothing_more_is_shown() -> None:
    stream = StopStrings(["##"], include=True)
    assert stream.feed("a#") == ("a", False)
    assert stream.feed("#b") == ("##", True)
    assert stream.feed("more") == ("", True) and stream.flush() == "" and stream.hit == "##"
