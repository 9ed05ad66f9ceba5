"""What a benchmark is made of: the workloads' shapes, figures from moments, the timeline, the overhead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lineshaft_bench.errors import PlotError
from lineshaft_bench.figures import Ran
from lineshaft_bench.measure import simulated
from lineshaft_bench.overhead import overhead
from lineshaft_bench.plots import Bars, Curves, draw
from lineshaft_bench.simulator.cost import Linear
from lineshaft_bench.simulator.setup import Setting
from lineshaft_bench.stats import Percentiles, Spread
from lineshaft_bench.timeline import Recorder
from lineshaft_bench.workloads import AT_ONCE, WORKLOADS, Job, workload

VOCAB = 49152

# ---- workloads -------------------------------------------------------------------------------------------------------


def test_single_is_128_in_and_128_out() -> None:
    assert [(len(job.prompt), job.out) for round in workload("single", VOCAB).rounds for job in round] == [
        (128, 128)
    ] * 5


def test_offline_is_64_requests_of_8810_in_and_4546_out() -> None:
    rounds = workload("offline", VOCAB).rounds
    assert len(rounds) == 3
    for jobs in rounds:
        assert len(jobs) == 64
        assert (sum(len(job.prompt) for job in jobs), sum(job.out for job in jobs)) == (8810, 4546)


def test_prefill_is_2048_in_and_one_out() -> None:
    assert [(len(job.prompt), job.out) for (job,) in workload("prefill", VOCAB).rounds] == [(2048, 1)] * 3


def test_shared_is_32_requests_with_512_tokens_in_common() -> None:
    for jobs in workload("shared", VOCAB).rounds:
        assert len(jobs) == AT_ONCE == 32
        assert {(len(job.prompt), job.out) for job in jobs} == {(544, 32)}
        assert len({tuple(job.prompt[:512]) for job in jobs}) == 1
        assert len({tuple(job.prompt) for job in jobs}) == 32


@pytest.mark.parametrize("name", WORKLOADS)
def test_rounds_are_fresh_and_the_same_from_a_seed(name: str) -> None:
    one = workload(name, VOCAB, rounds=7)
    assert len(one.rounds) == 7 and one == workload(name, VOCAB, rounds=7)
    usual = workload(name, VOCAB).rounds
    assert one.rounds[: len(usual)] == usual
    prompts = [tuple(job.prompt) for round in (one.warmup, *one.rounds) for job in round]
    assert len(set(prompts)) == len(prompts)


def test_ids_are_within_the_vocabulary_and_no_special_ones() -> None:
    ids = {id for job in workload("offline", VOCAB).rounds[0] for id in job.prompt}
    assert min(ids) >= 100 and max(ids) < VOCAB
    assert max(id for job in workload("offline", 300).rounds[0] for id in job.prompt) < 300


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_latencies_are_what_the_moments_say() -> None:
    ran = Ran([Job([1] * 10, 3), Job([1] * 30, 2, at=0.5)], [[1.0, 1.1, 1.3], [2.5, 3.0]])
    assert ran.ttft == [1.0, 2.0]
    assert ran.itl == pytest.approx([0.1, 0.2, 0.5])
    assert ran.tpot == pytest.approx([0.15, 0.5])
    figures = ran.figures()
    assert figures["ttft_ms"] == 1500.0
    assert figures["output_tokens_per_s"] == pytest.approx(5 / 3)
    assert figures["prompt_tokens_per_s"] == pytest.approx(40 / 2.5)
    assert figures["wall_s"] == 3.0


def test_a_single_token_has_no_latency_between_tokens() -> None:
    assert "tpot_ms" not in Ran([Job([1], 1)], [[0.5]]).figures()


def test_percentiles_and_spread() -> None:
    found = Percentiles.of([float(n) for n in range(1, 102)])
    assert (found.p50, found.p90, found.p99, found.most, found.mean) == (51, 91, 100, 101, 51)
    assert Percentiles.of([]) == Percentiles()
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_round_can_be_simulated_in_the_place_of_an_engine() -> None:
    from lineshaft.scheduler import Limits

    jobs = [Job([5, 6, 7], 3, at=2.0), Job([8], 2)]
    ran = simulated(jobs, Setting(Limits(64, 8, 64), (50,)), Linear(1.0))
    assert list(map(list, ran.stamps)) == [[3.0, 4.0, 5.0], [1.0, 2.0]]


# ---- the timeline ----------------------------------------------------------------------------------------------------


def test_a_timeline_is_what_the_viewers_read(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.span("run", 10.002, 10.004, rows=3, tokens=9)
    recorder.span("schedule", 10.0, 10.0015)
    recorder.span("schedule", 10.0045, 10.005)
    recorder.write(tmp_path / "t.json")
    made = json.loads((tmp_path / "t.json").read_text())
    spans = [event for event in made["traceEvents"] if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in made["traceEvents"] if event["ph"] == "M"}
    assert [(event["name"], names[event["tid"]]) for event in spans] == [
        ("schedule", "host"), ("run", "device"), ("schedule", "host"),
    ]  # fmt: skip
    assert spans[1]["ts"] == pytest.approx(2000) and spans[1]["dur"] == pytest.approx(2000)
    assert spans[1]["args"] == {"rows": 3, "tokens": 9}
    assert recorder.seconds() == pytest.approx({"run": 0.002, "schedule": 0.002})


def test_an_empty_timeline_is_still_one(tmp_path: Path) -> None:
    Recorder().write(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


# ---- the overhead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_the_engine_steps_over_an_executor_that_answers_at_once(overlap: str) -> None:
    found = overhead(4, overlap)
    assert found.rows == 4
    assert {"schedule", "prepare", "run", "sample", "commit"} <= set(found.phases_ms)
    assert 0 < found.step_ms < 1000


# ---- plots -----------------------------------------------------------------------------------------------------------

PANELS = [
    Curves("latency", "seconds", {"a": [0.1, 0.2, 0.4], "b": [0.0, 1.0], "c": []}),
    Bars("rates", "tokens/s", {"a": {"in": 3.0}, "b": {"in": 1.0, "out": 2.0}}, {"b": {"in": (0.5, 1.5)}}),
    Curves("empty", "seconds", {"a": []}),
]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plots_are_drawn(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"p.{ending}"
    draw(PANELS, "title", file)
    assert file.stat().st_size > 5000


def test_a_format_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(PlotError, match="png"):
        draw(PANELS, "title", tmp_path / "p.docx")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"lineshaft-bench\[plot\]"):
        draw(PANELS, "title", tmp_path / "p.png")
