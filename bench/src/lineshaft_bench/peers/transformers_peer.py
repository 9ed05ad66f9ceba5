"""Hugging Face transformers: `generate` on static batches in order of arrival, padded on the left."""

import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer


class Stamps(BaseStreamer):
    """When each step's tokens came; the first call brings the prompts."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    def load(self, model: str, dtype: str, threads: int, rows: int, longest: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.rows = rows
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, use_cache=True)
        version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return {"version": version, "precision": dtype}

    @torch.inference_mode()
    def run(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        began, stamps = time.perf_counter(), []
        for first in range(0, len(jobs), self.rows):
            stamps += self.batch(jobs[first : first + self.rows], began)
        return {"stamps": stamps}

    def batch(self, jobs: list[dict[str, Any]], began: float) -> list[list[float]]:
        longest, seen = max(len(job["prompt"]) for job in jobs), Stamps()
        pads = [longest - len(job["prompt"]) for job in jobs]
        ids = torch.tensor([[0] * pad + job["prompt"] for pad, job in zip(pads, jobs, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        most = max(job["out"] for job in jobs)
        self.model.generate(ids, attention_mask=mask, max_new_tokens=most, streamer=seen)
        times = [at - began for at in seen.times[1:]]
        return [times[: job["out"]] for job in jobs]


if __name__ == "__main__":
    serve(Transformers())
