"""lineshaft itself: the engine stepped on token ids, with what else it can tell of its steps."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol import serve

from lineshaft.config import make_config
from lineshaft.engine import Engine
from lineshaft.flight import Token
from lineshaft.meter import now
from lineshaft.tokenizer import Detokenizer, Tokenizer
from lineshaft.weights.refs import resolve
from lineshaft_bench.drive import drive
from lineshaft_bench.timeline import Recorder
from lineshaft_bench.workloads import Job

LIBRARIES = ("torch", "jax")
"""What backends compute with."""


class Lineshaft:
    """`facts` is answered beside what every driver answers."""

    def load(self, config: dict[str, Any], timeline: str = "") -> dict[str, Any]:
        self.engine = Engine(make_config(**config))
        self.timeline, self.recorder = timeline, Recorder()
        if timeline:
            self.engine.recorder = self.recorder
            self.tokenizer = Tokenizer.from_checkpoint(resolve(config.get("tokenizer") or config["model"]))
        self.host: list[float] = []
        self.kernels: list[float] = []
        self.pages: list[int] = []
        from lineshaft import __version__

        scheme = config.get("quantization", "none")
        return {
            "version": f"lineshaft {__version__}", "vocab": self.engine.vocab,
            "precision": config["dtype"] if scheme == "none" else f"{config['dtype']}, {scheme}",
            "library": next((name for name in LIBRARIES if name in sys.modules), ""),
        }  # fmt: skip

    def run(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        self.texts: dict[int, Detokenizer] = {}
        return {"stamps": drive(self.engine, [Job(**job) for job in jobs], self.step)}

    def step(self) -> list[Token]:
        meter = self.engine.meter
        seconds, kernels = meter.seconds, meter.kernel_seconds
        tokens = self.engine.step()
        self.kernels.append(meter.kernel_seconds - kernels)
        self.host.append(meter.seconds - seconds - self.kernels[-1])
        self.pages.append(sum(cache.used_pages(0) for cache in self.engine.caches))
        if self.timeline:
            self.detokenize(tokens)
        return tokens

    def detokenize(self, tokens: Sequence[Token]) -> None:
        """Feed each request's text, as `LLM` does; only the timeline wants it."""
        began = now()
        for token in tokens:
            text = self.texts.setdefault(token.request.id, Detokenizer(self.tokenizer))
            text.feed(token.token_id)
        self.recorder.span("detokenize", began, now(), tokens=len(tokens))

    def facts(self) -> dict[str, Any]:
        """Of all steps so far: medians in milliseconds, and shares of the KV pages; writes the timeline."""
        if self.timeline:
            self.recorder.write(Path(self.timeline))
        run, total = self.engine.metrics(), max(1, self.engine.metrics().pages_total)
        return {
            "steps": run.steps, "preemptions": run.preemptions, "pages": list(self.engine.pages),
            "host_ms_per_step": 1e3 * statistics.median(self.host or [0.0]),
            "kernel_ms_per_step": 1e3 * statistics.median(self.kernels or [0.0]),
            "kv_most": max(self.pages, default=0) / total, "kv_mean": statistics.fmean(self.pages or [0]) / total,
            "load_s": run.load_s, "capture_s": run.capture_s,
        }  # fmt: skip


if __name__ == "__main__":
    serve(Lineshaft())
