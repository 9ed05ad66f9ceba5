"""Comparisons as tables of text and as panels of a plot."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lineshaft.cli.table import table
from lineshaft_bench.figures import FIGURES
from lineshaft_bench.measure import BOUND, SHARES, Comparison
from lineshaft_bench.peers.client import OURS
from lineshaft_bench.plots import Bars, Curves
from lineshaft_bench.stats import Spread

HEADLINES = {
    "single": "tpot_ms",
    "offline": "output_tokens_per_s",
    "prefill": "prompt_tokens_per_s",
    "shared": "output_tokens_per_s",
}
"""The one figure of a workload that says most."""


def shown(found: Comparison) -> str:
    """A line for each figure: ours, the bound, and each peer, with ratios of ours to theirs; then notes."""
    header = (found.workload, OURS, BOUND, "ratio", *(word for name in found.others for word in (name, "ratio")))
    ours = found.engines[OURS].figures
    lines: list[Sequence[str]] = []
    for key, (label, _) in FIGURES.items():
        if key in ours:
            line = [label, spread(ours[key]), spread(found.of_bound(key)), spread(found.ratio(key, BOUND))]
            for name in found.others:
                line += [spread(found.engines[name].figures.get(key)), spread(found.ratio(key, name))]
            lines.append(line)
    lines += [*over_bounds(found), memory(found), per_gigabyte(found)]
    return "\n".join((table(header, lines), *notes(found)))


def spread(value: Spread | None) -> str:
    """The median, with the smallest and largest of several rounds."""
    return "-" if value is None else f"{number(value.median)} [{number(value.low)}, {number(value.high)}]"


def number(value: float) -> str:
    """Three significant digits or more."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def over_bounds(found: Comparison) -> list[list[str]]:
    """A line for each of SHARES that the workload has."""
    of = {name: found.over_bounds(name) for name in found.engines}
    return [
        [
            label,
            spread(of[OURS][key]),
            "-",
            "-",
            *(word for name in found.others for word in (spread(of[name][key]), "-")),
        ]
        for key, label in SHARES.items()
        if key in of[OURS]
    ]


def memory(found: Comparison) -> list[str]:
    mine, theirs = found.engines[OURS].peak_bytes / 1e9, [found.engines[name].peak_bytes / 1e9 for name in found.others]
    return ["memory, GB", number(mine), "-", "-", *(word for gb in theirs for word in (number(gb), number(mine / gb)))]


def per_gigabyte(found: Comparison) -> list[str]:
    mine, *theirs = (found.engines[name].figures["output_tokens_per_s_gb"].median for name in (OURS, *found.others))
    return ["tokens/s a GB", number(mine), "-", "-", *(word for r in theirs for word in (number(r), number(mine / r)))]


def notes(found: Comparison) -> list[str]:
    """The best peer, the measured bounds, what ours says of its steps, and what the engines are."""
    facts, bounds = found.engines[OURS].facts, found.bounds
    reads = Spread.of([each.read_bytes_per_s / 1e9 for each in bounds])
    flops = Spread.of([each.flops_per_s / 1e12 for each in bounds])
    return [
        *best(found),
        f"bounds of {bounds[0].threads} threads, a measurement a round: reads {spread(reads)} GB/s, "
        f"{bounds[0].dtype} {spread(flops)} TFLOP/s ({bounds[0].library}); "
        f"a token reads {found.model.weights_read(1) / 1e6:.1f} MB of weights",
        f"KV pages held: most {facts['kv_most']:.1%}, mean {facts['kv_mean']:.1%}; host "
        f"{facts['host_ms_per_step']:.2f} ms and kernels {facts['kernel_ms_per_step']:.2f} ms a step (medians); "
        f"{facts['preemptions']} preemptions",
        "; ".join(f"{name}: {engine.loaded['version']}, {engine.loaded['precision']}"
                  for name, engine in found.engines.items()),
    ]  # fmt: skip


def best(found: Comparison) -> list[str]:
    """How often as good as the best peer ours is in the headline figure: above 1, ours is better."""
    name = HEADLINES[found.workload]
    peer = found.best_peer(name)
    ratio = found.ratio(name, peer) if peer else None
    if ratio is None:
        return []
    label, better = FIGURES[name]
    lead = Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low) if better == "less" else ratio
    over = f"{peer} over {OURS}" if better == "less" else f"{OURS} over {peer}"
    return [f"{label}, the best peer: {over} {spread(lead)}; above 1 ours is better"]


# ---- plots -----------------------------------------------------------------------------------------------------------


def panels(found: Sequence[Comparison]) -> list[Bars | Curves]:
    """For each workload the distribution of its latencies, and its rates."""
    made: list[Bars | Curves] = []
    for one in found:
        itl = {name: [value for ran in engine.ran for value in ran.itl] for name, engine in one.engines.items()}
        ttft = {name: [value for ran in engine.ran for value in ran.ttft] for name, engine in one.engines.items()}
        rates = {
            name: {label: engine.figures[f"{label}_tokens_per_s"].median for label in ("output", "prompt")}
            for name, engine in one.engines.items()
        }
        bound = {label: median(each[f"{label}_tokens_per_s"] for each in one.bound) for label in ("output", "prompt")}
        made += [
            Curves(f"{one.workload}: inter-token latency" if any(itl.values()) else f"{one.workload}: TTFT", "seconds",
                   itl if any(itl.values()) else ttft),
            Bars(f"{one.workload}: throughput", "tokens per second", {**rates, "bound": bound}),
        ]  # fmt: skip
    return made


def headlines(found: Sequence[Comparison]) -> list[Bars | Curves]:
    """For each workload its headline figure: the median of each engine and of the bound, with lowest and highest."""
    made: list[Bars | Curves] = []
    for one in found:
        name = HEADLINES[one.workload]
        label, better = FIGURES[name]
        bound = one.of_bound(name)
        spreads = {engine: measured.figures[name] for engine, measured in one.engines.items()}
        spreads |= {} if bound is None else {BOUND: bound}
        made.append(
            Bars(
                one.workload, f"{label} ({better} is better)",
                {engine: {"": spread.median} for engine, spread in spreads.items()},
                {engine: {"": (spread.low, spread.high)} for engine, spread in spreads.items()},
            )
        )  # fmt: skip
    return made
