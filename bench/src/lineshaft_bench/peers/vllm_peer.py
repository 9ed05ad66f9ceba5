"""vLLM, also its build for CPUs: the engine in this process, stepped on token ids."""

import os
from typing import Any

from protocol import serve, steps

VARIABLES = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
for name, value in VARIABLES.items():
    os.environ.setdefault(name, value)


class Vllm:
    def load(self, model: str, dtype: str, threads: int, rows: int, longest: int) -> dict[str, Any]:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        import vllm

        self.made = 0
        self.vllm = vllm
        llm = vllm.LLM(
            model=model, dtype=dtype, max_model_len=longest, max_num_seqs=rows,
            max_num_batched_tokens=max(4096, longest), enable_prefix_caching=True,
            disable_log_stats=True, skip_tokenizer_init=True,
        )  # fmt: skip
        self.engine = llm.llm_engine
        return {"version": f"vllm {vllm.__version__}", "precision": dtype}

    def run(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = {}
        for number, job in enumerate(jobs):
            self.made += 1
            numbers[str(self.made)] = number
            params = self.vllm.SamplingParams(
                temperature=0.0, max_tokens=job["out"], ignore_eos=True, detokenize=False
            )  # fmt: skip
            self.engine.add_request(str(self.made), {"prompt_token_ids": job["prompt"]}, params)
        seen = [0] * len(jobs)

        def step() -> list[tuple[int, int]]:
            new = []
            for output in self.engine.step():
                number = numbers[output.request_id.split("-")[0]]
                count = len(output.outputs[0].token_ids)
                new.append((number, count - seen[number]))
                seen[number] = count
            return new

        return {"stamps": steps(jobs, step)}


if __name__ == "__main__":
    serve(Vllm())
