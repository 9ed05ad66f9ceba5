"""The best table of buckets: as good as any, never worse than powers of two; and the command that prints it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.cli import main as entry
from lineshaft.errors import InvalidValue
from lineshaft.runner.buckets import padding_share
from lineshaft_bench.cli import buckets as command
from lineshaft_bench.errors import TraceFileError
from lineshaft_bench.padding import MOST_BUCKETS, Lengths, best_table, choose, powers_table, read_lengths

AZURE_2023 = (
    2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315, 1876, 2734, 4083, 14050,
)  # fmt: skip
"""Every 5 % a quantile of the prompts' tokens in AzureLLMInferenceTrace_conv.csv, the public trace of conversations of
2023 (https://github.com/Azure/AzurePublicDataset)."""
WHOLE = st.lists(st.integers(0, 20), min_size=1, max_size=14).filter(lambda weights: weights[-1] > 0)
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: object) -> str:
        file = tmp_path / "lengths.txt"
        file.write_text("".join(f"{line}\n" for line in lines))
        return str(file)

    return write


def positions(table: Sequence[int], weights: Sequence[float]) -> float:
    """What all lengths take when each is padded to the next of the table."""
    return sum(min(n for n in table if n >= length) * weight for length, weight in enumerate(weights, start=1))


def fewest(weights: Sequence[float], buckets: int, multiple: int) -> float:
    """Of all tables of multiples that hold every length."""
    largest = -(-len(weights) // multiple) * multiple
    below = range(multiple, largest, multiple)
    return min(positions((*some, largest), weights) for some in combinations(below, buckets - 1))


def different(weights: Sequence[float], multiple: int) -> int:
    return len({-(-length // multiple) for length, weight in enumerate(weights, start=1) if weight})


# ---- the table -----------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(weights=WHOLE, multiple=st.integers(1, 5), data=st.data())
def test_no_table_of_as_many_buckets_pads_less(weights: list[int], multiple: int, data: st.DataObject) -> None:
    buckets = data.draw(st.integers(1, different(weights, multiple)))
    table = best_table(np.array(weights, float), buckets, multiple)
    assert len(table) == buckets and all(a < b for a, b in pairwise(table))
    assert all(size % multiple == 0 for size in table) and table[-1] - multiple < len(weights) <= table[-1]
    assert positions(table, weights) == fewest(weights, buckets, multiple)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60), multiple=st.sampled_from([1, 3, 16, 128]),
    data=st.data(),
)  # fmt: skip
def test_it_is_never_worse_than_powers_of_two(lengths: list[int], multiple: int, data: st.DataObject) -> None:
    weights = np.bincount(lengths)[1:].astype(float)
    choice = choose(Lengths("", weights), data.draw(st.integers(1, different(list(weights), multiple))), multiple)
    assert len(choice.powers) <= len(choice.table) and choice.powers[-1] == choice.table[-1]
    assert all(size % multiple == 0 for size in choice.powers)
    assert choice.share <= choice.powers_share and choice.ratio <= 1


def test_one_bucket_more_never_pads_more() -> None:
    weights = read_lengths("lognormal:median=60,sigma=1,high=400").weights
    shares = [padding_share(best_table(weights, buckets), weights) for buckets in range(1, 40)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 3 * shares[-1]


def test_as_many_buckets_as_lengths_pad_nothing() -> None:
    choice = choose(Lengths("", np.array([1.0, 0, 0, 2, 0, 1])), 3)
    assert (choice.table, choice.share, choice.powers) == ((1, 4, 6), 0.0, (2, 4, 6))
    one = choose(Lengths("", np.array([0.0, 1])), 1)
    assert (one.table, one.share, one.ratio) == ((2,), 0.0, 1.0)


def test_the_longest_length_has_a_bucket_though_it_be_as_unlikely_as_can_be() -> None:
    lengths = read_lengths("lognormal:median=20,sigma=0.1,high=500")
    assert lengths.weights[-1] == 0
    assert best_table(lengths.weights, 2)[-1] == 500


def test_powers_of_two_are_the_largest_ones_up_to_the_same_size() -> None:
    assert powers_table(2048, 3) == (512, 1024, 2048)
    assert powers_table(300, 4) == (64, 128, 256, 300)
    assert powers_table(96, 9, 24) == (24, 48, 96)


def test_uniform_lengths_get_equal_steps() -> None:
    assert best_table(np.ones(2048), 8) == tuple(range(256, 2049, 256))


def test_a_long_table_of_many_lengths() -> None:
    weights = np.random.default_rng(7).random(1 << 15)
    table = best_table(weights, 24, 16)
    assert len(table) == 24 and table[-1] == 1 << 15
    nudged = [
        sorted({*table[:i], size + step, *table[i + 1 :]}) for i, size in enumerate(table[:-1]) for step in (-16, 16)
    ]
    assert all(padding_share(table, weights) <= padding_share(other, weights) for other in nudged)


@pytest.mark.parametrize("buckets", [0, -1, 4, 10**30])
def test_a_number_of_buckets_that_cannot_be_is_refused_with_what_can(buckets: int) -> None:
    with pytest.raises(InvalidValue, match=r"buckets = .*there are 3 different lengths; give a number from 1 to 3"):
        best_table(np.array([1.0, 0, 2, 1]), buckets)


def test_too_many_buckets_or_lengths_are_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidValue, match=f"from 1 to {MOST_BUCKETS}$"):
        best_table(np.ones(1000), MOST_BUCKETS + 1)
    with pytest.raises(InvalidValue, match=r"multiples of 500; give a number from 1 to 2$"):
        best_table(np.ones(1000), 3, 500)
    with pytest.raises(InvalidValue, match="a multiple of 3 or more"):
        best_table(np.ones(300_000), 4)
    assert best_table(np.ones(300_000), 1, 3) == (300_000,)


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_a_lognormal_is_what_drawing_gives() -> None:
    found = read_lengths("lognormal:median=30,sigma=0.7,high=100").weights
    drawn = np.round(30 * np.random.default_rng(1).lognormal(0, 0.7, 400_000))
    kept = np.bincount(drawn[(drawn >= 1) & (drawn <= 100)].astype(int), minlength=101)[1:]
    assert np.abs(np.cumsum(found / found.sum()) - np.cumsum(kept / kept.sum())).max() < 0.005


def test_lengths_come_from_a_file_of_them_or_from_the_prompts_of_a_trace(write: Write) -> None:
    assert list(read_lengths(write(3, "", 1, " 3 ")).weights) == [1, 0, 2]
    trace = write("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,2,9", "2023-11-16 18:15:47,4,9")
    assert list(read_lengths(trace).weights) == [0, 1, 0, 1]
    assert list(read_lengths("poisson:requests=5,prompt=3").weights) == [0, 0, 5]


def test_bad_lines_are_left_out_where_asked(write: Write) -> None:
    name = write(3, "x", -4, 2.5, 1)
    with pytest.raises(TraceFileError, match=r"lengths.txt:2: length = 'x': .*whole number from 1.*--skip-bad"):
        read_lengths(name)
    found = read_lengths(name, skip_bad=True)
    assert (found.skipped, list(found.weights)) == (3, [1, 0, 1])


@pytest.mark.parametrize(
    "text",
    [
        "uniform:", "uniform:low=5,high=4", "uniform:high=0", "uniform:high=2.5", "uniform:high=1e12", "uniform:high=x",
        "uniform:high=5,median=2", "lognormal:median=5,high=9", "lognormal:median=0,sigma=1,high=9",
        "lognormal:median=5,sigma=0,high=9", "lognormal:median=5,sigma=nan,high=9",
        "lognormal:median=1e9,sigma=0.1,high=9", "poisson:prompt=0",
    ],
)  # fmt: skip
def test_a_wrong_distribution_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidValue, match=text.partition(":")[0]):
        read_lengths(text)


@pytest.mark.parametrize("lines", [(), ("", " "), ("hello",), (0,), (-3,), (2.5,), (10**30,), ("9" * 5000,), ("1,2",)])
def test_a_file_without_good_lengths_is_an_error(lines: tuple[object, ...], write: Write) -> None:
    with pytest.raises(TraceFileError, match=r"lengths\.txt"):
        read_lengths(write(*lines))
    with pytest.raises(TraceFileError, match=r"no (length|request) in it"):
        read_lengths(write(*lines), skip_bad=True)


@pytest.mark.parametrize("name", ["/nowhere/lengths.txt", "/tmp", "", "zipf:a=1", "nul\0"])
def test_a_file_that_is_not_there_is_an_error_that_says_what_to_give(name: str) -> None:
    with pytest.raises(TraceFileError, match="uniform, lognormal"):
        read_lengths(name)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lineshaft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line with this command; returns its status, stdout and stderr."""
    monkeypatch.setattr(entry, "further_commands", lambda: {"buckets": command})

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = entry.main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def trace_like(quantiles: Sequence[int]) -> list[int]:
    """Lengths with these evenly spaced quantiles, and even between two of them."""
    spots = np.linspace(0, len(quantiles) - 1, 5000)
    return [int(length) for length in np.interp(spots, np.arange(len(quantiles)), quantiles)]


@pytest.mark.parametrize(
    ("name", "most"),
    [("uniform:high=2048", 0.45), ("lognormal:median=512,sigma=1,high=8192", 0.76), ("azure", 0.6)],
)
def test_the_ratio_to_powers_of_two_is_printed(name: str, most: float, write: Write, lineshaft: Any) -> None:
    given = write(*trace_like(AZURE_2023)) if name == "azure" else name
    status, out, err = lineshaft("buckets", "--lengths", given, "--buckets", "8")
    (line,) = (line for line in out.splitlines() if line.startswith("# ratio to powers of two: "))
    assert (status, err) == (0, "") and 0 < float(line.rpartition(" ")[2]) < most <= 1
    print(name, line)


def test_what_it_prints_is_a_configuration(lineshaft: Any, write: Write) -> None:
    status, out, _ = lineshaft(
        "buckets", "--lengths", write(5, 5, 5, 17, "bad", 40), "--buckets", "2", "--multiple-of", "8", "--skip-bad"
    )
    assert status == 0 and "1 bad lines" in out
    table = {"prefill_buckets": [8, 40]}
    assert tomllib.loads(out) == {"backend_options": table, "scheduler": {"token_budget": 40}}


def test_json_has_tables_shares_and_ratio(lineshaft: Any) -> None:
    status, out, _ = lineshaft("buckets", "--lengths", "uniform:high=8", "--buckets", "2", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["prefill_buckets"], found["powers_of_two"], found["longest"]) == ([4, 8], [4, 8], 8)
    assert found["padding_share"] == found["powers_of_two_share"] == pytest.approx(0.25)
    assert found["ratio"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("--buckets", "2"), ("--lengths", "uniform:high=8"), ("--lengths", "uniform:high=8", "--buckets", "0"),
        ("--lengths", "uniform:high=8", "--buckets", "9"), ("--lengths", "uniform:high=8", "--buckets", "-1"),
        ("--lengths", "uniform:high=8", "--buckets", "2.5"), ("--lengths", "uniform:high=8", "--buckets", "9" * 40),
        ("--lengths", "uniform:high=8", "--buckets", "2", "--multiple-of", "0"),
        ("--lengths", "uniform:high=8", "--buckets", "2", "--multiple-of", "16"),
        ("--lengths", "uniform:high=900000", "--buckets", "2"), ("--lengths", "/nowhere", "--buckets", "2"),
        ("--lengths", "/dev/null", "--buckets", "2"), ("--lengths", "uniform:height=8", "--buckets", "2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_status_2(arguments: tuple[str, ...], lineshaft: Any) -> None:
    status, out, err = lineshaft("buckets", *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("lineshaft: error: ")
