"""What a model asks of a device for each token: counted from its declarations, which are read without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lineshaft.errors import InvalidValue
from lineshaft.layout import Degrees
from lineshaft.models import BuildContext, Model, builtin_families, find_family
from lineshaft.plan.trace import distinct_params
from lineshaft.registry import Registry
from lineshaft.weights.checkpoint import CONFIG_ALONE, FORMATS, open_checkpoint
from lineshaft.weights.memory import local_bytes
from lineshaft.weights.refs import resolve
from lineshaft_contract.problems import AttendProblem, KVProblem, RouterProblem
from lineshaft_contract.schemes import as_dtype
from lineshaft_contract.weights import Checkpoint, Param

HEAD = "head"
"""How models name the parameter that makes logits."""
INLINE = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "intermediate": "intermediate_size",
    "vocab": "vocab_size", "context": "max_position_embeddings",
}  # fmt: skip
"""Words of a shape on the command line, and the keys of config.json that they are."""


@dataclass(frozen=True)
class CacheGroup:
    """Caches that share a page table, at one rank."""

    kv_bytes: float  # of one token
    pair_flops: float  # of each (query, key) pair
    window: int  # keys that a query sees; 0: all before it


@dataclass(frozen=True)
class ModelFigures:
    """Bytes and operations of one rank's share. A multiply-add is two operations."""

    weight_bytes: int  # held
    dense_bytes: int  # read by every step
    expert_bytes: int  # of all experts; a step reads those that its tokens chose
    expert_share: float  # chosen by one token, of all
    groups: tuple[CacheGroup, ...]
    token_flops: float  # of each token, without attention and the head
    logit_flops: float  # of each row that is sampled
    hidden: int
    layers: int
    itemsize: int
    context: int  # longest sequence

    @property
    def kv_bytes(self) -> float:
        """Of one token, over all layers."""
        return sum(group.kv_bytes for group in self.groups)

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads; each token chooses experts on its own."""
        if not self.expert_bytes:
            return self.dense_bytes
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)

    def prompt_flops(self, tokens: int) -> float:
        """Operations of a prompt of so many tokens, of which the last is sampled."""
        found = tokens * self.token_flops + self.logit_flops
        for group in self.groups:
            seen = min(group.window or tokens, tokens)
            found += group.pair_flops * (seen * (seen + 1) / 2 + (tokens - seen) * seen)
        return found


def model_figures(
    shape: str, registry: Registry, dtype: str = "bfloat16", tp: int = 1, quantization: str = "none"
) -> ModelFigures:
    """The figures of a model reference, of a folder with config.json alone, or of a Llama written as
    `hidden=4096,layers=32,...` (see INLINE), with weights as `quantization` leaves them. Raises ModelError,
    LayoutError, InvalidValue."""
    checkpoint = None if "=" in shape else checkpoint_of(shape, registry)
    config = inline(shape) if checkpoint is None else checkpoint.config
    family = find_family(config, (*registry.models(), *builtin_families()))
    context = BuildContext(dtype, dtype, 1, Degrees(tp=tp), quantization, checkpoint=checkpoint)
    return count(family.build(config, context), dtype)


def checkpoint_of(reference: str, registry: Registry) -> Checkpoint:
    """What a model reference names, or a folder with config.json alone."""
    path = resolve(reference)
    path = path.parent if path.name == "config.json" else path
    return open_checkpoint(Path(path), (CONFIG_ALONE, *registry.checkpoints(), *FORMATS))


def inline(text: str) -> dict[str, Any]:
    """A Llama's config from key=number pairs."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key.strip() not in INLINE or not value.strip().isdecimal():
            raise InvalidValue(f"model {text!r}: {item!r} should be one of {', '.join(INLINE)} = a whole number")
        config[INLINE[key.strip()]] = int(value)
    return config


def count(model: Model, dtype: str) -> ModelFigures:
    """Add up what the model declares."""
    params = distinct_params(model.params())
    linear, experts = of_kind(params, "linear"), of_kind(params, "experts")
    read = [param for param in params if param.kinds != {"embed"} and "experts" not in param.kinds]
    logits = sum(2 * prod(param.shape) for param in linear if param.name == HEAD)
    share = expert_share(model)
    packed = dict.fromkeys((param.name for param in params), "as it is read")
    token = sum(2 * prod(param.shape) for param in linear) - logits
    return ModelFigures(
        weight_bytes=local_bytes(params, packed),
        dense_bytes=local_bytes(read, packed),
        expert_bytes=local_bytes(experts, packed),
        expert_share=share,
        groups=tuple(cache_groups(model)),
        token_flops=token + share * sum(2 * prod(param.shape) for param in experts),
        logit_flops=logits,
        hidden=model.shape.hidden,
        layers=len(list(model.caches())),
        itemsize=as_dtype(dtype).itemsize,
        context=model.max_position,
    )


def of_kind(params: Sequence[Param], kind: str) -> list[Param]:
    return [param for param in params if kind in param.kinds]


def token_bytes(problem: KVProblem) -> int:
    """Bytes of one token in one cache."""
    per_page = sum(prod(shape) * as_dtype(dtype).itemsize for shape, dtype in problem.page_arrays.values())
    return per_page // problem.page_size


def problems(model: Model, kind: type[Any]) -> Iterator[Any]:
    return (problem for _, problem in model.uses().values() if isinstance(problem, kind))


def cache_groups(model: Model) -> Iterator[CacheGroup]:
    """What the model keeps of each token, and what attention over it takes."""
    caches = list(model.caches())
    for group in range(1 + max((cache.group for cache in caches), default=-1)):
        own = [cache for cache in caches if cache.group == group]
        attends = [problem for problem in problems(model, AttendProblem) if problem.group == group]
        flops = [2 * p.q_heads * (p.qk_dim + p.v_dim) for p in attends] or [0]
        windows = [problem.window for problem in attends] or [0]
        window = max(windows) if all(windows) else 0
        yield CacheGroup(sum(map(token_bytes, own)), len(own) * sum(flops) / len(flops), window)


def expert_share(model: Model) -> float:
    """The share of its experts that one token uses; 0 without experts."""
    return next((p.k / p.experts for p in problems(model, RouterProblem)), 0.0)
