"""Offsets beyond 2**31 elements. The storage is far larger than what is touched of it, so that it costs little."""

from types import ModuleType

import torch
from judge import same_bits
from reference import FP8

FAR = 2**31 + 64


def values(*shape: int, device: str) -> torch.Tensor:
    """Of the smallest type."""
    x = torch.randn(shape, device=device)
    return x.to(FP8)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x (2, n, heads, d) with its second row more than 2**31 elements behind the first."""
    inner = x[0].contiguous()
    memory = torch.empty(FAR + inner.numel(), dtype=x.dtype, device=x.device)
    result = memory.as_strided(x.shape, (FAR, *inner.stride()))
    return result.copy_(x)


def test_cache_rows(mate: ModuleType, device: str) -> None:
    q = torch.randn(2, 3, 4, 16, device=device, dtype=torch.bfloat16)
    cache_k, cache_v = (values(2, 90, 2, 16, device=device) for _ in range(2))
    new = torch.randn(2, 3, 2, 16, device=device, dtype=torch.bfloat16)
    options = {"cache_seqlens": 80, "causal": True, "return_softmax_lse": True}
    far_k, far_v = far_apart(cache_k), far_apart(cache_v)
    got = mate.flash_attn_with_kvcache(q, far_k, far_v, new, new, **options)
    want = mate.flash_attn_with_kvcache(q, cache_k, cache_v, new, new, **options)
    assert same_bits(got, want)
    assert same_bits((far_k, far_v), (cache_k, cache_v))


def test_pages(mate: ModuleType, device: str) -> None:
    q = torch.randn(1, 3, 4, 16, device=device, dtype=torch.bfloat16)
    pages = values(2, 40, 2, 16, device=device)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    options = {"cache_seqlens": 71, "page_table": table, "return_softmax_lse": True}
    far = far_apart(pages)
    got = mate.flash_attn_with_kvcache(q, far, far, **options)
    assert same_bits(got, mate.flash_attn_with_kvcache(q, pages, pages, **options))


def test_queries_and_out(mate: ModuleType, device: str) -> None:
    q, k = (values(2, n, 2, 8, device=device) for n in (5, 30))
    out = far_apart(torch.zeros(2, 5, 2, 8, device=device, dtype=torch.bfloat16))
    got = mate.flash_attn_func(far_apart(q), k, k, out=out)
    assert same_bits(got, mate.flash_attn_func(q, k, k))


def test_keys(mate: ModuleType, device: str) -> None:
    q, k, v = (values(2, n, 2, 16, device=device) for n in (5, 90, 90))
    got = mate.flash_attn_func(q, far_apart(k), far_apart(v), causal=True, return_attn_probs=True)
    assert same_bits(got, mate.flash_attn_func(q, k, v, causal=True, return_attn_probs=True))
