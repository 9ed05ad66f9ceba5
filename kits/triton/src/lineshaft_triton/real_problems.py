"""Problems of real models, by op: what a step of them asks of kernels. Knows no kernel and no target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lineshaft_contract.ops.quantize import LINEAR_SCHEMES, NONE
from lineshaft_contract.problems import (
    AttendProblem,
    EmbedProblem,
    ExpertProblem,
    KVProblem,
    LinearProblem,
    MergeProblem,
    NormProblem,
    PointwiseProblem,
    Problem,
    RopeProblem,
    RopeWriteProblem,
    RouterProblem,
    SampleProblem,
)

DTYPES = ("bfloat16", "float16")
GROUPS = {"int4": 32}
"""Numbers of a row that share a scale under a scheme that has groups; those of GGUF's Q4_0."""
PAGE = 16
CONTEXT = 8192


@dataclass(frozen=True)
class Shape:
    """One rank's share of a model. `experts` and `k` are 0 for a dense one."""

    q_heads: int
    kv_heads: int
    head: int
    hidden: int
    width: int
    vocab: int
    base: float
    experts: int = 0
    k: int = 0


LLAMA_8B = Shape(32, 8, 128, 4096, 14336, 128256, 500000.0)
DEEPSEEK_LITE = {"heads": 16, "nope": 128, "rank": 512}
"""Of DeepSeek-V2-Lite's latent attention: what its products per head have."""
SMOLLM2 = Shape(9, 3, 64, 576, 1536, 49152, 100000.0)
MIXTRAL = Shape(32, 8, 128, 4096, 14336, 32000, 1000000.0, experts=8, k=2)


def ranks_share(shape: Shape, tp: int) -> Shape:
    """What one of `tp` ranks holds."""
    return Shape(
        shape.q_heads // tp, shape.kv_heads // tp, shape.head, shape.hidden, shape.width // tp, shape.vocab // tp,
        shape.base, shape.experts, shape.k,
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """So many tokens of so many sequences, at most `longest` of one."""

    tokens: int
    rows: int
    longest: int


STEPS = (Step(512, 1, 512), Step(64, 64, 1), Step(2048, 1, 2048), Step(8, 8, 1), Step(128, 128, 1))
"""A chunk of a prompt, decode, as many tokens as a step may have unless a user says otherwise, and decode of fewer rows
and of more, for which products have other tiles. The first that a kernel takes is its problem in the table of kernels:
one that serves chunks would take decode too."""


def real_problems(op: str) -> list[Problem]:
    """The problems of an op, those of an 8B Llama in bfloat16 first; none of an op that no model's step has."""
    found: dict[Problem, None] = {}
    for dtype in DTYPES:
        for whole, tp in ((LLAMA_8B, 1), (LLAMA_8B, 8), (SMOLLM2, 1), (MIXTRAL, 1), (MIXTRAL, 8)):
            for step in STEPS:
                for name, problem in step_problems(ranks_share(whole, tp), step, dtype):
                    if name == op:
                        found[problem] = None
    return list(found)


def step_problems(shape: Shape, step: Step, dtype: str) -> Iterator[tuple[str, Problem]]:
    """Every op of a step with its problem."""
    yield from _rows(shape, step, dtype)
    yield from _attention(shape, step, dtype)
    yield from _products(shape, step, dtype)
    yield from _experts(shape, step, dtype)
    yield from _logits(shape, step)


def _rows(shape: Shape, step: Step, dtype: str) -> Iterator[tuple[str, Problem]]:
    tokens, hidden = step.tokens, shape.hidden
    yield "embed", EmbedProblem(dtype=dtype, vocab=shape.vocab, width=hidden, rows=tokens)
    for op in ("rms_norm", "add_rms_norm"):
        yield op, NormProblem(dtype=dtype, width=hidden, eps=1e-5, rows=tokens)
    for op in ("silu_mul", "gelu_mul"):
        yield op, PointwiseProblem(dtype=dtype, rows=tokens, width=shape.width)
    yield "add", PointwiseProblem(dtype=dtype, rows=tokens, width=hidden)
    yield "gather_rows", PointwiseProblem(dtype=dtype, rows=step.rows, width=hidden)


def _attention(shape: Shape, step: Step, dtype: str) -> Iterator[tuple[str, Problem]]:
    heads: dict[str, Any] = {"q_heads": shape.q_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head}
    rope = RopeProblem(
        dtype=dtype, dim=shape.head, base=shape.base, rows=step.tokens, max_position=CONTEXT, **heads
    )  # fmt: skip
    yield "rope", rope
    for kv_dtype, scheme in ((dtype, "none"), ("float8_e4m3fn", "tensor")):
        cache: dict[str, Any] = {
            "kv_heads": shape.kv_heads, "qk_dim": shape.head, "v_dim": shape.head, "page_size": PAGE,
            "kv_dtype": kv_dtype, "kv_scheme": scheme,
        }  # fmt: skip
        written = KVProblem(dtype=dtype, rows=step.tokens, **cache)
        yield "write_kv", written
        if scheme == "none":
            yield "rope_write_kv", RopeWriteProblem.of(rope, written)
        yield "attend", AttendProblem(
            dtype=dtype, q_heads=shape.q_heads, scale=shape.head**-0.5, tokens=step.tokens, rows=step.rows,
            pages=CONTEXT // PAGE, max_query=step.longest, **cache,
        )  # fmt: skip
    pages: dict[str, Any] = {"dtype": dtype, "kv_heads": shape.kv_heads, "qk_dim": shape.head, "v_dim": shape.head}
    for op in ("copy_pages", "copy_slots", "read_pages", "write_pages"):
        yield op, KVProblem(rows=step.rows, page_size=PAGE, kv_dtype=dtype, **pages)
    yield "merge_states", MergeProblem(
        dtype=dtype, parts=2, rows=step.tokens, heads=shape.q_heads, v_dim=shape.head
    )  # fmt: skip


def _products(shape: Shape, step: Step, dtype: str) -> Iterator[tuple[str, Problem]]:
    qkv = (shape.q_heads + 2 * shape.kv_heads) * shape.head
    sizes = (
        (shape.hidden, shape.q_heads * shape.head), (qkv, shape.hidden), (shape.hidden, shape.width),
        (2 * shape.width, shape.hidden),
    )  # fmt: skip
    for scheme in (NONE, *LINEAR_SCHEMES):
        for n, k in () if shape.experts else sizes:
            yield "linear", LinearProblem(
                dtype=dtype, m=step.tokens, n=n, k=k, scheme=scheme, group_size=GROUPS.get(scheme, 0)
            )  # fmt: skip
    yield "linear", LinearProblem(dtype=dtype, m=step.rows, n=shape.vocab, k=shape.hidden)
    per_head: dict[str, Any] = {"dtype": dtype, "m": step.tokens, "heads": DEEPSEEK_LITE["heads"]}
    yield "head_linear", LinearProblem(n=DEEPSEEK_LITE["rank"], k=DEEPSEEK_LITE["nope"], **per_head)
    yield "head_linear", LinearProblem(n=DEEPSEEK_LITE["nope"], k=DEEPSEEK_LITE["rank"], **per_head)


def _experts(shape: Shape, step: Step, dtype: str) -> Iterator[tuple[str, Problem]]:
    if not shape.experts:
        return
    yield "router_topk", RouterProblem(
        dtype=dtype, experts=shape.experts, k=shape.k, rows=step.tokens, softmax="after"
    )  # fmt: skip
    experts: dict[str, Any] = {"experts": shape.experts, "local": shape.experts}
    experts |= {"dtype": dtype, "hidden": shape.hidden, "width": shape.width}
    yield "expert_mlp", ExpertProblem(k=shape.k, rows=step.tokens, **experts)
    yield "grouped_mlp", ExpertProblem(k=1, rows=step.tokens * shape.k, **experts)
    lean: dict[str, Any] = {"dtype": dtype, "hidden": shape.hidden, "width": 0, "k": shape.k, "rows": step.tokens}
    yield "moe_dispatch", ExpertProblem(experts=shape.experts, local=shape.experts, **lean)
    yield "moe_combine", ExpertProblem(experts=0, local=0, **lean)


def _logits(shape: Shape, step: Step) -> Iterator[tuple[str, Problem]]:
    """Logits are whole on every rank, and float32."""
    for op in ("sample", "argmax", "logprobs", "apply_logits"):
        yield op, SampleProblem(dtype="float32", vocab=shape.vocab, rows=step.rows, top=8 if op == "logprobs" else 0)
