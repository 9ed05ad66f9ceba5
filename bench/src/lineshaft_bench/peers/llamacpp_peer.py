"""llama.cpp through llama-cpp-python: one request after another, each token as it is evaluated. The model is GGUF."""

import time
from typing import Any

import llama_cpp
from protocol import serve


class LlamaCpp:
    def load(self, model: str, dtype: str, threads: int, rows: int, longest: int) -> dict[str, Any]:
        self.llama = llama_cpp.Llama(
            model, n_ctx=longest, n_batch=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        return {"version": f"llama-cpp-python {llama_cpp.__version__}", "precision": f"as in {model.rsplit('/')[-1]}"}

    def run(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        return {"stamps": [self.one(job, began) for job in jobs]}

    def one(self, job: dict[str, Any], began: float) -> list[float]:
        stamps: list[float] = []
        for _ in self.llama.generate(job["prompt"], top_k=1, temp=0.0):
            stamps.append(time.perf_counter() - began)
            if len(stamps) == job["out"]:
                break
        return stamps


if __name__ == "__main__":
    serve(LlamaCpp())
