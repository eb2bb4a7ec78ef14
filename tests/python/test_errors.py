"""Every wrong argument: the kind of error, that its message names the argument, and that nothing was written.

A case is a valid call, a change that makes it wrong, the kind of error, and a pattern that its message
matches.
"""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Call, metadata_arguments
from judge import check, check_unwritten
from reference import FP8

H, HK, D = 4, 2, 16
MISSING = object()  # as a changed value: leave the argument out


def bf16(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.5, dtype=torch.bfloat16)


def f32(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.5)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided_last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor whose last dimension is not contiguous."""
    return torch.full((*shape[:-1], 2 * shape[-1]), 0.5, dtype=dtype)[..., ::2]


# Valid calls: two sequences.


def func() -> Call:
    arguments = {
        "q": bf16(2, 5, H, D),
        "k": bf16(2, 7, HK, D),
        "v": bf16(2, 7, HK, 24),
        "out": bf16(2, 5, H, 24),
    }
    return Call("flash_attn_func", arguments)


def fp8() -> Call:
    arguments = {name: tensor.to(FP8) for name, tensor in func().arguments.items() if name != "out"}
    return Call("flash_attn_func", {**arguments, "out": bf16(2, 5, H, 24)})


def varlen() -> Call:
    arguments = {
        "q": bf16(8, H, D),
        "k": bf16(12, HK, D),
        "v": bf16(12, HK, 24),
        "cu_seqlens_q": int32(0, 5, 8),
        "cu_seqlens_k": int32(0, 3, 12),
        "max_seqlen_q": 5,
        "max_seqlen_k": 9,
        "out": bf16(8, H, 24),
    }
    return Call("flash_attn_varlen_func", arguments)


def varlen_padded() -> Call:
    call = func()
    lengths = {"seqused_q": int32(5, 1), "seqused_k": int32(7, 0)}
    bounds = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    return Call("flash_attn_varlen_func", {**call.arguments, **lengths, **bounds})


def varlen_paged() -> Call:
    call = varlen()
    pages = {"k": bf16(6, 4, HK, D), "v": bf16(6, 4, HK, 24)}
    table = {"page_table": int32([5, 0, 2], [1, 3, -1]), "seqused_k": int32(12, 8), "cu_seqlens_k": None}
    return Call("flash_attn_varlen_func", {**call.arguments, **pages, **table, "max_seqlen_k": 12})


def kvcache() -> Call:
    arguments = {
        "q": bf16(2, 3, H, D),
        "k_cache": bf16(2, 10, HK, D),
        "v_cache": bf16(2, 10, HK, 24),
        "cache_seqlens": int32(4, 7),
        "out": bf16(2, 3, H, 24),
    }
    return Call("flash_attn_with_kvcache", arguments)


def kvcache_ragged() -> Call:
    ragged = {"q": bf16(6, H, D), "cu_seqlens_q": int32(0, 4, 6), "max_seqlen_q": 4, "out": bf16(6, H, 24)}
    return Call("flash_attn_with_kvcache", {**kvcache().arguments, **ragged})


def leftpadded() -> Call:
    return Call("flash_attn_with_kvcache", {**kvcache().arguments, "cache_leftpad": int32(4, 0)})


def indexed() -> Call:
    rows = {"k_cache": bf16(5, 10, HK, D), "v_cache": bf16(5, 10, HK, 24), "cache_batch_idx": int32(4, 1)}
    return Call("flash_attn_with_kvcache", {**kvcache().arguments, **rows})


def paged() -> Call:
    pages = {
        "k_cache": bf16(6, 4, HK, D),
        "v_cache": bf16(6, 4, HK, 24),
        "page_table": int32([5, 0, 2], [1, 3, 4]),
    }
    return Call("flash_attn_with_kvcache", {**kvcache().arguments, **pages})


def append() -> Call:
    return Call("flash_attn_with_kvcache", {**kvcache().arguments, "k": bf16(2, 3, HK, D), "v": bf16(2, 3, HK, 24)})


def append_paged() -> Call:
    return Call("flash_attn_with_kvcache", {**paged().arguments, "k": bf16(2, 3, HK, D), "v": bf16(2, 3, HK, 24)})


def append_packed() -> Call:
    new = {"k": bf16(4, HK, D), "v": bf16(4, HK, 24), "cu_seqlens_k_new": int32(0, 3, 4)}
    return Call("flash_attn_with_kvcache", {**kvcache().arguments, **new})


def append_fp8() -> Call:
    call = append()
    caches = {name: call.arguments[name].to(FP8) for name in ("k_cache", "v_cache")}
    return Call("flash_attn_with_kvcache", {**call.arguments, **caches})


def rotary() -> Call:
    tables = {"rotary_cos": bf16(20, 8), "rotary_sin": bf16(20, 8), "rotary_seqlens": int32(4, 9)}
    return Call("flash_attn_with_kvcache", {**append().arguments, **tables})


def packed() -> Call:
    return Call("flash_attn_qkvpacked_func", {"qkv": bf16(2, 5, 3, H, D), "out": bf16(2, 5, H, D)})


def packed_grouped() -> Call:
    return Call(
        "flash_attn_qkvpacked_func",
        {"qkv": bf16(2, 5, H + 2 * HK, D), "num_heads_q": H, "out": bf16(2, 5, H, D)},
    )


def ranks() -> Call:
    parallel = {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": int32(14, 15)}
    return Call("flash_attn_func", {**func().arguments, **parallel})


def combine() -> Call:
    return Call(
        "flash_attn_combine",
        {"out_partial": f32(3, 2, 5, H, D), "lse_partial": f32(3, 2, 5, H), "out": f32(2, 5, H, D)},
    )


def plan() -> Call:
    sizes = {
        "batch_size": 2,
        "max_seqlen_q": 5,
        "max_seqlen_k": 10,
        "num_heads_q": H,
        "num_heads_kv": HK,
        "headdim": D,
    }
    return Call("get_scheduler_metadata", {**sizes, "cache_seqlens": int32(4, 7)})


VALID = [
    *(func, fp8, varlen, varlen_padded, varlen_paged, kvcache, kvcache_ragged, leftpadded, indexed, paged),
    *(append, append_paged, append_packed, append_fp8, rotary, packed, packed_grouped, ranks),
]

Case = tuple[Callable[[], Call], dict[str, Any], type, str]


def wrong_dtypes() -> list[Case]:
    cases: list[Case] = []
    for valid, names in (
        (func, ("q", "k", "v", "out")),
        (varlen, ("q", "k", "v")),
        (kvcache, ("q", "k_cache", "v_cache")),
        (append, ("k", "v")),
        (rotary, ("rotary_cos", "rotary_sin")),
    ):
        for name in names:
            tensor = valid().arguments[name]
            for dtype in (torch.float64, torch.int32):
                cases.append((valid, {name: tensor.to(dtype)}, TypeError, name))
    for name in ("k", "v"):
        cases.append((func, {name: func().arguments[name].half()}, TypeError, name))
        cases.append((append, {name: append().arguments[name].half()}, TypeError, name))
        cases.append((append, {name: append().arguments[name].to(FP8)}, TypeError, name))
        cases.append((func, {name: func().arguments[name].to(FP8)}, TypeError, "k|v"))  # the two of one type
    cases += [
        (func, {"out": bf16(2, 5, H, 24).half()}, TypeError, "out"),
        (fp8, {"out": f32(2, 5, H, 24)}, TypeError, "out"),
        (fp8, {"out": bf16(2, 5, H, 24).to(FP8)}, TypeError, "out"),
        (func, {"qv": bf16(2, 5, H, 24).half()}, TypeError, "qv"),
        (func, {"qv": f32(2, 5, H, 24)}, TypeError, "qv"),
        (fp8, {"q": f32(2, 5, H, D)}, TypeError, "q|k"),
        (rotary, {"rotary_sin": f32(20, 8)}, TypeError, "rotary_sin"),
        (packed, {"qkv": bf16(2, 5, 3, H, D).double()}, TypeError, "qkv"),
        (func, {"learnable_sink": bf16(H).double()}, TypeError, "learnable_sink"),
        (func, {"sinks": int32(*[0] * H)}, TypeError, "sinks|learnable_sink"),
        (combine, {"out_partial": bf16(3, 2, 5, H, D)}, TypeError, "out_partial"),
        (combine, {"lse_partial": bf16(3, 2, 5, H)}, TypeError, "lse_partial"),
        (combine, {"out": f32(2, 5, H, D).double()}, TypeError, "out"),
        (combine, {"out": MISSING, "out_dtype": torch.float64}, TypeError, "out_dtype"),
        (combine, {"out": MISSING, "out_dtype": "float32"}, TypeError, "out_dtype"),
        (plan, {"qkv_dtype": torch.float64}, TypeError, "qkv_dtype"),
        (plan, {"kv_dtype": torch.float64}, TypeError, "kv_dtype"),
    ]
    for name in ("q_descale", "k_descale", "v_descale"):
        cases.append((fp8, {name: bf16(2, HK)}, TypeError, name))
    # Integer tensors: int64 is the usual mistake.
    for valid, name in (
        (varlen, "cu_seqlens_q"),
        (varlen, "cu_seqlens_k"),
        (varlen_padded, "seqused_q"),
        (varlen_padded, "seqused_k"),
        (varlen_paged, "page_table"),
        (paged, "page_table"),
        (kvcache, "cache_seqlens"),
        (leftpadded, "cache_leftpad"),
        (indexed, "cache_batch_idx"),
        (append_packed, "cu_seqlens_k_new"),
        (rotary, "rotary_seqlens"),
        (ranks, "cp_tot_seqused_k"),
        (plan, "cache_seqlens"),
    ):
        tensor = valid().arguments[name]
        cases.append((valid, {name: tensor.long()}, TypeError, name + r".*int32.*int64|" + name + r".*int64.*int32"))
        cases.append((valid, {name: tensor.float()}, TypeError, name))
    table = int32([5, 0, 2], [1, 3, 0]).long()
    cases.append((varlen_paged, {"page_table": MISSING, "block_table": table}, TypeError, "(block|page)_table"))
    return cases


def wrong_kinds() -> list[Case]:
    """Arguments that are not of their Python type."""
    cases: list[Case] = []
    for name in ("q", "k", "v"):
        cases.append((func, {name: None}, TypeError, name))
        cases.append((func, {name: [[0.5]]}, TypeError, name))
    for name in ("qv", "q_descale", "out", "learnable_sink", "cp_tot_seqused_k"):
        cases.append((func, {name: 0.5}, TypeError, name))
    for name in ("cache_batch_idx", "cache_leftpad", "page_table", "seqused_q"):
        cases.append((kvcache, {name: [0, 1]}, TypeError, name))
    cases += [
        (func, {"causal": torch.ones(2)}, TypeError, "causal"),
        (func, {"batch_invariant": torch.ones(2)}, TypeError, "batch_invariant"),
        (kvcache, {"pack_gqa": torch.ones(2)}, TypeError, "pack_gqa"),
        (func, {"num_splits": 1.5}, TypeError, "num_splits"),
        (func, {"num_splits": "2"}, TypeError, "num_splits"),
        (func, {"sm_margin": 0.5}, TypeError, "sm_margin"),
        (func, {"attention_chunk": 2.5}, TypeError, "attention_chunk"),
        (func, {"window_size": 3}, TypeError, "window_size"),
        (func, {"window_size": (1.5, 0)}, TypeError, "window_size"),
        (func, {"window_size": ("1", 0)}, TypeError, "window_size"),
        (func, {"softmax_scale": "1"}, TypeError, "softmax_scale"),
        (func, {"softcap": "1"}, TypeError, "softcap"),
        (func, {"cp_world_size": 1.5}, TypeError, "cp_world_size"),
        (func, {"cp_rank": 0.5}, TypeError, "cp_rank"),
        (varlen, {"max_seqlen_q": 5.0}, TypeError, "max_seqlen_q"),
        (varlen, {"max_seqlen_k": "9"}, TypeError, "max_seqlen_k"),
        (kvcache, {"cache_seqlens": 4.5}, TypeError, "cache_seqlens"),
        (kvcache, {"cache_seqlens": [4, 7]}, TypeError, "cache_seqlens"),
        (packed_grouped, {"num_heads_q": 4.0}, TypeError, "num_heads_q"),
        (plan, {"batch_size": 2.0}, TypeError, "batch_size"),
        (plan, {"cache_seqlens": None}, ValueError, "cache_seqlens"),
        (func, {"no_such_argument": 1}, TypeError, "no_such_argument"),
    ]  # fmt: skip
    return cases


def wrong_shapes() -> list[Case]:
    return [
        # The number of dimensions.
        (func, {"q": bf16(5, H, D)}, ValueError, "q"),
        (func, {"k": bf16(7, HK, D)}, ValueError, "k"),
        (func, {"v": bf16(2, 1, 7, HK, 24)}, ValueError, "v"),
        (varlen, {"q": bf16(1, 8, H, D)}, ValueError, "q"),
        (varlen, {"k": bf16(1, 12, HK, D)}, ValueError, "k"),
        (varlen, {"v": bf16(12, 24)}, ValueError, "v"),
        (kvcache, {"k_cache": bf16(20, HK, D)}, ValueError, "k_cache"),
        (kvcache, {"v_cache": bf16(20, HK, 24)}, ValueError, "v_cache"),
        (append, {"k": bf16(6, HK, D)}, ValueError, "k"),
        (append_packed, {"k": bf16(1, 4, HK, D)}, ValueError, "k"),
        (func, {"qv": bf16(5, H, 24)}, ValueError, "qv"),
        (packed, {"qkv": bf16(2, 5, D)}, ValueError, "qkv"),
        (varlen, {"cu_seqlens_q": int32([0, 5, 8])}, ValueError, "cu_seqlens_q"),
        (varlen, {"cu_seqlens_k": int32([0, 3, 12])}, ValueError, "cu_seqlens_k"),
        (paged, {"page_table": int32(5, 0, 2)}, ValueError, "page_table"),
        (kvcache, {"cache_seqlens": int32([4], [7])}, ValueError, "cache_seqlens"),
        # The sizes.
        (func, {"k": bf16(3, 7, HK, D)}, ValueError, "k"),
        (func, {"k": bf16(2, 8, HK, D)}, ValueError, "k|v"),
        (func, {"v": bf16(2, 8, HK, 24)}, ValueError, "v"),
        (func, {"v": bf16(2, 7, 1, 24)}, ValueError, "v"),
        (func, {"k": bf16(2, 7, HK, D + 1)}, ValueError, "k"),
        (func, {"k": bf16(2, 7, 3, D), "v": bf16(2, 7, 3, 24)}, ValueError, "heads"),
        (func, {"q": bf16(2, 5, 5, D), "out": bf16(2, 5, 5, 24)}, ValueError, "heads"),
        (func, {"k": bf16(2, 7, 0, D), "v": bf16(2, 7, 0, 24)}, ValueError, "head|k"),
        (func, {"q": bf16(2, 5, H, 0), "k": bf16(2, 7, HK, 0)}, ValueError, "head|q|d"),
        (func, {"v": bf16(2, 7, HK, 0), "out": bf16(2, 5, H, 0)}, ValueError, "head|v|dv"),
        (func, {"q": bf16(2, 5, H, 513), "k": bf16(2, 7, HK, 513)}, ValueError, "512"),
        (func, {"v": bf16(2, 7, HK, 513), "out": bf16(2, 5, H, 513)}, ValueError, "512"),
        (func, {"qv": bf16(2, 5, H, D)}, ValueError, "qv"),
        (func, {"qv": bf16(2, 4, H, 24)}, ValueError, "qv"),
        (func, {"out": bf16(2, 5, H, D)}, ValueError, "out"),
        (func, {"out": bf16(2, 4, H, 24)}, ValueError, "out"),
        (func, {"out": bf16(10, H, 24)}, ValueError, "out"),
        (func, {"learnable_sink": bf16(HK)}, ValueError, "learnable_sink"),
        (func, {"learnable_sink": bf16(1, H)}, ValueError, "learnable_sink"),
        (fp8, {"q_descale": f32(2, H)}, ValueError, "q_descale"),
        (fp8, {"k_descale": f32(HK)}, ValueError, "k_descale"),
        (fp8, {"v_descale": f32(1, HK)}, ValueError, "v_descale"),
        (varlen, {"v": bf16(11, HK, 24)}, ValueError, "v"),
        (varlen, {"cu_seqlens_k": int32(0, 3, 9, 12)}, ValueError, "cu_seqlens_k"),
        (varlen, {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens_q"),
        (varlen_padded, {"seqused_q": int32(5, 1, 1)}, ValueError, "seqused_q"),
        (varlen_padded, {"seqused_k": int32(7)}, ValueError, "seqused_k"),
        (varlen_paged, {"page_table": int32([5, 0, 2])}, ValueError, "page_table"),
        (kvcache, {"k_cache": bf16(3, 10, HK, D)}, ValueError, "k_cache|v_cache"),
        (kvcache, {"k_cache": bf16(3, 10, HK, D), "v_cache": bf16(3, 10, HK, 24)}, ValueError, "k_cache"),
        (kvcache, {"v_cache": bf16(2, 11, HK, 24)}, ValueError, "v_cache"),
        (kvcache, {"cache_seqlens": int32(4, 7, 7)}, ValueError, "cache_seqlens"),
        (leftpadded, {"cache_leftpad": int32(0)}, ValueError, "cache_leftpad"),
        (indexed, {"cache_batch_idx": int32(4, 1, 0)}, ValueError, "cache_batch_idx"),
        (paged, {"v_cache": bf16(6, 5, HK, 24)}, ValueError, "v_cache"),
        (paged, {"v_cache": bf16(5, 4, HK, 24)}, ValueError, "v_cache"),
        (
            paged,
            {"k_cache": bf16(6, 0, HK, D), "v_cache": bf16(6, 0, HK, 24)},
            ValueError,
            "page_size|k_cache",
        ),
        (append, {"k": bf16(2, 2, HK, D)}, ValueError, "k|v"),
        (append, {"k": bf16(1, 3, HK, D)}, ValueError, "k"),
        (append, {"k": bf16(2, 3, HK, 24)}, ValueError, "k"),
        (append, {"v": bf16(2, 3, HK, D)}, ValueError, "v"),
        (append, {"v": bf16(2, 3, H, 24)}, ValueError, "v"),
        (append_packed, {"cu_seqlens_k_new": int32(0, 4)}, ValueError, "cu_seqlens_k_new"),
        (append_packed, {"v": bf16(5, HK, 24)}, ValueError, "v"),
        (rotary, {"rotary_sin": bf16(19, 8)}, ValueError, "rotary_sin"),
        (
            rotary,
            {"rotary_cos": bf16(20, 4), "rotary_sin": bf16(20, 4)},
            ValueError,
            "rotary_cos",
        ),  # dim 8, not 16
        (
            rotary,
            {"rotary_cos": bf16(20, 16), "rotary_sin": bf16(20, 16)},
            ValueError,
            "rotary_cos",
        ),  # dim 32 > d
        (rotary, {"rotary_cos": bf16(8), "rotary_sin": bf16(8)}, ValueError, "rotary_cos"),
        (rotary, {"rotary_seqlens": int32(4)}, ValueError, "rotary_seqlens"),
        (packed, {"qkv": bf16(2, 5, 2, H, D)}, ValueError, "qkv"),
        (packed_grouped, {"num_heads_q": 3}, ValueError, "num_heads_q"),
        (packed_grouped, {"num_heads_q": 8}, ValueError, "num_heads_q"),
        (packed_grouped, {"num_heads_q": 0}, ValueError, "num_heads_q"),
        (packed_grouped, {"num_heads_q": MISSING}, ValueError, "num_heads_q"),
        (ranks, {"cp_tot_seqused_k": int32(14)}, ValueError, "cp_tot_seqused_k"),
        (combine, {"out_partial": f32(3, 2, 5, H)}, ValueError, "out_partial"),
        (combine, {"lse_partial": f32(3, 2, H, 5)}, ValueError, "lse_partial"),
        (combine, {"lse_partial": f32(2, 2, 5, H)}, ValueError, "lse_partial"),
        (combine, {"out": f32(2, 5, H, D + 1)}, ValueError, "out"),
        (plan, {"cache_seqlens": int32(4, 7, 9)}, ValueError, "cache_seqlens"),
        (plan, {"cu_seqlens_q": int32(0, 5)}, ValueError, "cu_seqlens_q"),
        (plan, {"cache_leftpad": int32(0)}, ValueError, "cache_leftpad"),
        (plan, {"seqused_q": int32(0)}, ValueError, "seqused_q"),
        (plan, {"out": torch.zeros(1, 1, dtype=torch.int32)}, ValueError, "out"),
    ]


def missing_and_conflicting() -> list[Case]:
    cases: list[Case] = [
        # An argument that another one needs.
        (varlen, {"max_seqlen_q": None}, ValueError, "max_seqlen_q"),
        (varlen, {"max_seqlen_k": None}, ValueError, "max_seqlen_k"),
        (append, {"v": MISSING}, ValueError, "v"),
        (append, {"k": MISSING}, ValueError, "k"),
        (append, {"cache_seqlens": MISSING}, ValueError, "cache_seqlens"),
        (append_packed, {"cu_seqlens_k_new": MISSING}, ValueError, "k|cu_seqlens_k_new"),
        (rotary, {"rotary_cos": MISSING}, ValueError, "rotary_cos"),
        (rotary, {"rotary_sin": MISSING}, ValueError, "rotary_sin"),
        (rotary, {"k": MISSING, "v": MISSING}, ValueError, "rotary_cos|rotary|k"),
        (ranks, {"cp_tot_seqused_k": MISSING}, ValueError, "cp_tot_seqused_k"),
        (kvcache_ragged, {"max_seqlen_q": MISSING}, ValueError, "max_seqlen_q"),
        # What excludes one another.
        (varlen_paged, {"cu_seqlens_k": int32(0, 3, 12)}, ValueError, "cu_seqlens_k|page_table"),
        (rotary, {"cp_world_size": 2, "cp_tot_seqused_k": int32(14, 20)}, ValueError, "rotary|cp_world_size"),
        (combine, {"out_dtype": torch.float16}, (TypeError, ValueError), "out_dtype|out"),
        # Two aliases at once, and of two that both have a value.
        (func, {"sinks": bf16(H), "s_aux": bf16(H)}, TypeError, "sinks|s_aux"),
        (func, {"learnable_sink": bf16(H), "sinks": bf16(H)}, TypeError, "learnable_sink|sinks"),
        (kvcache, {"learnable_sink": bf16(H), "s_aux": bf16(H)}, TypeError, "learnable_sink|s_aux"),
        (paged, {"block_table": int32([5, 0, 2], [1, 3, 4])}, TypeError, "block_table|page_table"),
        (varlen_paged, {"block_table": int32([5, 0, 2], [1, 3, 4])}, TypeError, "block_table|page_table"),
        (func, {"return_attn_probs": True, "return_softmax_lse": True}, TypeError, "return_attn_probs"),
        (varlen, {"return_attn_probs": True, "return_softmax_lse": True}, TypeError, "return_attn_probs"),
        (packed, {"return_attn_probs": True, "return_softmax_lse": True}, TypeError, "return_attn_probs"),
        (plan, {"seqused_k": int32(4, 7)}, TypeError, "seqused_k|cache_seqlens"),
    ]  # fmt: skip
    return cases


def wrong_values() -> list[Case]:
    nan, inf = float("nan"), float("inf")
    cases: list[Case] = []
    for value in (nan, inf, -inf):
        cases.append((func, {"softmax_scale": value}, ValueError, "softmax_scale"))
        cases.append((func, {"softcap": value}, ValueError, "softcap"))
        cases.append((kvcache, {"softmax_scale": value}, ValueError, "softmax_scale"))
        cases.append((packed, {"softcap": value}, ValueError, "softcap"))
    return [
        *cases,
        (func, {"sinks": f32(H + 1)}, ValueError, "sinks must have shape"),
        (kvcache, {"s_aux": int32(0)}, TypeError, "s_aux must be"),
        (varlen_paged, {"page_table": MISSING, "block_table": f32(2, 2)}, TypeError, "block_table must be int32"),
        (paged, {"page_table": MISSING, "block_table": f32(2, 2)}, TypeError, "block_table must be int32"),
        (func, {"softmax_scale": 10**400}, ValueError, "softmax_scale"),
        (packed, {"num_heads_q": H + 1}, ValueError, "num_heads_q"),
        (packed_grouped, {"num_heads_q": 2}, ValueError, "num_heads_q must be a multiple"),
        (plan, {"num_heads_kv": 3}, ValueError, "num_heads_q must be a multiple of num_heads_kv = 3"),
        (plan, {"cache_seqlens": MISSING, "seqused_k": int32(1, 2, 3)}, ValueError, "seqused_k must have shape"),
        (plan, {"cache_seqlens": MISSING, "seqused_k": -1}, ValueError, "seqused_k must be from 0"),
        (func, {"num_splits": 257}, ValueError, "num_splits"),
        (varlen, {"num_splits": 1000}, ValueError, "num_splits"),
        (kvcache, {"num_splits": 257}, ValueError, "num_splits"),
        (plan, {"num_splits": 257}, ValueError, "num_splits"),
        (func, {"sm_margin": -1}, ValueError, "sm_margin"),
        (func, {"window_size": (1,)}, ValueError, "window_size"),
        (func, {"window_size": (1, 2, 3)}, ValueError, "window_size"),
        (func, {"window_size": ()}, ValueError, "window_size"),
        (func, {"cp_world_size": 0}, ValueError, "cp_world_size"),
        (func, {"cp_world_size": -2}, ValueError, "cp_world_size"),
        (func, {"cp_rank": 1}, ValueError, "cp_rank"),
        (ranks, {"cp_rank": 2}, ValueError, "cp_rank"),
        (ranks, {"cp_rank": -1}, ValueError, "cp_rank"),
        (plan, {"batch_size": -1}, ValueError, "batch_size"),
        (plan, {"num_heads_q": 3}, ValueError, "num_heads_q"),
        (plan, {"num_heads_kv": 0}, ValueError, "num_heads_kv"),
        (plan, {"headdim": 513}, ValueError, "headdim"),
        (plan, {"headdim": 0}, ValueError, "headdim"),
        (plan, {"headdim_v": 513}, ValueError, "headdim_v"),
        (plan, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
        (plan, {"cp_world_size": 2}, ValueError, "cp_tot_seqused_k"),
        (plan, {"out": torch.zeros(100_003, dtype=torch.int32)}, ValueError, "out"),
        (plan, {"out": torch.zeros(1)}, TypeError, "out"),
        # Lengths that the host can see.
        (varlen, {"max_seqlen_q": 4}, ValueError, "max_seqlen_q"),
        (varlen, {"max_seqlen_k": 8}, ValueError, "max_seqlen_k"),
        (varlen, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
        (kvcache_ragged, {"max_seqlen_q": 3}, ValueError, "max_seqlen_q"),
        (varlen, {"cu_seqlens_q": int32(0, 5, 9)}, ValueError, "cu_seqlens_q"),
        (varlen, {"cu_seqlens_q": int32(-1, 4, 8)}, ValueError, "cu_seqlens_q"),
        (varlen, {"cu_seqlens_q": int32(0, 5, 4)}, ValueError, "cu_seqlens_q"),
        (varlen, {"cu_seqlens_k": int32(0, 4, 13)}, ValueError, "cu_seqlens_k"),
        (varlen, {"cu_seqlens_k": int32(3, 0, 9)}, ValueError, "cu_seqlens_k"),
        (varlen_padded, {"seqused_q": int32(6, 1)}, ValueError, "seqused_q"),
        (varlen_padded, {"seqused_q": int32(-1, 1)}, ValueError, "seqused_q"),
        (varlen_padded, {"seqused_k": int32(8, 0)}, ValueError, "seqused_k"),
        (varlen_padded, {"seqused_k": int32(7, -1)}, ValueError, "seqused_k"),
        (varlen, {"seqused_q": int32(5, 4)}, ValueError, "seqused_q"),
        (varlen, {"seqused_k": int32(4, 9)}, ValueError, "seqused_k"),
        (varlen_paged, {"seqused_k": int32(13, 8)}, ValueError, "seqused_k"),
        (varlen_paged, {"page_table": int32([6, 0, 2], [1, 3, -1])}, ValueError, "page_table"),
        (varlen_paged, {"seqused_k": int32(12, 9)}, ValueError, "page_table"),
        (kvcache, {"cache_seqlens": int32(4, 11)}, ValueError, "cache_seqlens"),
        (kvcache, {"cache_seqlens": int32(-1, 7)}, ValueError, "cache_seqlens"),
        (kvcache, {"cache_seqlens": 11}, ValueError, "cache_seqlens"),
        (kvcache, {"cache_seqlens": -1}, ValueError, "cache_seqlens"),
        (leftpadded, {"cache_leftpad": int32(5, 0)}, ValueError, "cache_leftpad"),
        (leftpadded, {"cache_leftpad": int32(-1, 0)}, ValueError, "cache_leftpad"),
        (leftpadded, {"cache_seqlens": MISSING, "cache_leftpad": int32(11, 0)}, ValueError, "cache_leftpad"),
        (indexed, {"cache_batch_idx": int32(5, 1)}, ValueError, "cache_batch_idx"),
        (indexed, {"cache_batch_idx": int32(-1, 1)}, ValueError, "cache_batch_idx"),
        (paged, {"page_table": int32([6, 0, 2], [1, 3, 4])}, ValueError, "page_table"),
        (paged, {"page_table": int32([5, 0, 2], [1, -1, 4])}, ValueError, "page_table"),
        (append, {"cache_seqlens": int32(4, 8)}, ValueError, "cache_seqlens|k"),
        (append, {"cache_seqlens": 8}, ValueError, "cache_seqlens|k"),
        (append_packed, {"cache_seqlens": int32(8, 8)}, ValueError, "cache_seqlens|k"),
        (append_packed, {"cu_seqlens_k_new": int32(0, 3, 5)}, ValueError, "cu_seqlens_k_new"),
        (append_packed, {"cu_seqlens_k_new": int32(0, 3, 2)}, ValueError, "cu_seqlens_k_new"),
        (append_paged, {"cache_seqlens": int32(4, 10)}, ValueError, "cache_seqlens|k"),
        # Sequence 0 appends into page 0, sequence 1 into page 7, which is not there.
        (append_paged, {"page_table": int32([5, 0, 2], [1, 3, 7])}, ValueError, "page_table"),
        (ranks, {"cp_tot_seqused_k": int32(-1, 15)}, ValueError, "cp_tot_seqused_k"),
    ]  # fmt: skip


def wrong_strides() -> list[Case]:
    """A last dimension that must be contiguous is not."""
    return [
        (func, {"out": strided_last(2, 5, H, 24)}, ValueError, "out"),
        (kvcache, {"k_cache": strided_last(2, 10, HK, D)}, ValueError, "k_cache"),
        (kvcache, {"v_cache": strided_last(2, 10, HK, 24)}, ValueError, "v_cache"),
        (paged, {"k_cache": strided_last(6, 4, HK, D)}, ValueError, "k_cache"),
        (paged, {"v_cache": strided_last(6, 4, HK, 24)}, ValueError, "v_cache"),
        (varlen_paged, {"k": strided_last(6, 4, HK, D)}, ValueError, "k"),
        (varlen_paged, {"v": strided_last(6, 4, HK, 24)}, ValueError, "v"),
        (paged, {"page_table": strided_last(2, 3, dtype=torch.int32)}, ValueError, "page_table"),
        (rotary, {"rotary_cos": strided_last(20, 8)}, ValueError, "rotary_cos"),
        (rotary, {"rotary_sin": strided_last(20, 8)}, ValueError, "rotary_sin"),
    ]


def overlapping() -> list[Case]:
    """out in the place of an input."""
    partial, lse = f32(3, 2, 5, H, D), f32(3, 2, 5, H)
    between_rows = f32(3, 1, 9, H, 2 * D)
    packed = bf16(2, 6, 3, HK, D)
    in_packed = dict(zip("qkv", packed[:, :5].unbind(2)))
    return [
        (func, {**in_packed, "out": packed[:, 1:, 2]}, ValueError, "out"),
        (
            combine,
            {
                "out_partial": between_rows[:, :, :8, :, :D],
                "lse_partial": f32(3, 1, 8, H),
                "out": between_rows[0, :, 1:, :, :D],
            },
            ValueError,
            "out",
        ),
        (combine, {"out_partial": partial, "out": partial[0]}, ValueError, "out"),
        (combine, {"out_partial": f32(3, 2, 5, H, 1), "lse_partial": lse, "out": lse[2, ..., None]}, ValueError, "out"),
    ]


def other_devices() -> list[Case]:
    """One tensor lives elsewhere."""
    cases: list[Case] = []
    for valid, names in (
        (func, ("q", "k", "v", "out")),
        (varlen, ("cu_seqlens_q", "cu_seqlens_k")),
        (varlen_padded, ("seqused_q", "seqused_k")),
        (leftpadded, ("k_cache", "v_cache", "cache_seqlens", "cache_leftpad")),
        (indexed, ("cache_batch_idx",)),
        (paged, ("page_table",)),
        (append_packed, ("k", "v", "cu_seqlens_k_new")),
        (rotary, ("rotary_cos", "rotary_sin", "rotary_seqlens")),
        (ranks, ("cp_tot_seqused_k",)),
        (combine, ("lse_partial", "out")),
    ):
        for name in names:
            where = "device|meta" if name == "q" else rf"{name}.*(device|meta)|(device|meta).*{name}"
            cases.append((valid, {name: valid().arguments[name].to("meta")}, ValueError, where))
    more = {"learnable_sink": bf16(H), "qv": bf16(2, 5, H, 24), "q_descale": f32(2, HK)}
    cases += [(func, {name: tensor.to("meta")}, ValueError, name) for name, tensor in more.items()]
    return cases


CASES = [
    *wrong_dtypes(),
    *wrong_kinds(),
    *wrong_shapes(),
    *missing_and_conflicting(),
    *wrong_values(),
    *wrong_strides(),
    *overlapping(),
    *other_devices(),
]


def change_of(change: dict[str, Any]) -> str:
    """A change in a word, for the name of a test."""

    def brief(value: Any) -> str:
        if value is MISSING:
            return "missing"
        if isinstance(value, torch.Tensor):
            if value.dtype == torch.int32 and value.numel() < 8 and value.device.type == "cpu":
                return str(value.tolist())
            strided = "" if value.is_contiguous() or value.device.type == "meta" else " strided"
            return f"{value.device.type} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strided}"
        return str(value)

    return ", ".join(f"{name}={brief(value)}" for name, value in change.items())


@pytest.mark.parametrize("valid", VALID, ids=lambda valid: valid.__name__)
def test_unchanged_calls_are_right(mate: ModuleType, valid: Callable[[], Call]) -> None:
    check(valid(), mate)


def test_unchanged_plan_and_combine_are_right(mate: ModuleType) -> None:
    assert mate.get_scheduler_metadata(**plan().arguments).dtype == torch.int32
    out, lse = mate.flash_attn_combine(**combine().arguments)
    assert torch.equal(out, f32(2, 5, H, D))
    torch.testing.assert_close(lse, f32(2, 5, H) + torch.tensor(3.0).log())


@pytest.mark.parametrize(
    ("valid", "change", "kind", "pattern"),
    CASES,
    ids=[f"{valid.__name__}: {change_of(change)}" for valid, change, _, _ in CASES],
)
def test_wrong_argument(mate: ModuleType, valid: Callable, change: dict, kind: Any, pattern: str) -> None:
    call = valid()
    arguments = {name: value for name, value in {**call.arguments, **change}.items() if value is not MISSING}
    before = copy.deepcopy(arguments)
    with pytest.raises(kind) as caught:
        getattr(mate, call.function)(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b(?:{pattern})\b", message), message
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # no other error is printed before it
    check_unwritten(arguments, before)


@pytest.mark.parametrize("valid", [varlen, varlen_paged, kvcache, append], ids=lambda valid: valid.__name__)
@pytest.mark.parametrize("wrong", ["longer", "shorter", "2-d", "int64", "float", "meta", "list"])
def test_wrong_scheduler_metadata(mate: ModuleType, valid: Callable[[], Call], wrong: str) -> None:
    call = valid()
    metadata = mate.get_scheduler_metadata(**metadata_arguments(call))
    changed, kind = {
        "longer": (torch.cat([metadata, metadata.new_zeros(1)]), ValueError),
        "shorter": (metadata[:-1], ValueError),
        "2-d": (metadata[None], ValueError),
        "int64": (metadata.long(), TypeError),
        "float": (metadata.float(), TypeError),
        "meta": (metadata.to("meta"), ValueError),
        "list": (metadata.tolist(), TypeError),
    }[wrong]
    before = copy.deepcopy(call.arguments)
    with pytest.raises(kind, match="scheduler_metadata"):
        call.run(mate, scheduler_metadata=changed)
    check_unwritten(call.arguments, before)


def on_meta(call: Call) -> dict[str, Any]:
    return {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.arguments.items()
    }


@pytest.mark.parametrize(
    "valid", [func, varlen, paged, append, packed, combine, plan], ids=lambda valid: valid.__name__
)
def test_a_device_without_a_backend(mate: ModuleType, valid: Callable[[], Call]) -> None:
    call = valid()
    with pytest.raises(NotImplementedError, match="meta"):
        getattr(mate, call.function)(**on_meta(call))


MUSA_CALL = """
import torch
import mate

torch.utils.rename_privateuse1_backend("musa")


class MusaTensor(torch.Tensor):  # as far as one can be had without the device: it has no memory
    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device="musa")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.new_empty.default:
            return cls(args[1])
        return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))


q = MusaTensor((1, 2, 3, 8))
try:
    mate.flash_attn_func(q, q, q)
except NotImplementedError as error:
    print(error)
"""


def test_musa_has_no_backend_yet() -> None:
    # In a process of its own: the device's name would stay with this one.
    printed = subprocess.run([sys.executable, "-c", MUSA_CALL], capture_output=True, text=True, check=True).stdout
    assert "no backend for the device musa" in printed


def test_a_message_says_what_it_was_and_what_it_must_be(mate: ModuleType) -> None:
    call = paged()
    call.arguments["page_table"] = call.arguments["page_table"].long()
    with pytest.raises(TypeError, match=r"page_table must be int32, got int64"):
        call.run(mate)


def test_new_lengths_without_new_keys_are_ignored(mate: ModuleType) -> None:
    call = kvcache()
    call.arguments["cu_seqlens_k_new"] = int32(0, 1, 2)
    check(call, mate)


def test_page_table_entries_that_no_sequence_needs_may_hold_anything(mate: ModuleType) -> None:
    call = paged()
    call.arguments["page_table"] = int32([5, -1, 2**31 - 1], [1, 3, -(2**31)])
    call.arguments["cache_seqlens"] = int32(4, 7)
    check(call, mate)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"rotary_seqlens": int32(4, 18)}, "rotary_cos"),
        ({"rotary_seqlens": int32(4, -1)}, "rotary_seqlens"),
        ({"rotary_seqlens": MISSING, "rotary_cos": bf16(9, 8), "rotary_sin": bf16(9, 8)}, "rotary_cos"),
    ],
    ids=["past the table", "before the table", "cache_seqlens past the table"],
)
def test_rotary_positions_are_clamped_and_with_mate_check_refused(
    mate: ModuleType, monkeypatch: pytest.MonkeyPatch, change: dict, pattern: str
) -> None:
    call = rotary()
    call.arguments = {name: x for name, x in {**call.arguments, **change}.items() if x is not MISSING}
    before = copy.deepcopy(call.arguments)
    monkeypatch.setenv("MATE_CHECK", "1")
    with pytest.raises(ValueError, match=pattern):
        call.run(mate)
    check_unwritten(call.arguments, before)
    monkeypatch.setenv("MATE_CHECK", "0")
    check(call, mate)


def test_mate_check_accepts_what_is_right(mate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATE_CHECK", "1")
    for valid in VALID:
        check(valid(), mate)


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ({"num_splits": 2**70}, ValueError, "^num_splits must fit"),
        ({"window_size": (2**70, 0)}, ValueError, "^window_size must fit"),
        ({"window_size": iter([1, 2, 3])}, ValueError, "^window_size must have two"),
        ({"attention_chunk": 2**63}, ValueError, "^attention_chunk must fit"),
        ({"softcap": "1"}, TypeError, "^softcap must be a number"),
        ({"k_cache": None}, TypeError, "^k_cache must be a torch.Tensor"),
        ({"cache_seqlens": 2**40}, ValueError, "^cache_seqlens must be"),
        ({"cache_seqlens": 4, "k_cache": None}, TypeError, "^k_cache must be a torch.Tensor"),
        ({"cache_seqlens": 4, "k_cache": torch.zeros(16)}, ValueError, "^k_cache must have 4 dimensions"),
        ({"cache_seqlens": 4, "page_table": [[0]]}, TypeError, "^page_table must be a torch.Tensor"),
        ({"cache_seqlens": 4, "cu_seqlens_q": [0, 1]}, TypeError, "^cu_seqlens_q must be a torch.Tensor"),
        ({"q": torch.zeros(2, 1, 4, 16).to_sparse()}, TypeError, "^q must be a dense tensor"),
        ({"out": torch.zeros(1, 1, 1, 16).expand(2, 1, 4, 16)}, ValueError, "^out must not be broadcast"),
    ],
    ids=str,
)
def test_odd_values(mate: ModuleType, arguments: dict, kind: Any, pattern: str) -> None:
    call: dict[str, Any] = {"q": torch.zeros(2, 1, 4, 16), "k_cache": torch.zeros(2, 8, 2, 16)}
    call["v_cache"] = call["k_cache"].clone()
    with pytest.raises(kind, match=pattern):
        mate.flash_attn_with_kvcache(**{**call, **arguments})


def test_results_may_lie_between_inputs(mate: ModuleType) -> None:
    packed = torch.randn(2, 5, 4, 2, 16)
    q, k, v, out = packed.unbind(2)
    expected = mate.flash_attn_func(q, k, v)
    assert torch.equal(mate.flash_attn_func(q, k, v, out=out), expected)
    pool = torch.randn(4, 16, 2, 16)
    mate.flash_attn_func(q, pool[0::3], pool[0::3], out=pool[1:3, :5])


@pytest.mark.parametrize("value", ["False", None, [True], torch.ones(2, dtype=torch.bool)], ids=str)
def test_flags_are_bools_or_numbers(mate: ModuleType, value: Any) -> None:
    q = torch.randn(1, 5, 2, 16)
    with pytest.raises(TypeError, match=r"^causal must be a bool"):
        mate.flash_attn_func(q, q, q, causal=value)
    assert torch.equal(mate.flash_attn_func(q, q, q, causal=1), mate.flash_attn_func(q, q, q, causal=True))


def test_an_appended_cache_is_of_tensors(mate: ModuleType) -> None:
    cache = torch.zeros(2, 8, 2, 16).numpy()
    new = torch.ones(2, 1, 2, 16)
    with pytest.raises(TypeError, match=r"^v_cache must be a torch\.Tensor"):
        mate.flash_attn_with_kvcache(new, torch.zeros(2, 8, 2, 16), cache, new, new, cache_seqlens=3)
    assert not cache.any()


def test_results_do_not_overlap_inputs(mate: ModuleType) -> None:
    q, cache = torch.zeros(1, 5, 2, 16), torch.zeros(2, 8, 2, 16)
    with pytest.raises(ValueError, match=r"^out must not overlap"):
        mate.flash_attn_func(q, q.clone(), q.clone(), out=q)
    partial = torch.zeros(2, 1, 3, 2, 32)[..., :16]
    with pytest.raises(ValueError, match=r"^out must not overlap out_partial"):
        mate.flash_attn_combine(partial, torch.zeros(2, 1, 3, 2), out=partial[0])
    shared = cache[:1].expand(2, 8, 2, 16)
    new = torch.zeros(2, 1, 2, 16)
    with pytest.raises(ValueError, match=r"^k_cache must not be broadcast"):
        mate.flash_attn_with_kvcache(new, shared, cache, new, new, cache_seqlens=3)


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ({"batch_size": 2**40}, ValueError, "^batch_size must be"),
        ({"qkv_dtype": "bfloat16"}, TypeError, "^qkv_dtype must be a torch.dtype"),
        ({"kv_dtype": 3}, TypeError, "^kv_dtype must be a torch.dtype"),
        ({"qkv_dtype": torch.float32, "kv_dtype": torch.float8_e4m3fn}, TypeError, "^kv_dtype must be float32"),
        ({"cu_seqlens_q": [0, 1]}, TypeError, "^cu_seqlens_q must be a torch.Tensor"),
    ],
    ids=str,
)
def test_odd_values_of_a_plan(mate: ModuleType, arguments: dict, kind: Any, pattern: str) -> None:
    call = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 9, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 16}
    with pytest.raises(kind, match=pattern):
        mate.get_scheduler_metadata(**{**call, "cache_seqlens": torch.tensor([3, 4], dtype=torch.int32), **arguments})
