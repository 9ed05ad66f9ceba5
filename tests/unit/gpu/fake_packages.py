"""Stand-ins for packages that need a GPU: their entry points with exactly the signatures of their sources, over plain
sums on the host. What they refuse there, they refuse here.

FlashInfer 0.6.18 (flashinfer/decode.py, prefill.py), FlashAttention 2.8.4 (flash_attn/flash_attn_interface.py) and
3.0.0 (hopper/flash_attn_interface.py), AITER of August 2026 (aiter/ops/rmsnorm.py, activation.py).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch


@torch.library.custom_op("gpu_fakes::paged", mutates_args=("out",))
def paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    page_starts: torch.Tensor,
    pages: torch.Tensor,
    lens: torch.Tensor,
    scale: float,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """One causal attention of a ragged batch, in float64; rows of `out` that belong to no entry stay as they are."""
    group = q.shape[1] // k.shape[2]
    for e, keys in enumerate(lens.tolist()):
        start, stop = query_starts[e : e + 2].tolist()
        held = pages[page_starts[e] : page_starts[e + 1]].long()
        key, value = (a[held].flatten(0, 1)[:keys].double().repeat_interleave(group, 1) for a in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].double(), key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(keys)[None] > torch.arange(keys - (stop - start), keys)[:, None]
        weights = scores.masked_fill(behind, -torch.inf).softmax(-1).nan_to_num()
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, value).to(out.dtype)


# ---- FlashInfer ------------------------------------------------------------------------------------------------------


class _Wrapper:
    """What both wrappers of FlashInfer do in their CUDA-graph mode: the plan is copied into the buffers given."""

    made: list[Any] = []

    def _begin(self, workspace: torch.Tensor, layout: str, graph: bool, buffers: list[torch.Tensor | None]) -> None:
        assert graph and layout == "NHD" and workspace.dtype == torch.uint8 and not workspace.count_nonzero()
        assert all(torch.is_tensor(buffer) and buffer.dtype == torch.int32 for buffer in buffers)
        self._starts, self._pages, self._last = buffers[-3:]
        self.plans = 0
        self.made.append(self)

    def _keep(self, indptr: Any, indices: Any, last: Any, heads: tuple[int, int, int], page: int) -> None:
        assert indptr.device.type == indices.device.type == last.device.type == "cpu"
        if len(last) != len(self._last) or len(indptr) != len(last) + 1:
            raise ValueError("The batch size should be fixed in cudagraph mode")
        if len(indices) > len(self._pages):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        assert indptr[-1] == len(indices) and (indptr.diff() >= 1).all() and ((last >= 1) & (last <= page)).all()
        self._starts.copy_(indptr)
        self._last.copy_(last)
        self._pages[: len(indices)].copy_(indices)
        self._heads, self._page = heads, page
        self.plans += 1

    def _lens(self) -> torch.Tensor:
        return (self._starts.diff() - 1) * self._page + self._last

    def _attend(self, q: torch.Tensor, cache: Any, starts: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        k, v = cache
        assert k.shape[1:] == v.shape[1:] == (self._page, self._heads[1], self._heads[2])
        assert q.shape[1:] == (self._heads[0], self._heads[2]) and q.is_contiguous() and out is not None
        paged(q, k, v, starts, self._starts, self._pages, self._lens(), self._scale, self._softcap or 0.0, out)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        buffers = [paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer]
        self._begin(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> None:
        if not self.use_tensor_cores and num_qo_heads // num_kv_heads not in (1, 2, 3, 4, 6, 8):
            raise ValueError("Unsupported group_size")
        self._keep(indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim), page_size)
        self._scale, self._softcap, self._dtype = sm_scale, logits_soft_cap, q_data_type

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        assert q.dtype == self._dtype and q.shape[0] == len(self._last)
        return self._attend(q, paged_kv_cache, torch.arange(q.shape[0] + 1), out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        buffers = [qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf]
        self._begin(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._queries, self._most = qo_indptr_buf, -1

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        assert causal and qo_indptr.dtype == torch.int32 and (qo_indptr.diff() >= 0).all()
        total = int(qo_indptr[-1])
        if self._most < 0:
            self._most = total
        if total > self._most:
            raise ValueError("The total number of rows in qo_indptr cannot exceed that set during initialization")
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self._keep(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, heads, page_size)
        self._queries.copy_(qo_indptr)
        self._total, self._scale, self._softcap, self._dtype = total, sm_scale, logits_soft_cap, q_data_type

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        if q.size(0) != self._total:
            raise ValueError(f"q.shape[0] ({q.size(0)}) does not match qo_indptr[-1] ({self._total})")
        assert q.dtype == self._dtype
        return self._attend(q, paged_kv_cache, self._queries, out)


# ---- FlashAttention --------------------------------------------------------------------------------------------------


def _by_table(q: Any, k: Any, v: Any, starts: Any, lens: Any, table: Any, scale: float, softcap: float) -> Any:
    """Over a page table; what belongs to no row is left as it was allocated, here NaN."""
    assert starts.dtype == lens.dtype == table.dtype == torch.int32 and k.stride(-1) == v.stride(-1) == 1
    out = torch.full_like(q, torch.nan)
    columns = torch.arange(len(lens) + 1, dtype=torch.int32) * table.shape[1]
    paged(q, k, v, starts, columns, table.flatten(), lens, scale, softcap, out)
    return out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    if k.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    assert causal and max_seqlen_k <= block_table.shape[1] * k.shape[1] and isinstance(max_seqlen_q, int)
    return _by_table(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale, softcap)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    assert causal and max_seqlen_q is not None
    return _by_table(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, softcap)


# ---- AITER -----------------------------------------------------------------------------------------------------------


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> torch.Tensor:
    assert input.dim() == 2 and input.is_contiguous() and weight.dtype == input.dtype
    wide = input.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()).to(input.dtype)


def silu_and_mul(out: torch.Tensor, input: torch.Tensor, limit: float = 0.0) -> None:
    assert out.is_contiguous() and input.is_contiguous() and input.shape[-1] == 2 * out.shape[-1]
    gate, up = input.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


PACKAGES: dict[str, list[Any]] = {
    "flashinfer": [BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper],
    "flash_attn": [flash_attn_varlen_func],
    "flash_attn_interface": [flash_attn_with_kvcache],
    "aiter": [rms_norm, silu_and_mul],
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages be importable."""
    for name, found in PACKAGES.items():
        module = ModuleType(name)
        for entry in found:
            setattr(module, entry.__name__, entry)
        monkeypatch.setitem(sys.modules, name, module)
