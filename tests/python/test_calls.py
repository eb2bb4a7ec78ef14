"""The generator of random calls draws what it promises to."""

import copy
from collections import Counter
from types import ModuleType

import torch
from calls import FUNCTIONS, TYPES, Call, draw, key_blocks_spanned
from judge import check, same_bits
from judge import out_dtype as result_type
from kernels import MOST_KERNELS_OF_KIND, NOT_SERVED, STEP, Kind, draw_kinds, not_served
from reference import FP8, evaluate, sequences

CALLS = 900
# What `features` must find among them.
WANTED = {
    *FUNCTIONS,
    *TYPES,
    *(("page size", size) for size in (1, 2, 3, 16, 64, 100)),
    *(("sink", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    *(("rotary", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    *(("interleaved", choice) for choice in (True, False)),
    *(("num_splits", n) for n in (-1, 0, 1, 2, 3)),
    *(("pack_gqa", choice) for choice in (None, True, False)),
    # arguments given
    *(
        "learnable_sink",
        "sinks",
        "s_aux",
        "page_table",
        "block_table",
        "qv",
        "out",
        "softcap",
        "softmax_scale",
    ),
    *("sm_margin", "batch_invariant", "deterministic", "num_heads_q", "max_seqlen_q", "max_seqlen_k"),
    *("seqused_q", "seqused_k", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_k_new"),
    *("q_descale", "k_descale", "v_descale", "rotary_cos", "rotary_seqlens", "cp_tot_seqused_k"),
    *("return_attn_probs", "return_softmax_lse"),
    # what they amount to
    *("ragged q", "ragged k", "append", "quantising append", "rotary rows of q's type", "metadata"),
    *("causal", "left", "right", "left 0", "right 0", "huge window", "chunk", "causal window chunk"),
    *("context parallel", "multi-query", "grouped", "multi-head", "wide heads", "d != dv", "odd head size"),
    *(
        "no batch",
        "no queries",
        "no keys",
        "more queries than keys",
        "strided q",
        "strided k",
        "shared pages",
    ),
    *("last dimension of q not contiguous", "lse", "no lse", "0-d tensor"),
}


def features(call: Call) -> set:
    """What the call is made of, in words."""
    a = call.normalised
    mask = a.mask
    left, right = mask["window"]
    lengths = sequences(a)
    given = {name for name in call.arguments if call.arguments[name] is not None}
    found = {call.function, (a.q.dtype, a.k.dtype), *(given - {"q", "k", "v"})}
    words = {
        "ragged q": a.cu_seqlens_q is not None,
        "ragged k": a.cu_seqlens_k is not None,
        "append": a.k_new is not None,
        "quantising append": a.k_new is not None and a.k.dtype == FP8 and a.k_new.dtype != FP8,
        "rotary rows of q's type": a.rotary_cos is not None and a.rotary_cos.dtype == a.q.dtype,
        "causal": mask["causal"],
        "left": left >= 0,
        "right": right >= 0,
        "left 0": left == 0,
        "right 0": right == 0,
        "huge window": max(left, right) >= 2**20,
        "chunk": mask["chunk"] > 0,
        "causal window chunk": mask["causal"] and left >= 0 and mask["chunk"] > 0,
        "context parallel": mask["world_size"] > 1,
        "multi-query": a.k.shape[-2] == 1 < a.q.shape[-2],
        "grouped": 1 < a.k.shape[-2] < a.q.shape[-2],
        "multi-head": 1 < a.k.shape[-2] == a.q.shape[-2],
        "wide heads": max(a.q.shape[-1], a.v.shape[-1]) > 256,
        "d != dv": a.q.shape[-1] != a.v.shape[-1],
        "odd head size": a.q.shape[-1] % 8 != 0,
        "no batch": a.batch == 0,
        "no queries": any(s.sq == 0 for s in lengths),
        "no keys": any(s.sk == 0 for s in lengths),
        "more queries than keys": any(s.sq > s.sk > 0 for s in lengths),
        "strided q": not a.q.is_contiguous(),
        "strided k": not a.k.is_contiguous(),
        "last dimension of q not contiguous": a.q.stride(-1) != 1,
        "lse": call.returns_lse,
        "no lse": not call.returns_lse,
        "metadata": call.with_metadata,
        "shared pages": a.page_table is not None and shares_a_page(call),
        "0-d tensor": any(isinstance(x, torch.Tensor) and x.dim() == 0 for x in call.arguments.values()),
    }
    found |= {word for word, holds in words.items() if holds}
    found |= {("num_splits", min(int(a.num_splits), 3)), ("pack_gqa", a.pack_gqa)}
    if a.page_table is not None:
        found.add(("page size", a.k.shape[1]))
    if a.learnable_sink is not None:
        found.add(("sink", a.learnable_sink.dtype))
    if a.rotary_cos is not None:
        found |= {("rotary", a.rotary_cos.dtype), ("interleaved", a.rotary_interleaved)}
    return found


def shares_a_page(call: Call) -> bool:
    read = [set(s.keys[0].tolist()) for s in sequences(call.normalised)]
    return sum(map(len, read)) > len(set().union(*read))


def test_every_feature_is_drawn_and_a_third_of_the_calls_are_wide(seed: int) -> None:
    counts: Counter = Counter()
    wide = 0
    for i in range(CALLS):
        call = draw(seed + i)
        counts.update(features(call))
        a = call.normalised
        wide += int(a.num_splits) >= 3 and not a.batch_invariant and key_blocks_spanned(call) >= 4
    missing = WANTED - set(counts)
    assert not missing, "never drawn"
    assert wide * 3 >= CALLS, f"only {wide} of {CALLS} calls span 4 blocks of keys and 3 splits"


def test_a_call_follows_from_its_seed(seed: int) -> None:
    for i in range(20):
        first, second = draw(seed + i), draw(seed + i)
        assert str(first) == str(second)
        for name, value in first.arguments.items():
            if isinstance(value, torch.Tensor):
                assert same_bits(value, second.arguments[name])


def test_poison_surrounds_what_is_read_and_does_not_reach_the_reference(seed: int) -> None:
    poisoned = 0
    for i in range(100):
        call = draw(seed + i)
        a = call.normalised
        poisoned += bool(a.k.double().isnan().any() and a.v.double().isnan().any())
        before = copy.deepcopy(call.arguments)
        expected = evaluate(call.function, call.arguments)
        assert expected.out.isfinite().all()
        assert not expected.lse.isnan().any()
        for name, value in call.arguments.items():
            if isinstance(value, torch.Tensor):
                assert same_bits(value, before[name]), "the reference changed an argument"
    assert poisoned > 20


def test_calls_for_a_gpu_keep_to_few_kernels_and_to_what_is_served(mate: ModuleType, seed: int) -> None:
    most = 200
    kinds = draw_kinds(seed, most)
    assert most - MOST_KERNELS_OF_KIND < len({name for kind in kinds for name in kind.sources}) <= most
    counts: Counter = Counter()
    for i in range(300):
        call = draw(seed + i, kinds=kinds)
        assert not_served(call) == []
        a = call.normalised
        size, size_v = (-(-x.shape[-1] // STEP) * STEP for x in (a.q, a.v))
        kv_dtype = None if a.k.dtype == a.q.dtype else a.k.dtype
        out_dtype = torch.float16 if a.q.dtype == FP8 and result_type(call) == torch.float16 else None
        assert Kind(size, size_v, a.q.dtype, a.softcap > 0, a.qv is not None, kv_dtype, out_dtype) in kinds
        rows = [x.stride(dim) for x in (a.q, a.k, a.v) for dim in range(x.dim() - 1) if x.shape[dim] > 1]
        counts["aligned"] += all(x.storage_offset() % 8 == 0 for x in (a.q, a.k, a.v)) and not any(n % 8 for n in rows)
        counts.update(features(call))
        if i < 60:
            check(call, mate)
    assert counts["aligned"] > 60
    assert 300 - counts["aligned"] > 60
    served = {"flash_attn_with_kvcache", "cache_leftpad", "cache_batch_idx", "context parallel", "chunk", "grouped"}
    assert not served - set(counts), "never drawn"


def test_everything_that_a_gpu_does_not_serve_is_drawn(seed: int) -> None:
    asked = {feature for i in range(200) for feature in not_served(draw(seed + i))}
    assert asked == set(NOT_SERVED)
