"""The functions of FlashAttention-3's interface, and what only MATE has in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mate._arguments import (
    Index,
    Number,
    check_tensor,
    chunk,
    contiguous_rows,
    dtype,
    integer,
    one_of,
    same_length,
    window,
)
from mate._calls import (
    CACHE_NAMES,
    PACKED_NAMES,
    PLAIN_NAMES,
    AttentionCall,
    CombineCall,
    SchedulerMetadataCall,
    attention_call,
)
from mate._dispatch import run_attention, run_combine, run_scheduler_metadata

Window = Sequence["Index | None"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: Number | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: Index | None = 0,
    softcap: Number = 0.0,
    num_splits: Index = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: Index = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: Index = 1,
    cp_rank: Index = 0,
    cp_tot_seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries over keys and values of one length each.

    With b the batch, sq and sk the lengths, h query heads over hk key heads (h a multiple of hk), d the head size of
    q and k and dv that of v (any integers from 1 to 512), and query row i aligned to key i + sk - sq::

        s[i, j] = softmax_scale * (q[i] . k[j] + qv[i] . v[j])    capped; -inf where key j is hidden from row i
        lse[i] = log(sum_j exp(s[i, j]) + exp(sink))
        out[i] = sum_j exp(s[i, j] - lse[i]) * v[j]

    A row that sees no key has out 0 and lse -inf (the sink, where there is one).

    Args:
        q: (b, sq, h, d): bfloat16, float16, float32 (CPU only) or float8_e4m3fn.
        k: (b, sk, hk, d), of q's type; float8_e4m3fn also under bfloat16 or float16 queries.
        v: (b, sk, hk, dv), of k's type.
        softmax_scale: any finite number; (d + (dv if qv is given else 0)) ** -0.5 by default.
        causal: row i sees keys up to i + sk - sq.
        qv: (b, sq, h, dv), of q's type: adds its product with v to the scores.
        q_descale: float32 (b, hk), for float8_e4m3fn: what q and qv are multiplied by. 1 by default.
        k_descale: the same for k.
        v_descale: the same for v.
        window_size: (left, right): how many keys before and after its own position a row sees; a negative number or
            None is no bound. With causal, right is 0.
        attention_chunk: c > 0: a row sees only keys of its own chunk of c positions.
        softcap: c > 0: scores become c * tanh(score / c).
        num_splits: how many parts the keys are cut into: 1 none, 0 the library decides, n > 1 (at most 256) exactly n.
        pack_gqa: whether the query heads of a group share a tile; None: the library decides.
        deterministic: accepted; the forward pass always gives the same bits for the same call.
        sm_margin: how many multiprocessors (on the CPU: threads) are left free.
        return_attn_probs: return lse too.
        learnable_sink: (h,), bfloat16, float16 or float32: a score for each head that takes part in the sum only.
        sinks: another name of learnable_sink.
        s_aux: another name of learnable_sink.
        cp_world_size: W > 1: context parallel. This rank holds the keys whose global position is j * W + cp_rank, and
            computes its partial result; :func:`flash_attn_combine` merges those of all ranks.
        cp_rank: this rank, from 0 to W - 1.
        cp_tot_seqused_k: int32 (b,): the keys of all ranks; required with W > 1.
        out: (b, sq, h, dv), of q's type (bfloat16 or float16 for float8_e4m3fn): where the result is written.
        return_softmax_lse: another name of return_attn_probs.
        batch_invariant: the bits of a row do not depend on the batch around its sequence, nor on the machine's size.

    Returns:
        out (b, sq, h, dv); with return_attn_probs, (out, lse) with lse float32 (b, h, sq), natural log.

    Raises:
        TypeError: an argument of a wrong type or dtype, or given under two names.
        ValueError: a wrong shape, value or combination.
        NotImplementedError: a device or type that no backend serves; backward.

    Nothing has been written when an error is raised. Source: https://arxiv.org/abs/2407.08608 (FlashAttention-3).
    """
    left, right = window(window_size)
    call = attention_call(
        PLAIN_NAMES,
        contiguous_rows("q", q),
        contiguous_rows("k", k),
        contiguous_rows("v", v),
        None if qv is None else contiguous_rows("qv", qv),
        softmax_scale,
        causal,
        left,
        right,
        chunk(attention_chunk),
        softcap,
        q_descale,
        k_descale,
        v_descale,
        _sink(learnable_sink, sinks, s_aux),
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        num_splits,
        pack_gqa,
        sm_margin,
        batch_invariant,
    )
    return_lse = _return_lse(return_attn_probs, return_softmax_lse)
    return _attention("flash_attn_func", call, out, return_lse, sinks, s_aux)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: Index | None,
    max_seqlen_k: Index | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: Index | None = 0,
    softcap: Number = 0.0,
    num_splits: Index = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: Index = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: Index = 1,
    cp_rank: Index = 0,
    cp_tot_seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    batch_invariant: bool = False,
    page_table: Tensor | None = None,
    block_table: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences of different lengths. What is not said here is as in :func:`flash_attn_func`.

    Args:
        q: ragged (total_q, h, d) with cu_seqlens_q, else (b, sq, h, d).
        k: ragged (total_k, hk, d) with cu_seqlens_k; paged (num_pages, page_size, hk, d) with page_table; else
            (b, sk, hk, d).
        v: like k, with head size dv.
        cu_seqlens_q: int32 (b + 1,): sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q. None: q is not
            ragged.
        cu_seqlens_k: the same of k and v.
        max_seqlen_q: no sequence has more query rows; required with cu_seqlens_q.
        max_seqlen_k: no sequence has more keys; required with cu_seqlens_k.
        seqused_q: int32 (b,): only the first seqused_q[i] rows of sequence i are used; its other rows of out are 0,
            of lse -inf.
        seqused_k: int32 (b,): only the first seqused_k[i] keys of sequence i are used.
        page_table: int32 (b, max_pages): position t of sequence i is row t % page_size of page
            page_table[i, t // page_size].
        block_table: another name of page_table.
        scheduler_metadata: from :func:`get_scheduler_metadata` of the same lengths; read where num_splits is 0.

    Returns:
        out, shaped like q with head size dv; with return_attn_probs, (out, lse) with lse float32 (h, total_q) for
        ragged queries, else (b, h, sq).
    """
    page_table = _page_table(page_table, block_table)
    is_cache = page_table is not None
    left, right = window(window_size)
    call = attention_call(
        PLAIN_NAMES,
        contiguous_rows("q", q),
        k if is_cache else contiguous_rows("k", k),
        v if is_cache else contiguous_rows("v", v),
        None if qv is None else contiguous_rows("qv", qv),
        softmax_scale,
        causal,
        left,
        right,
        chunk(attention_chunk),
        softcap,
        q_descale,
        k_descale,
        v_descale,
        _sink(learnable_sink, sinks, s_aux),
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        num_splits,
        pack_gqa,
        sm_margin,
        batch_invariant,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        page_table,
        scheduler_metadata,
    )
    return_lse = _return_lse(return_attn_probs, return_softmax_lse)
    return _attention("flash_attn_varlen_func", call, out, return_lse, sinks, s_aux, block_table)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Index | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: Index | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: Index | None = 0,
    softcap: Number = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: Index = 0,
    pack_gqa: bool | None = None,
    sm_margin: Index = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: Index = 1,
    cp_rank: Index = 0,
    cp_tot_seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    seqused_q: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None, None]:
    """Attention over a cache of keys and values, to which new ones may be appended, rotated, in the same call.

    What is not said here is as in :func:`flash_attn_func`.

    Args:
        q: (b, sq, h, d), or ragged (total_q, h, d) with cu_seqlens_q.
        k_cache: (b, capacity, hk, d), or paged (num_pages, page_size, hk, d) with page_table.
        v_cache: like k_cache, with head size dv.
        k: (b, s_new, hk, d), or packed (total_new, hk, d) with cu_seqlens_k_new: new keys, written into k_cache in
            place at positions cache_seqlens[i] onward before the attention sees them. Needs v and cache_seqlens. Of
            q's type; over a float8_e4m3fn cache divided by k_descale and rounded, or float8_e4m3fn as they are.
        v: the same for v_cache, with head size dv and v_descale.
        rotary_cos: (seqlen_ro, rotary_dim / 2), of q's type or bfloat16, float16, float32: rotary embedding of the
            first rotary_dim dimensions (a multiple of 16) of new keys and of queries. Needs k and v. New key t of
            sequence i stands at position R + t, with R rotary_seqlens[i] if given, else cache_seqlens[i]; query row t
            at R + t where the call is causal, windowed or chunked, else at R.
        rotary_sin: like rotary_cos.
        cache_seqlens: int32 (b,), or one integer for all: the keys in the cache, without the new ones. The whole
            capacity by default.
        cache_batch_idx: int32 (b,): the row of the cache, or of page_table, that sequence i reads and appends to.
        cache_leftpad: int32 (b,): where in its cache row sequence i starts; cache_seqlens counts from the row's start.
        page_table: int32 (b, max_pages): position t of sequence i is row t % page_size of page
            page_table[i, t // page_size]. Entries past its length are not looked at.
        cu_seqlens_q: int32 (b + 1,): q is ragged; needs max_seqlen_q.
        cu_seqlens_k_new: int32 (b + 1,): k and v are packed. Ignored without them.
        max_seqlen_q: no sequence has more query rows.
        rotary_seqlens: int32 (b,): position of the first new key.
        rotary_interleaved: whether dimensions (0, 1), (2, 3), ... are rotated together, or (0, rotary_dim / 2), ...
        scheduler_metadata: from :func:`get_scheduler_metadata` of the same lengths; read where num_splits is 0.
        num_splits: 0, the default here, lets the library decide.
        return_softmax_lse: return lse too.
        seqused_q: int32 (b,): only the first seqused_q[i] query rows of sequence i are used.
        block_table: another name of page_table.

    Returns:
        out, shaped like q with head size dv; with return_softmax_lse, (out, lse, None, None), where FlashAttention-3
        has its partial results in the last two places.
    """
    page_table = _page_table(page_table, block_table)
    if cache_seqlens is not None and (not isinstance(cache_seqlens, Tensor) or cache_seqlens.dim() == 0):
        check_tensor("q", q)
        capacity = _capacity(k_cache, page_table, None if cu_seqlens_k_new is not None else k)
        cache_seqlens = same_length("cache_seqlens", cache_seqlens, _batch_size(q, cu_seqlens_q), q.device, capacity)
    if k is not None:
        check_tensor("k_cache", k_cache)  # where it is written to, PyTorch is told so
        check_tensor("v_cache", v_cache)
    left, right = window(window_size)
    call = attention_call(
        CACHE_NAMES,
        contiguous_rows("q", q),
        k_cache,
        v_cache,
        None if qv is None else contiguous_rows("qv", qv),
        softmax_scale,
        causal,
        left,
        right,
        chunk(attention_chunk),
        softcap,
        q_descale,
        k_descale,
        v_descale,
        _sink(learnable_sink, sinks, s_aux),
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        num_splits,
        pack_gqa,
        sm_margin,
        batch_invariant,
        cu_seqlens_q,
        None,  # cu_seqlens_k
        seqused_q,
        cache_seqlens,
        max_seqlen_q,
        None,  # max_seqlen_k
        page_table,
        scheduler_metadata,
        cache_batch_idx,
        cache_leftpad,
        None if k is None else contiguous_rows("k", k),
        None if v is None else contiguous_rows("v", v),
        cu_seqlens_k_new,
        rotary_cos,
        rotary_sin,
        rotary_seqlens,
        rotary_interleaved,
    )
    result = _attention("flash_attn_with_kvcache", call, out, bool(return_softmax_lse), sinks, s_aux, block_table)
    return (*result, None, None) if isinstance(result, tuple) else result


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: Number | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: Index | None = 0,
    softcap: Number = 0.0,
    deterministic: bool = False,
    num_heads_q: Index | None = None,
    sm_margin: Index = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: Index = 1,
    cp_rank: Index = 0,
    cp_tot_seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries, keys and values that lie in one tensor. Else as :func:`flash_attn_func`.

    Args:
        qkv: (b, s, 3, h, d); or (b, s, h + 2 * hk, d) with num_heads_q, the heads of q, then of k, then of v.
        num_heads_q: h, where qkv has four dimensions; a multiple of hk.
    """
    qkv = contiguous_rows("qkv", qkv)
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv must have shape (b, s, 3, h, d), got {tuple(qkv.shape)}")
        if num_heads_q is not None and integer("num_heads_q", num_heads_q) != qkv.shape[3]:
            raise ValueError(f"num_heads_q must be {qkv.shape[3]}, the heads of qkv, got {num_heads_q}")
        q, k, v = qkv.unbind(2)
    elif qkv.dim() == 4:
        if num_heads_q is None:
            raise ValueError("num_heads_q is required where qkv has four dimensions, (b, s, h + 2 * hk, d)")
        heads_q = integer("num_heads_q", num_heads_q)
        heads_k = (qkv.shape[2] - heads_q) // 2
        if heads_q < 1 or heads_k < 1 or heads_q + 2 * heads_k != qkv.shape[2]:
            raise ValueError(
                f"num_heads_q must leave heads for keys and values among the {qkv.shape[2]} of qkv, got {heads_q}"
            )
        if heads_q % heads_k != 0:
            raise ValueError(
                f"num_heads_q must be a multiple of the {heads_k} heads that it leaves for keys, got {heads_q}"
            )
        q, k, v = torch.split(qkv, [heads_q, heads_k, heads_k], dim=2)
    else:
        raise ValueError(f"qkv must have shape (b, s, 3, h, d) or (b, s, h + 2 * hk, d), got {tuple(qkv.shape)}")
    left, right = window(window_size)
    call = attention_call(
        PACKED_NAMES,
        q,
        k,
        v,
        None,  # qv
        softmax_scale,
        causal,
        left,
        right,
        chunk(attention_chunk),
        softcap,
        q_descale,
        k_descale,
        v_descale,
        _sink(learnable_sink, sinks, s_aux),
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        1,  # num_splits
        None,  # pack_gqa
        sm_margin,
        batch_invariant,
    )
    return_lse = _return_lse(return_attn_probs, return_softmax_lse)
    return _attention("flash_attn_qkvpacked_func", call, out, return_lse, sinks, s_aux)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges partial results, of splits of the keys or of context-parallel ranks, by their lse::

        lse = log(sum_i exp(lse_partial[i]))
        out = sum_i exp(lse_partial[i] - lse) * out_partial[i]

    Args:
        out_partial: float32 (splits, b, s, h, dv). A part whose lse is -inf is not read.
        lse_partial: float32 (splits, b, s, h), natural log, any strides.
        out: (b, s, h, dv), float32, bfloat16 or float16: where the result is written; it overlaps no input.
        out_dtype: the type of out; float32 by default.

    Returns:
        (out, lse), with lse float32 (b, s, h).

    Raises:
        TypeError, ValueError: as :func:`flash_attn_func`.
    """
    check_tensor("lse_partial", lse_partial)
    if out_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if out is not None:
        check_tensor("out", out)
        if out_dtype is not None and out.dtype != out_dtype:
            raise TypeError(f"out must be {out_dtype}, the out_dtype that was given, got {out.dtype}")
    call = CombineCall(contiguous_rows("out_partial", out_partial), lse_partial)
    return run_combine("flash_attn_combine", call, out, out_dtype or torch.float32)


def get_scheduler_metadata(
    batch_size: Index,
    max_seqlen_q: Index,
    max_seqlen_k: Index,
    num_heads_q: Index,
    num_heads_kv: Index,
    headdim: Index,
    cache_seqlens: Index | Tensor | None = None,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: Index | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: Index | None = None,
    max_seqlen_k_new: Index = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: Index | None = 0,
    has_softcap: bool = False,
    num_splits: Index = 0,
    pack_gqa: bool | None = None,
    sm_margin: Index = 0,
    *,
    seqused_k: Index | Tensor | None = None,
    seqused_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    has_qv: bool = False,
    cp_world_size: Index = 1,
    cp_rank: Index = 0,
    cp_tot_seqused_k: Tensor | None = None,
    batch_invariant: bool = False,
    kv_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decides once, for all the layers of a model, how calls with these lengths will be cut up.

    A call with metadata of its own shapes, lengths and options gives bit for bit what it gives without. Calls read the
    metadata where their num_splits is 0 (that of flash_attn_varlen_func is 1 by default), and never write it; on a GPU
    they find out for themselves. Refreshed in place (with ``out`` or copy_) it serves other lengths of the same batch.

    Args:
        batch_size: b.
        max_seqlen_q: the query rows of each sequence, unless cu_seqlens_q or seqused_q say otherwise.
        max_seqlen_k: no sequence has more keys.
        num_heads_q: h.
        num_heads_kv: hk.
        headdim: d.
        cache_seqlens: int32 (b,), or one integer for all: the keys of each sequence, without those the call appends.
            Metadata belongs to the device of a tensor: with an integer alone, and no other tensor, to the CPU.
        qkv_dtype: the type of q, and of k and v unless kv_dtype says otherwise.
        headdim_v: dv; headdim by default.
        cu_seqlens_q: int32 (b + 1,), for ragged queries.
        cu_seqlens_k_new: int32 (b + 1,), for packed new keys.
        cache_leftpad: int32 (b,).
        page_size: rows of a page, where keys are paged.
        max_seqlen_k_new: how many keys the call appends to each sequence, unless cu_seqlens_k_new says otherwise.
        has_softcap: whether the call has a softcap.
        seqused_k: another name of cache_seqlens.
        seqused_q: int32 (b,).
        cu_seqlens_k: int32 (b + 1,), for ragged keys; cache_seqlens may then be None.
        has_qv: whether the call has qv.
        kv_dtype: the type of k and v.
        out: int32, as returned before: written in place.

    The other arguments are the call's own.

    Returns:
        int32, one-dimensional, on the device of the lengths. What it holds is the library's own affair.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`flash_attn_func`.
    """
    tensors = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "seqused_q": seqused_q,
        "cache_leftpad": cache_leftpad,
        "cp_tot_seqused_k": cp_tot_seqused_k,
        "out": out,
    }
    neighbours = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, neighbour in neighbours.items():
        check_tensor(name, neighbour)
    batch = integer("batch_size", batch_size)
    used = one_of(cache_seqlens=cache_seqlens, seqused_k=seqused_k)
    if used is not None and (not isinstance(used, Tensor) or used.dim() == 0):
        device = next((tensor.device for tensor in neighbours.values()), None)
        used = same_length(
            "cache_seqlens" if seqused_k is None else "seqused_k", used, min(max(batch, 0), 2**31 - 1), device
        )
    left, right = window(window_size)
    call = SchedulerMetadataCall(
        batch_size=batch,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        headdim=headdim,
        headdim_v=headdim_v,
        qkv_dtype=dtype("qkv_dtype", qkv_dtype),
        kv_dtype=None if kv_dtype is None else dtype("kv_dtype", kv_dtype),
        cache_seqlens=used,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_q=seqused_q,
        cache_leftpad=cache_leftpad,
        page_size=page_size,
        max_seqlen_k_new=max_seqlen_k_new,
        causal=causal,
        window_left=left,
        window_right=right,
        attention_chunk=chunk(attention_chunk),
        has_softcap=has_softcap,
        has_qv=has_qv,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
        batch_invariant=batch_invariant,
    )
    try:
        return run_scheduler_metadata(call, out)
    except (TypeError, ValueError) as error:
        if seqused_k is None:
            raise
        raise _by_given_names(error, seqused_k=seqused_k) from None


def _attention(
    function: str,
    call: AttentionCall,
    out: Tensor | None,
    return_lse: bool,
    sinks: Tensor | None,
    s_aux: Tensor | None,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What all the functions of attention come to. The call has the sink and the page table that were given under any
    of their names.
    """
    if out is not None:
        check_tensor("out", out)
    try:
        out, lse = run_attention(function, call, out, return_lse)
    except (TypeError, ValueError) as error:
        if sinks is None and s_aux is None and block_table is None:
            raise
        raise _by_given_names(error, sinks=sinks, s_aux=s_aux, block_table=block_table) from None
    return out if lse is None else (out, lse)


_ALIASES = {
    "sinks": "learnable_sink",
    "s_aux": "learnable_sink",
    "block_table": "page_table",
    "seqused_k": "cache_seqlens",
}


def _by_given_names(error: Exception, **aliases: object) -> Exception:
    """The error with the names under which arguments were given."""
    message = str(error)
    for alias, value in aliases.items():
        if value is not None:
            message = message.replace(_ALIASES[alias], alias)
    return type(error)(message)


def _batch_size(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """How many sequences there are; of shapes that the library refuses, anything."""
    if cu_seqlens_q is None:
        return q.shape[0] if q.dim() else 0
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    return max(0, cu_seqlens_q.numel() - 1)


def _capacity(k_cache: Tensor, page_table: Tensor | None, k: Tensor | None) -> int:
    """How many keys a sequence may have in a cache, and leave room for new ones; of wrong shapes, as many as any."""

    def has_dimensions(tensor: object, count: int) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() == count

    is_right = has_dimensions(k_cache, 4)
    is_right = is_right and (page_table is None or has_dimensions(page_table, 2))
    is_right = is_right and (k is None or has_dimensions(k, 4))
    if not is_right:
        return 2**31 - 1
    rows = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    return max(0, min(rows, 2**31 - 1) - (0 if k is None else k.shape[1]))


def _sink(learnable_sink: Tensor | None, sinks: Tensor | None, s_aux: Tensor | None) -> Tensor | None:
    if sinks is None and s_aux is None:
        return learnable_sink
    sink: Tensor | None = one_of(learnable_sink=learnable_sink, sinks=sinks, s_aux=s_aux)
    return sink


def _page_table(page_table: Tensor | None, block_table: Tensor | None) -> Tensor | None:
    if block_table is None:
        return page_table
    table: Tensor | None = one_of(page_table=page_table, block_table=block_table)
    return table


def _return_lse(return_attn_probs: bool, return_softmax_lse: bool) -> bool:
    if return_attn_probs and return_softmax_lse:
        raise TypeError("return_attn_probs and return_softmax_lse are names of one argument: give one of them")
    return bool(return_attn_probs or return_softmax_lse)
