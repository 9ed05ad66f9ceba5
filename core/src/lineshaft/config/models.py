"""Every key of the configuration with its type, unit, default and meaning; nothing about where values come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Table(BaseModel):
    """Base of all tables: frozen, closed to unknown keys, and strict (the text "12" is no integer)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class CacheConfig(Table):
    """The paged KV cache."""

    page_size: Positive | None = None
    """Tokens in one page; unset: the backend's default."""
    pages: Annotated[int, Field(ge=2)] | None = None
    """Pages of one cache group, with the null page; unset: as many as `memory_fraction` gives."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the memory that is free after the weights are loaded; read where `pages` is unset."""
    prefix_caching: bool = True
    """Whether requests with a common prefix share its pages."""
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the pages that admission leaves free for the sequences already running."""
    eviction: Literal["lru", "fifo", "lfu"] = "lru"
    """Which cached page is given up first: least recently used, first computed, or least often shared."""


class SchedulerConfig(Table):
    """The limits of one step, and which request goes first."""

    token_budget: Positive = 512
    """Most tokens in one step, prefill and decode together."""
    max_rows: Positive = 32
    """Most sequences in one step."""
    max_prefill_tokens: Positive | None = None
    """Most prefill tokens in a step that holds decode rows too; unset: what the token budget leaves."""
    admission: Literal["fifo", "priority", "sjf"] = "fifo"
    """Order of waiting requests: by arrival, by `priority` and deadline, or least expected work first."""
    cache_aware: bool = False
    """Whether admission prefers, of the first 16 in line, the request with most of its prompt in the prefix cache."""
    fair_tenants: bool = False
    """Whether admission turns to the tenant (the salt of its requests) that was given the fewest tokens."""
    aging: Positive = 16
    """Admissions that may pass the longest-waiting request; the next is its own, whatever the policy."""
    preemption: Literal["recompute", "swap", "reject"] = "recompute"
    """What happens to a request whose pages are taken: computed again, kept on the host, or ended."""
    swap_pages: Natural = 0
    """Pages on the host for `preemption = "swap"`, over all cache groups; where they are full, it recomputes."""
    straggler: Annotated[float, Field(gt=0)] | None = None
    """A request whose output is so many times as long as expected comes last from then on; unset: never."""


class LayoutConfig(Table):
    """Degrees of the mesh axes; their product is the number of workers."""

    dp: Positive = 1
    """Data-parallel replicas."""
    pp: Positive = 1
    """Pipeline stages."""
    cp: Positive = 1
    """Context-parallel shards of one sequence."""
    ep: Positive = 1
    """Expert-parallel shards."""
    tp: Positive = 1
    """Tensor-parallel shards."""
    sequence_parallel: bool = False
    """Whether activations between blocks are cut along tokens over `tp`."""


class SamplingConfig(Table):
    """Defaults of the command line for requests; an unset key leaves the default of `SamplingParams`."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Divides the logits; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keeps the most probable tokens up to this total probability, in (0, 1]."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Keeps this many of the most probable tokens; 0 keeps all."""
    max_tokens: Positive | None = None
    """Most tokens to generate for one prompt; unset: 256."""
    seed: Natural | None = None
    """Seed of the request's random draws; unset: derived from the engine's seed."""


class EngineConfig(Table):
    """All that an engine is told. Only `model` has no default."""

    profile: Literal["interactive", "batch"] | None = None
    """Defaults for a kind of load: many short answers soon, or much work cheaply; a key that is given itself wins."""
    model: str
    """Reference of the model: a path, `hf://ORG/NAME[@REVISION]` or `pypi:DISTRIBUTION`."""
    backend: str = "auto"
    """Name of a registered backend; "auto" takes the best usable one, a named one runs or raises."""
    backend_options: dict[str, Any] = {}
    """Options of the backend, checked by the model that its plugin registers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype that is executed; "auto" takes the backend's preferred one."""
    quantization: Literal["none", "stored", "int8", "fp8", "int4", "w8a8_int8", "w8a8_fp8"] = "none"
    """Weights of linear layers are rounded to 8 bits, or 4, when they are loaded; under "w8a8" their inputs are too.
    "stored": the blocks that the checkpoint stores them in are multiplied as they are."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed from which requests without their own seed draw."""
    max_model_len: Positive | None = None
    """Most tokens of one sequence, prompt and output; unset: the model's context."""
    tokenizer: str | None = None
    """Reference of the tokenizer; unset: the model's own."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of one worker; 0 leaves the choice to the backend. Fewer are quicker where CPUs are busy."""
    executor: str = "auto"
    """Where workers run: "inproc", "process" or a plugin's; "auto": "inproc" for one worker, else "process"."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether a step is scheduled while the one before runs; "auto": where the backend or its workers run beside the
    engine."""
    step_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """Seconds that workers in processes may take for one step; then all are killed and the step fails."""
    cache: CacheConfig = CacheConfig()
    """The paged KV cache."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """The limits of one step."""
    layout: LayoutConfig = LayoutConfig()
    """Degrees of the mesh axes."""
    kernels: dict[str, str] = {}
    """Kernel by op, for ops whose kernel is not left to the planner; a named kernel runs or raises."""
    tuning: Literal["cached", "fresh", "off"] = "cached"
    """Whether tunable kernels that are equally good are measured: once, and kept in the user's cache folder; "fresh":
    at each start; "off": the first by name is taken."""
    max_logprobs: Natural = 20
    """Most top log-probabilities that a request may ask for per token."""
    sampling_extras: bool = True
    """Whether penalties, biases, bans, allowed tokens, structured outputs and typical_p are prepared at start."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults of the command line for requests."""
