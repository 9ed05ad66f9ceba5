"""From the name of a trace to its requests: a file in a known format, or a generated one; knows no format itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from lineshaft_bench.errors import TraceFileError
from lineshaft_bench.traces.arrivals import Arrival, Trace
from lineshaft_bench.traces.formats import AZURE_COLUMNS, MOONCAKE_KEYS, OWN_KEYS, BadLine, parser_of
from lineshaft_bench.traces.generate import KINDS, generate


def read_trace(name: str, *, seed: int = 0, limit: int | None = None, skip_bad: bool = False) -> Trace:
    """The first `limit` requests of a file, or of a generated trace (`KIND:options`), from time 0 on.

    Raises TraceFileError with file and line for what is wrong; with `skip_bad`, such lines are left out and counted.
    """
    if name.partition(":")[0] in KINDS and ":" in name:
        return Trace(name, generate(name, seed)[:limit])
    try:
        with Path(name).open(encoding="utf-8", errors="replace") as lines:
            reader = Reader(name, enumerate(lines, 1), skip_bad)
            found = list(islice(reader.arrivals(), limit))
    except OSError as error:
        known = ", ".join(KINDS)
        raise TraceFileError(f"{name}: {error.strerror}; give a file, or KIND:key=value of {known}") from error
    if not found:
        raise TraceFileError(f"{name}: no request in it ({reader.skipped} bad lines); give a trace that has some")
    return Trace(name, found, reader.skipped)


class Reader:
    """Reads numbered lines; `skipped` counts those that were bad."""

    def __init__(self, name: str, lines: Iterator[tuple[int, str]], skip_bad: bool) -> None:
        self.name, self.skip_bad, self.skipped = name, skip_bad, 0
        self._lines = ((number, line.strip()) for number, line in lines if line.strip())

    def arrivals(self) -> Iterator[Arrival]:
        """The requests of the file, the first at 0 seconds."""
        at, first = next(self._lines, (1, ""))
        found = parser_of(first.removeprefix("\ufeff"))
        if found is None:
            raise TraceFileError(
                f"{self.name}:{at}: {first[:60]!r} begins no trace; known are CSV with the header "
                f"{','.join(AZURE_COLUMNS)}, and JSON lines with {', '.join(MOONCAKE_KEYS)} or {', '.join(OWN_KEYS)}"
            )
        parse, header = found
        begin = last = None
        for number, line in self._lines if header else chain(((at, first),), self._lines):
            try:
                arrival = parse(line)
                if last is not None and arrival.at < last:
                    raise BadLine(f"it comes {last - arrival.at:g} s before the line above; sort the file by time")
            except BadLine as error:
                self._bad(number, error)
                continue
            last = arrival.at
            begin = last if begin is None else begin
            yield replace(arrival, at=last - begin)

    def _bad(self, number: int, error: BadLine) -> None:
        if not self.skip_bad:
            raise TraceFileError(f"{self.name}:{number}: {error}; or leave such lines out with --skip-bad") from None
        self.skipped += 1
