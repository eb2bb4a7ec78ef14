"""The peers on a GPU: cuDNN, FlashAttention-3 and FlashInfer, each where it is there."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measure import Contender
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


class FlashAttention3:
    """vLLM's build of FlashAttention-3, which takes ragged batches and paged caches."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._forward = torch.ops._vllm_fa3_C.fwd
        self._metadata = torch.ops._vllm_fa3_C.get_scheduler_metadata

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, causal: bool, window: int = -1
    ) -> Tensor:
        lengths = [ends, ends, None, None, None, longest, longest]
        return self._call(q, k, v, lengths, None, causal, window, None, 1)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = -1) -> Callable[[], Tensor]:
        batch, length = q.shape[:2]
        ends = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
        rows = [x.flatten(0, 1) for x in (q, k, v)]
        return lambda: self.varlen(*rows, ends, length, causal, window).unflatten(0, (batch, length))

    def with_kvcache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        used: Tensor,
        page_table: Tensor | None,
        ends: Tensor | None,
        longest: int | None,
        metadata: Tensor | None,
        qv: Tensor | None = None,
    ) -> Tensor:
        """Causal, ragged queries where `ends` is given."""
        lengths = [ends, None, None, None, used, longest, None]
        return self._call(q, k, v, lengths, page_table, True, -1, metadata, 0, qv)

    def metadata(
        self, used: Tensor, longest_q: int, longest_k: int, heads: tuple[int, int], ends: Tensor | None, page_size: int
    ) -> Tensor:
        """What it computes ahead of a causal call over such a cache, for heads of 128."""
        sizes = [used.shape[0], longest_q, longest_k, *heads, 128, 128, torch.bfloat16]
        window = [-1, -1]
        options = [page_size, 0, True, *window, False, 0, None, 0]
        return self._metadata(*sizes, used, ends, None, None, None, None, *options)

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[Any],
        page_table: Tensor | None,
        causal: bool,
        window: int,
        metadata: Tensor | None,
        splits: int,
        qv: Tensor | None = None,
    ) -> Tensor:
        cache = [page_table, *[None] * 5]  # index and left padding, rotary tables
        scales = [None] * 3
        scale = (q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5
        right = 0 if causal else -1
        options = [scale, causal, window, right, 0.0, True, metadata, splits, None, 0, None, 1, 0, None]
        return self._forward(q, k, v, None, None, qv, None, *lengths, *cache, *scales, *options)[0]


@functools.cache
def flash_attention_3() -> FlashAttention3 | None:
    library = os.environ.get("FA3_LIBRARY")
    return FlashAttention3(Path(library)) if library else None


@functools.cache
def flashinfer() -> ModuleType | None:
    try:
        return importlib.import_module("flashinfer")
    except ImportError:
        return None


def flashinfer_decode(q: Tensor, page_table: Tensor, pages: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A call of FlashInfer's that is planned: of pages (2 of each: keys and values), the table of which is full."""
    library = flashinfer()
    if library is None:
        return None
    batch, heads_q, head_dim = q.shape
    page_size, heads_k = pages.shape[2:4]

    def int32(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device="cuda")

    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=heads_q != heads_k,
        paged_kv_indptr_buffer=int32(batch + 1),
        paged_kv_indices_buffer=int32(page_table.numel()),
        paged_kv_last_page_len_buffer=int32(batch),
    )
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * page_table.shape[1]
    full = torch.full((batch,), page_size, dtype=torch.int32, device="cuda")
    sizes = (heads_q, heads_k, head_dim, page_size)
    wrapper.plan(starts, page_table.flatten(), full, *sizes, q_data_type=q.dtype, kv_data_type=pages.dtype)
    return lambda cache: wrapper.run(q, cache)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q_t, k_t, v_t, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])

    return call


def takes(contender: Contender) -> bool:
    """Whether a peer takes the call: not each takes every head size."""
    try:
        contender.call()
    except RuntimeError:
        return False
    return True
