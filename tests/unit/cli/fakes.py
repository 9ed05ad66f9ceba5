"""A stand-in for the LLM that commands open: it records what it is asked and answers with fixed texts."""

from __future__ import annotations

import math
import types
from typing import Any

from lineshaft.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, RunMetrics, StreamDelta


class FakeLLM:
    """Records what the command asks of the engine and answers with a fixed text."""

    seen: dict[str, Any]

    @classmethod
    def from_config(cls, config: Any, *, progress: Any) -> FakeLLM:
        progress("loading weights", 0, 1)  # stderr is no terminal here: nothing is shown
        llm = cls()
        llm.seen = cls.seen
        llm.seen["config"] = config
        return llm

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.seen["closed"] = True

    def stream(self, prompt: Any, params: Any, chat: bool = True, **more: Any) -> Any:
        self.seen.update(prompt=prompt, params=params, chat=chat, more=more)
        self.seen.setdefault("prompts", []).append(prompt)
        for text, reason in (("one ", None), ("two", "length")):
            yield StreamDelta(0, text, (1,), reason)
        if prompt == "stop me":
            raise KeyboardInterrupt

    def generate(self, prompts: list[Any], params: Any, progress: bool, raw: bool = True) -> Any:
        self.seen.update(prompts=prompts, params=params, progress=progress, raw=raw)
        places = [{1: Logprob(-0.5, 1, "a"), 2: Logprob(-math.inf, 2, "b")}]
        metrics = RequestMetrics(0.5, 0.01, 0.0, 0.6, 0, 0)
        return [
            RequestOutput(
                i,
                f"<{prompt}>",
                [5],
                [CompletionOutput(k, f"whole{k or ''}", [1], -0.5, places, reason) for k in range(params.n)],
                metrics,
                prompt_logprobs=None if params.prompt_logprobs is None else [None, *places],
            )
            for i, (prompt, reason) in enumerate(zip(prompts, ("stop", "length"), strict=False))
        ]

    def chat(self, prompts: list[str], params: Any, progress: bool, **more: Any) -> Any:
        self.seen["more"] = more
        return self.generate(prompts, params, progress, raw=False)

    plan = types.SimpleNamespace(summary=lambda: "the plan", hash="abc")

    def metrics(self) -> RunMetrics:
        return RunMetrics(
            requests=1, prompt_tokens=1, output_tokens=1, ttft_s=0.5, tpot_s=0.01, tokens_per_s=9.0,
            host_ms_per_decode_step=0.1, kernel_ms_per_decode_step=math.nan, steps=2, preemptions=0,
            prefix_hit_tokens=0, pages_used=3, pages_total=7, page_size=16,
        )  # fmt: skip
