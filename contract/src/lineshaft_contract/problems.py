"""Problem descriptors: the static facts by which a kernel is chosen, one frozen dataclass per kind of op.

A field made by `feature(...)` names an optional ability. A kernel that does not list the field's name in `handles`
is never chosen for a problem that sets it, so a new field with a default breaks no existing kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

SCALE_BLOCK = 32
"""Values of a head that share a scale under kv_scheme `block`."""


def feature(default: Any) -> Any:
    """A problem field that counts as a used feature whenever it differs from `default`."""
    return field(default=default, metadata={"feature": True})


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Base of all problem descriptors; `dtype` is the dtype *executed*."""

    dtype: str

    def features(self) -> frozenset[str]:
        """Names of the optional abilities that this problem asks of a kernel."""
        return frozenset(
            f.name for f in fields(self) if f.metadata.get("feature") and getattr(self, f.name) != f.default
        )

    def describe(self) -> str:
        """One line with every field that differs from its default."""
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(shown)


@dataclass(frozen=True, kw_only=True)
class PointwiseProblem(Problem):
    """Row-wise arithmetic on `[rows, width]`: add, silu_mul, gelu_mul, concat, gather_rows, merge_rows."""

    rows: int = 0
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class NormProblem(Problem):
    """RMS norm over the last dim of `[rows, width]`."""

    width: int
    eps: float
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class EmbedProblem(Problem):
    """Row lookup in `[vocab, width]`, where `vocab` counts this shard's rows; `scale` multiplies each row found."""

    vocab: int
    width: int
    rows: int = 0
    scheme: str = feature("none")
    scale: float = feature(1.0)


@dataclass(frozen=True, kw_only=True)
class LinearProblem(Problem):
    """`[m, k] @ [n, k]^T`; `heads` > 0 is a batched product per head (`head_linear`).

    `scheme` says how operands are quantized: "none", or one of `ops.quantize.LINEAR_SCHEMES`, or the one of
    `ops.quantize.BLOCK_SCHEMES` that the checkpoint stores the weight in. Under "int4" `group_size` numbers along k
    share a scale; all others have 0.
    """

    n: int
    k: int
    m: int = 0
    scheme: str = feature("none")
    group_size: int = 0
    bias: bool = feature(False)
    adapters: bool = feature(False)
    heads: int = feature(0)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings; `kind` is "none", "linear", "llama3" or "yarn".

    llama3: frequencies whose wavelength exceeds `original_context / low_freq_factor` are divided by `factor`, those
    below `original_context / high_freq_factor` stay, and in between the two are blended (Llama 3.1 model card).
    yarn: pairs that turn more than `beta_fast` times within `original_context` stay, those that turn less than
    `beta_slow` times are divided by `factor`, and in between the two are blended by the pair's number, whose bounds
    are rounded to whole pairs if `truncate` (Peng et al., 2023).
    `freq_factors` divides each frequency and comes from checkpoints that store the scaling as a list (LongRoPE) or as
    a tensor.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    original_context: int = 0
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RopeProblem(Problem):
    """Rotary embedding of the first `dim` of `head_dim` values; angles are computed in float32.

    `attention_factor` multiplies the rotated values (YaRN, LongRoPE), so that scores grow by its square.
    """

    dim: int
    base: float
    head_dim: int = 0
    q_heads: int = 0
    kv_heads: int = 0
    rows: int = 0
    max_position: int = 0
    scaling: RopeScaling = RopeScaling()
    interleaved: bool = feature(False)
    attention_factor: float = feature(1.0)


@dataclass(frozen=True, kw_only=True)
class KVProblem(Problem):
    """One paged cache. `dtype` is what kernels compute in, `kv_dtype` what pages hold; `v_dim` 0 stores no values."""

    kv_heads: int
    qk_dim: int
    v_dim: int
    page_size: int
    kv_dtype: str
    group: int = 0
    rows: int = 0
    kv_scheme: str = feature("none")

    @property
    def page_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array of one page in the canonical form, in canonical order."""
        heads = (self.page_size, self.kv_heads)
        dims = {name: dim for name, dim in (("k", self.qk_dim), ("v", self.v_dim)) if dim}
        found: dict[str, tuple[tuple[int, ...], str]]
        found = {name: ((*heads, dim), self.kv_dtype) for name, dim in dims.items()}
        if self.kv_scheme == "token_head":
            found |= {f"{name}_scale": (heads, "float32") for name in dims}
        if self.kv_scheme == "block":
            found |= {f"{name}_scale": ((*heads, dim // SCALE_BLOCK), "float32") for name, dim in dims.items()}
        return found

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in the canonical form."""
        return sum(math.prod(shape) * itemsize(dtype) for shape, dtype in self.page_arrays.values())


@dataclass(frozen=True, kw_only=True)
class RopeWriteProblem(RopeProblem, KVProblem):
    """A rotation, and the cache that takes the rotated keys: the fields of both, those of one name once.

    `head_dim` is `qk_dim`.
    """

    kv_heads: int

    @classmethod
    def of(cls, rope: RopeProblem, kv: KVProblem) -> RopeWriteProblem:
        """The problem of the two; what both say of heads, rows and dtype is the cache's."""
        return cls(**{**vars(rope), **vars(kv), "head_dim": kv.qk_dim})

    @property
    def rope(self) -> RopeProblem:
        """The rotation alone."""
        return RopeProblem(**{f.name: getattr(self, f.name) for f in fields(RopeProblem)})

    @property
    def kv(self) -> KVProblem:
        """The cache alone."""
        return KVProblem(**{f.name: getattr(self, f.name) for f in fields(KVProblem)})


@dataclass(frozen=True, kw_only=True)
class StateProblem(Problem):
    """Per-sequence state of attention-free layers (reserved: no op reads it yet)."""

    shape: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class AttendProblem(Problem):
    """Attention of a ragged batch over one paged cache."""

    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    page_size: int
    scale: float
    kv_dtype: str
    group: int = 0
    tokens: int = 0
    rows: int = 0
    pages: int = 0
    max_query: int = 0
    kv_scheme: str = feature("none")
    causal: bool = feature(True)
    window: int = feature(0)
    softcap: float = feature(0.0)
    sinks: bool = feature(False)
    value_in_key: bool = feature(False)
    return_lse: bool = feature(False)
    page_starts: bool = feature(False)
    key_ranges: bool = feature(False)
    ancestors: bool = feature(False)
    deferred_lens: bool = feature(False)


@dataclass(frozen=True, kw_only=True)
class MergeProblem(Problem):
    """Merging `parts` partial attention states over disjoint keys."""

    parts: int = 0
    rows: int = 0
    heads: int = 0
    v_dim: int = 0
    sinks: bool = feature(False)


@dataclass(frozen=True, kw_only=True)
class RouterProblem(Problem):
    """Choice of `k` of `experts` experts per token; with `groups`, only among the `group_top` best groups."""

    experts: int
    k: int
    rows: int = 0
    softmax: str = "before"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = feature(0)
    group_top: int = 1


@dataclass(frozen=True, kw_only=True)
class ExpertProblem(Problem):
    """Gated MLP of routed experts: `local` of `experts` experts live on this rank; capacity is static, T * k.

    `activation` is "silu", "gelu" or "swigluoai", that of gpt-oss, which alone has `swiglu_alpha` and `swiglu_limit`.
    """

    experts: int
    local: int
    hidden: int
    width: int
    k: int = 0
    rows: int = 0
    activation: str = "silu"
    scheme: str = feature("none")
    bias: bool = feature(False)
    swiglu_alpha: float = feature(0.0)
    swiglu_limit: float = feature(0.0)


@dataclass(frozen=True, kw_only=True)
class SampleProblem(Problem):
    """Everything that turns logits `[rows, vocab]` into ids; which optional inputs exist is a feature each.

    `edits` counts the sparse edits of a row, 0 where there are none; `typical` says that rows have a `typical_p`.
    """

    vocab: int
    rows: int = 0
    top: int = 0  # how many alternatives logprobs returns
    mask: bool = feature(False)
    edits: int = feature(0)
    typical: bool = feature(False)


@dataclass(frozen=True, kw_only=True)
class CollectiveProblem(Problem):
    """One collective over the mesh axes `axis` with `size` members; `shape` is the local input's."""

    axis: tuple[str, ...]
    size: int
    shape: tuple[int, ...]
    dim: int = 0
    concat_dim: int = 0
    src: int = 0
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class ConstProblem(Problem):
    """A small constant that depends on the rank (`vocab_start`, `expert_map`)."""

    shape: tuple[int, ...]


_ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "uint32": 4, "bfloat16": 2, "float16": 2}


def itemsize(dtype: str) -> int:
    """Bytes of one element of `dtype`, a name as NumPy and ml_dtypes spell it; one-byte types are the default.

    Raises KeyError for a name that is no dtype of the contract.
    """
    return 1 if dtype.startswith(("float8", "int8", "uint8", "bool")) else _ITEMSIZE[dtype]
