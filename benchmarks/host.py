"""What a decode step costs the host, apart from the work of its kernels.

    python benchmarks/host.py --backend cpu --layers 30 --rows 1 32

Three figures for each batch size: the scheduler alone (schedule and commit); the engine's step less the time that
the backend spends in its program; and the whole step of a model with as many layers but next to no arithmetic (width
16), an upper bound of all host work together, dispatch of every kernel included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lineshaft import SamplingParams
from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.config import make_config
from lineshaft.engine import Engine
from lineshaft.scheduler import Limits, Request, Scheduler

WIDTH, VOCAB, PROMPT, STEPS = 16, 64, 100, 300


def write_model(folder: Path, layers: int) -> None:
    """A Llama checkpoint of `layers` layers and next to no width."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": WIDTH, "vocab_size": VOCAB,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        tensors[f"model.{name}.weight"] = rng.standard_normal(shape).astype(np.float32) / 4

    add("embed_tokens", VOCAB, WIDTH)
    add("norm", WIDTH)
    for i in range(layers):
        for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("o", WIDTH)):
            add(f"layers.{i}.self_attn.{name}_proj", rows, WIDTH)
        for name in ("gate", "up", "down"):
            add(f"layers.{i}.mlp.{name}_proj", WIDTH, WIDTH)
        add(f"layers.{i}.input_layernorm", WIDTH)
        add(f"layers.{i}.post_attention_layernorm", WIDTH)
    save_file(tensors, folder / "model.safetensors")


def params() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=800, ignore_eos=True)


def scheduler_us(rows: int) -> float:
    """Median microseconds of one schedule and commit."""
    scheduler = Scheduler(Limits(4096, rows, 1024), CacheManager([GroupSpec(1 + 64 * rows, 16)]))
    for i in range(rows):
        scheduler.add(Request(i, tuple(range(PROMPT)), params()))
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        batch = scheduler.schedule()
        scheduler.commit(batch, [1] * sum(row.samples for row in batch.rows))
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def engine_us(backend: str, layers: int, rows: int) -> tuple[float, float]:
    """Median microseconds of a decode step outside the program, and of the whole step."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), layers)
        config = make_config(
            model=folder, backend=backend, dtype="float32", max_model_len=1024, max_logprobs=0,
            scheduler={"max_rows": rows, "token_budget": max(128, rows)}, cache={"pages": 1 + 64 * rows},
        )  # fmt: skip
        with Engine(config) as engine:
            for i in range(rows):
                engine.add([(7 * i + j) % VOCAB for j in range(PROMPT)], params())
            while any(not live.request.output for live in engine.requests()):
                engine.step()
            outside, whole = [], []
            for _ in range(STEPS):
                before, began = engine.meter.kernel_seconds, time.perf_counter()
                engine.step()
                whole.append(time.perf_counter() - began)
                outside.append(whole[-1] - (engine.meter.kernel_seconds - before))
    return 1e6 * statistics.median(outside), 1e6 * statistics.median(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    print(f"{'rows':>5} {'scheduler us':>13} {'engine us':>10} {'whole step of width 16, us':>27}")
    for rows in args.rows:
        outside, whole = engine_us(args.backend, args.layers, rows)
        print(f"{rows:5} {scheduler_us(rows):13.1f} {outside:10.1f} {whole:27.1f}")


if __name__ == "__main__":
    main()
