"""OpenVINO GenAI: its continuous batching on token ids. The model is a folder that `optimum-cli export` has written."""

from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import serve, steps


class Openvino:
    def load(self, model: str, dtype: str, threads: int, rows: int, longest: int) -> dict[str, Any]:
        settings = openvino_genai.SchedulerConfig()
        settings.cache_size, settings.max_num_seqs = 2, rows
        settings.max_num_batched_tokens = max(2048, longest)
        settings.dynamic_split_fuse = settings.enable_prefix_caching = True
        short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
        hints = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": short, "INFERENCE_PRECISION_HINT": short}
        self.pipe = openvino_genai.ContinuousBatchingPipeline(model, settings, "CPU", hints)
        self.made = 0
        return {"version": f"openvino-genai {openvino_genai.__version__.split('-')[0]}", "precision": dtype}

    def run(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        handles = [self.add(job) for job in jobs]

        def step() -> list[tuple[int, int]]:
            if self.pipe.has_non_finished_requests():
                self.pipe.step()
            return [(number, read(handle)) for number, handle in enumerate(handles) if handle.can_read()]

        return {"stamps": steps(jobs, step)}

    def add(self, job: dict[str, Any]) -> Any:
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = job["out"]
        wanted.ignore_eos, wanted.do_sample = True, False
        self.made += 1
        return self.pipe.add_request(self.made, openvino.Tensor(np.array([job["prompt"]], np.int64)), wanted)


def read(handle: Any) -> int:
    """How many new tokens a request has."""
    return sum(len(output.generated_ids) for output in handle.read().values())


if __name__ == "__main__":
    serve(Openvino())
