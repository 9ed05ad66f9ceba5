"""Traces of requests: the public formats as they are, generated ones from a seed, and bad lines named, not guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.errors import InvalidValue, LineshaftError
from lineshaft_bench.errors import TraceFileError
from lineshaft_bench.traces import Trace, read_trace
from lineshaft_bench.traces.arrivals import MOST_TOKENS
from lineshaft_bench.traces.formats import BadLine, parser_of

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines, objects as JSON, into a file; returns its name."""

    def put(*lines: Any) -> str:
        file = tmp_path / "trace"
        file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return str(file)

    return put


def sizes(trace: Trace) -> list[tuple[float, int, int]]:
    return [(arrival.at, arrival.prompt_tokens, arrival.output_tokens) for arrival in trace.arrivals]


# ---- Azure -----------------------------------------------------------------------------------------------------------


def test_azure_2023_has_dates_of_seven_digits_without_an_offset(write: Write) -> None:
    trace = read_trace(write(AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"))
    assert sizes(trace) == [(0.0, 374, 44), (pytest.approx(4.314579, abs=1e-5), 396, 109)]


def test_azure_2024_has_dates_with_an_offset_and_some_without_a_fraction(write: Write) -> None:
    lines = ("2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 00:00:01+00:00,2399,6")
    trace = read_trace(write(AZURE, *lines))
    assert sizes(trace) == [(0.0, 2162, 5), (pytest.approx(0.99007, abs=1e-5), 2399, 6)]


def test_azure_prompts_share_nothing(write: Write) -> None:
    first, second = read_trace(write(AZURE, *["2023-11-16 18:15:46,100,1"] * 2)).arrivals
    assert set(first.token_ids()).isdisjoint(second.token_ids())


def test_columns_are_found_by_their_names(write: Write) -> None:
    trace = read_trace(write("id,GeneratedTokens,TIMESTAMP,ContextTokens", "7,44,2023-11-16 18:15:46,374"))
    assert sizes(trace) == [(0.0, 374, 44)]


# ---- Mooncake --------------------------------------------------------------------------------------------------------


def mooncake(at: int, tokens: int, hash_ids: list[int], out: int = 5) -> dict[str, Any]:
    return {"timestamp": at, "input_length": tokens, "output_length": out, "hash_ids": hash_ids}


def test_mooncake_blocks_become_shared_tokens(write: Write) -> None:
    trace = read_trace(write(mooncake(0, 1100, [0, 1, 2]), mooncake(3000, 1600, [0, 1, 5, 6])))
    first, second = (arrival.token_ids() for arrival in trace.arrivals)
    assert (len(first), len(second)) == (1100, 1600)
    assert first[:1024] == second[:1024]
    assert set(first[1024:]).isdisjoint(second)
    assert trace.arrivals[1].at == 3.0


def test_mooncake_tokens_past_the_last_block_are_nobodys(write: Write) -> None:
    """Some writers name whole blocks only."""
    first, second = read_trace(write(mooncake(0, 600, [0]), mooncake(0, 600, [0]))).arrivals
    assert first.token_ids()[:512] == second.token_ids()[:512]
    assert set(first.token_ids()[512:]).isdisjoint(second.token_ids()[512:])


def test_huge_hash_ids_are_names_like_any_other(write: Write) -> None:
    first, second = read_trace(write(mooncake(0, 512, [2**200]), mooncake(0, 512, [2**200]))).arrivals
    assert first.token_ids() == second.token_ids()
    assert max(first.token_ids()) < 2**31


# ---- our own ---------------------------------------------------------------------------------------------------------


def test_own_lines_name_blocks_replies_priorities_and_deadlines(write: Write) -> None:
    first = {"arrival_s": 1, "prompt_tokens": 10, "output_tokens": 4, "blocks": [["system", 6]], "reply": "r"}
    second = {
        "arrival_s": 2.5, "prompt_tokens": 14, "output_tokens": 1, "blocks": [["system", 6], ["r", 4]],
        "priority": 3, "deadline_s": 2,
    }  # fmt: skip
    a, b = read_trace(write(first, second)).arrivals
    assert (a.at, b.at, b.priority, b.deadline_s) == (0.0, 1.5, 3, 2.0)
    assert a.token_ids()[:6] == b.token_ids()[:6]
    assert b.token_ids()[6:10] == (a.reply,) * 4


# ---- generated -------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_requests_and_another_seed_others() -> None:
    text = "poisson:rate=4,requests=50,prompt=lognormal(512,1),output=uniform(1,9)"
    assert read_trace(text, seed=1) == read_trace(text, seed=1) != read_trace(text, seed=2)


@pytest.mark.parametrize("kind", ["poisson", "bursty", "constant"])
def test_requests_come_at_the_rate(kind: str) -> None:
    trace = read_trace(f"{kind}:rate=5,requests=4000,prompt=10,output=200")
    assert trace.seconds == pytest.approx(800, rel=0.2)
    assert {(arrival.prompt_tokens, arrival.output_tokens) for arrival in trace.arrivals} == {(10, 200)}


def test_bursts_are_burstier() -> None:
    def spread(kind: str) -> float:
        arrivals = read_trace(f"{kind}:rate=1,requests=2000").arrivals
        gaps = [b.at - a.at for a, b in pairwise(arrivals)]
        return sum((gap - 1) ** 2 for gap in gaps) / len(gaps)

    assert spread("bursty") > 2 * spread("poisson") > 1 > spread("constant")


def test_a_prefix_is_shared_by_the_requests_of_its_group() -> None:
    trace = read_trace("poisson:requests=40,prompt=8,prefix=100,prefixes=2")
    prefixes = {arrival.token_ids()[:100] for arrival in trace.arrivals}
    assert len(prefixes) == 2
    assert len({arrival.token_ids() for arrival in trace.arrivals}) == 40


def test_each_turn_of_a_chat_repeats_all_that_was_said() -> None:
    trace = read_trace("chat:rate=1,requests=60,turns=5,system=64")
    at = [arrival.at for arrival in trace.arrivals]
    assert at == sorted(at)
    said = {(*arrival.prompt, (arrival.reply, arrival.output_tokens)) for arrival in trace.arrivals}
    later = [arrival for arrival in trace.arrivals if len(arrival.prompt) > 2]
    assert later
    assert all(arrival.prompt[:-1] in said for arrival in later)


@pytest.mark.parametrize(
    "text",
    [
        "poisson:rate=0", "poisson:rate=x", "poisson:colour=1", "poisson:prompt=zipf(1)", "poisson:prompt=lognormal(1)",
        "poisson:prompt=exponential(0)", "poisson:rate=1;", "chat:prefix=3", "poisson:requests=inf", "poisson:rate=nan",
        "poisson:prompt=nan", "poisson:output=inf", "poisson:prompt=-5", "poisson:prompt=0", "poisson:requests=0.5",
        "poisson:requests=1e12", "poisson:prefixes=1e12", "poisson:prefix=1e12", "poisson:prefix=-1",
        "chat:system=1e12",
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidValue):
        read_trace(text)


def test_the_far_tail_of_a_distribution_is_cut() -> None:
    found = read_trace("poisson:requests=40,prompt=lognormal(5,1e12)").arrivals
    assert {arrival.prompt_tokens for arrival in found} == {1, MOST_TOKENS}


def test_a_session_of_endless_turns_ends_with_the_trace() -> None:
    found = read_trace("chat:requests=20,turns=1e12").arrivals
    assert len(found) == 20


def test_faster_keeps_the_requests_and_shortens_the_time() -> None:
    trace = read_trace("poisson:rate=1,requests=9")
    quick = trace.faster(4)
    assert quick.seconds == pytest.approx(trace.seconds / 4)
    assert [a.prompt for a in quick.arrivals] == [a.prompt for a in trace.arrivals]


def test_limit_takes_the_first_and_reads_no_further(write: Write) -> None:
    name = write(AZURE, "2023-11-16 18:15:46,1,1", "2023-11-16 18:15:47,2,1", "garbage")
    assert len(read_trace(name, limit=2).arrivals) == 2


# ---- what is wrong ---------------------------------------------------------------------------------------------------

BAD_AZURE = [
    "2023-11-16 18:15:48,374", "2023-11-16 18:15:48,374,x", "yesterday,1,1", "2023-11-16 18:15:48,0,1",
    "2023-11-16 18:15:48,1,0", "2023-11-16 18:15:48,-5,1", "2023-11-16 18:15:48,1e3,1", "99999-01-01 00:00:00,1,1",
    f"2023-11-16 18:15:48,{10**30},1", "\x00\xff\x00", "2023-11-16 18:15:40,1,1", ",,",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_AZURE)
def test_a_bad_line_is_named_with_file_and_number(line: str, write: Write) -> None:
    name = write(AZURE, "2023-11-16 18:15:46,7,3", "2023-11-16 18:15:47,7,3", line, "2023-11-16 18:15:49,8,3")
    with pytest.raises(TraceFileError, match=f"{name}:4: .*--skip-bad"):
        read_trace(name)
    kept = read_trace(name, skip_bad=True)
    assert (kept.skipped, [at for at, _, _ in sizes(kept)]) == (1, [0.0, 1.0, 3.0])


GOOD = mooncake(1000, 10, [1])
BAD_MOONCAKE = [
    "{", "[]", "7", "null", GOOD | {"timestamp": -1}, GOOD | {"timestamp": None}, GOOD | {"timestamp": True},
    GOOD | {"timestamp": 1e300}, GOOD | {"timestamp": 10**400}, GOOD | {"input_length": 2.5},
    GOOD | {"input_length": 10**18}, GOOD | {"hash_ids": 4}, GOOD | {"hash_ids": [[]]}, {"timestamp": 1000},
    '{"timestamp": NaN, "input_length": 1, "output_length": 1}', "9" * 5000, "[" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_MOONCAKE, ids=lambda line: str(line)[:30])
def test_a_bad_object_is_named_with_file_and_number(line: Any, write: Write) -> None:
    name = write(GOOD, line, GOOD)
    with pytest.raises(TraceFileError, match=f"{name}:2: "):
        read_trace(name)
    assert read_trace(name, skip_bad=True).skipped == 1


@pytest.mark.parametrize(
    "field", [{"priority": "high"}, {"deadline_s": -1}, {"blocks": [1]}, {"blocks": [["a", 0]]}, {"arrival_s": "1"}]
)
def test_a_bad_own_line_is_refused(field: dict[str, Any], write: Write) -> None:
    with pytest.raises(TraceFileError, match=":1: "):
        read_trace(write({"arrival_s": 0, "prompt_tokens": 4, "output_tokens": 4} | field))


@pytest.mark.parametrize("lines", [(), ("",), (AZURE,), (AZURE, "x")])
def test_a_trace_without_a_request_is_an_error(lines: tuple[str, ...], write: Write) -> None:
    with pytest.raises(TraceFileError):
        read_trace(write(*lines), skip_bad=True)


@pytest.mark.parametrize("first", ["hello", "[" * 100_000, "{}", '{"a": 1}', "a,b,c", "\x7fELF"])
def test_an_unknown_format_says_which_are_known(first: str, write: Write) -> None:
    with pytest.raises(TraceFileError, match=r"ContextTokens.*input_length.*arrival_s"):
        read_trace(write(first))


@pytest.mark.parametrize("name", ["/nowhere/trace.csv", "/tmp", "poissson:rate=1", ""])
def test_a_file_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(TraceFileError):
        read_trace(name)


@settings(max_examples=200, deadline=None)
@given(first=st.sampled_from([AZURE, json.dumps(GOOD), '{"arrival_s": 0}']), line=st.text(max_size=60))
def test_no_line_does_anything_but_parse_or_be_bad(first: str, line: str) -> None:
    found = parser_of(first)
    assert found is not None
    try:
        arrival = found[0](line)
    except BadLine:
        return
    assert arrival.prompt_tokens >= 1 and arrival.output_tokens >= 1


def test_errors_are_of_the_one_tree() -> None:
    assert issubclass(TraceFileError, LineshaftError)
