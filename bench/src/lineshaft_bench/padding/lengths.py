"""How often each length occurs: by a formula, in a file of lengths, or as the prompts of a trace. Knows no table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lineshaft.errors import InvalidValue
from lineshaft_bench.errors import TraceFileError
from lineshaft_bench.traces import KINDS, read_trace
from lineshaft_bench.traces.formats import BadLine, count, parser_of
from lineshaft_bench.traces.generate import Spec
from lineshaft_contract.sessions import HostArray


@dataclass(frozen=True)
class Lengths:
    """A distribution: `weights` float64 [L], of which entry i says how often length i + 1 occurs. None is negative, and
    L occurs, or is the longest that may."""

    name: str
    weights: HostArray
    skipped: int = 0  # bad lines that were left out

    @property
    def mean(self) -> float:
        """The mean length."""
        return float(np.arange(1, len(self.weights) + 1) @ self.weights / self.weights.sum())


def read_lengths(name: str, *, seed: int = 0, skip_bad: bool = False) -> Lengths:
    """The lengths that a text names: `uniform:` or `lognormal:` with options, a trace, or a file with one a line.

    Raises InvalidValue for a wrong option, TraceFileError for what is wrong in a file; with `skip_bad`, wrong lines are
    left out and counted.
    """
    kind = name.partition(":")[0]
    if ":" in name and kind in FORMULAS:
        return Lengths(name, FORMULAS[kind](Spec(name)))
    if ":" not in name or kind not in KINDS:
        lines = numbered_lines(name)
        if not lines or parser_of(lines[0][1].removeprefix("\ufeff")) is None:
            return from_lines(name, lines, skip_bad)
    trace = read_trace(name, seed=seed, skip_bad=skip_bad)
    return Lengths(name, counted(arrival.prompt_tokens for arrival in trace.arrivals), trace.skipped)


def uniform(spec: Spec) -> HostArray:
    """From `low` to `high`, all alike."""
    low, high = spec.count("low", 1), spec.count("high", None)
    spec.done()
    if low > high:
        raise InvalidValue(f"uniform: low = {low} is above high = {high}: give a low of at most high")
    weights: HostArray = np.zeros(high)
    weights[low - 1 :] = 1
    return weights


def lognormal(spec: Spec) -> HostArray:
    """Log-normal lengths, rounded, of those from 1 to `high`: what is longer does not occur."""
    median, sigma, high = spec.number("median", None), spec.number("sigma", None), spec.count("high", None)
    spec.done()
    ends = (np.log(np.arange(1, high + 1) + 0.5) - math.log(median)) / (sigma * math.sqrt(2))
    below = np.fromiter(map(math.erf, ends), float, high)
    weights = np.diff(below, prepend=-1.0)
    if not weights.any():
        raise InvalidValue(
            f"{spec.kind}: no length up to high = {high} is likely: give a lower median, or a higher high"
        )
    return weights


FORMULAS: Mapping[str, Callable[[Spec], HostArray]] = {"uniform": uniform, "lognormal": lognormal}


def numbered_lines(name: str) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers."""
    try:
        text = Path(name).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        known = ", ".join((*FORMULAS, *KINDS))
        reason = getattr(error, "strerror", None) or error
        raise TraceFileError(f"{name}: {reason}; give a file, or KIND:key=value of {known}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def from_lines(name: str, lines: Iterable[tuple[int, str]], skip_bad: bool) -> Lengths:
    """The lengths of a file that has one a line."""
    found, skipped = list[int](), 0
    for number, line in lines:
        try:
            found.append(count("length", line.removeprefix("\ufeff")))
        except BadLine as error:
            if not skip_bad:
                raise TraceFileError(
                    f"{name}:{number}: {error}, one a line, or a trace; or leave such lines out with --skip-bad"
                ) from None
            skipped += 1
    if not found:
        raise TraceFileError(f"{name}: no length in it ({skipped} bad lines); give a file with one a line, or a trace")
    return Lengths(name, counted(found), skipped)


def counted(lengths: Iterable[int]) -> HostArray:
    """How often each length occurs: [the longest]."""
    return np.bincount(np.fromiter(lengths, np.int64))[1:].astype(np.float64)
