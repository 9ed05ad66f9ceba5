"""Draws distributions of latencies and bars of rates, with matplotlib where it is installed; knows no run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft_bench.errors import PlotError

MOST_POINTS = 2000
"""Of one curve; more are not seen, and make an SVG file large."""


@dataclass(frozen=True)
class Curves:
    """A panel of cumulative distributions, one for each run."""

    title: str
    unit: str
    values: Mapping[str, Sequence[float]]

    def draw(self, axes: Any) -> None:
        for name, values in self.values.items():
            if len(values):
                at = np.sort(np.asarray(values, np.float64))
                chosen = np.unique(np.linspace(0, len(at) - 1, min(len(at), MOST_POINTS)).astype(int))
                axes.plot(at[chosen], (chosen + 1) / len(at), label=name, drawstyle="steps-post")
        if any(len(values) and min(values) > 0 for values in self.values.values()):
            axes.set_xscale("log")
        axes.set(title=self.title, xlabel=self.unit, ylabel="share of values", ylim=(0, 1.02))
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(loc="lower right")


@dataclass(frozen=True)
class Bars:
    """A panel of groups of bars: a group for each name of a run's values, a bar for each run. `spans` are the lowest
    and the highest of a value, where a run has them."""

    title: str
    unit: str
    values: Mapping[str, Mapping[str, float]]
    spans: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    def draw(self, axes: Any) -> None:
        groups = list(dict.fromkeys(group for found in self.values.values() for group in found))
        width = 0.8 / max(len(self.values), 1)
        for number, (name, found) in enumerate(self.values.items()):
            at = np.arange(len(groups)) + (number - (len(self.values) - 1) / 2) * width
            heights = np.array([found.get(group, 0.0) for group in groups])
            bars = axes.bar(at, heights, width, label=name)
            if name in self.spans:
                spans = np.array(
                    [self.spans[name].get(group, (height,) * 2) for group, height in zip(groups, heights, strict=True)]
                )
                axes.errorbar(at, heights, np.abs(spans.T - heights), fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
            place = "center" if name in self.spans else "edge"  # where no whisker crosses it
            axes.bar_label(bars, fmt="%.4g", fontsize=7, padding=1 if place == "edge" else 0, label_type=place)
        axes.set_xticks(range(len(groups)), groups)
        axes.set(title=self.title, ylabel=self.unit)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8)


def check_drawable(file: Path) -> None:
    """Raises PlotError, before any work, for a file that could not be drawn after it: its ending names its format."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(f"plots need matplotlib ({error}); pip install 'lineshaft-bench[plot]'") from error
    allowed = Figure().canvas.get_supported_filetypes()
    if file.suffix.lstrip(".") not in allowed:
        raise PlotError(f"{file}: cannot draw a {file.suffix or 'file without an ending'}; use {', '.join(allowed)}")


def draw(panels: Sequence[Curves | Bars], title: str, file: Path) -> None:
    """Draw the panels, two in a row, into a file that `check_drawable` takes. Raises PlotError for another."""
    check_drawable(file)
    from matplotlib.figure import Figure

    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 4.2 * lines), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for panel, axes in zip(panels, figure.subplots(lines, 2, squeeze=False).flat, strict=False):
        panel.draw(axes)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(file, dpi=120)
