"""The machine itself, measured like an engine: no peer, but it takes its turn among them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from protocol import serve

from lineshaft_bench.peers.machine import loops


class Machine:
    def load(self, **given: Any) -> dict[str, Any]:
        """Takes what `loops` takes."""
        self.loops = loops(**given)
        return {"library": self.loops.library}

    def measure(self) -> dict[str, Any]:
        return asdict(self.loops.measure())


if __name__ == "__main__":
    serve(Machine())
