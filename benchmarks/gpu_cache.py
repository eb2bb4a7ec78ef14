"""The tables of benchmarks/gpu.py that read a cache: decoding, and what serving engines call."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_peers import flash_attention_3, flashinfer_decode
from gpu_timing import LAYERS, alone_seconds, in_a_row_seconds, issue_seconds
from measure import Case, Contender, Group
from shapes import E4M3, heads_label, random_on_gpu
from torch import Tensor

import mate

HEAD_DIM = 128
MEMORY_BANDWIDTH = 4.3e12  # bytes a second that the best kernel reads on an H200
L2_BYTES = 2**28  # a cache so large is not in any L2 when its turn comes again

DECODE = [  # batch, heads, keys, page size
    (1, (32, 8), 1024, 64),
    (1, (32, 8), 8192, 64),
    (1, (32, 8), 65536, 64),
    (8, (32, 8), 1024, 64),
    (8, (32, 8), 8192, 64),
    (32, (32, 8), 2048, 64),
    (32, (32, 8), 2048, 16),
    (32, (32, 8), 2048, 1),
    (128, (32, 8), 1024, 16),
    (128, (64, 8), 4096, 16),
    (256, (8, 1), 2048, 16),
    (64, (32, 32), 2048, 16),
    (60, (32, 8), 8192, 16),  # shares begin anywhere, so that heads of one token are not read at one time
]


DECODE_E4M3 = [
    (1, (32, 8), 8192, 64),
    (8, (32, 8), 8192, 64),
    (32, (32, 8), 2048, 16),
    (128, (64, 8), 4096, 16),
    (64, (32, 32), 2048, 16),
    (60, (32, 8), 8192, 16),
]

# Sequences of lengths that differ, and the keys of the longest.
UNEVEN = [(16, 512), (8, 1024), (16, 1024), (8, 2048), (4, 4096), (8, 8192), (16, 8192), (32, 4096), (64, 2048)]

PROMPTS = [  # batch, queries, keys
    (1, 16, 2048),
    (1, 32, 2048),
    (1, 64, 2048),
    (1, 128, 2048),
    (1, 256, 2048),
    (1, 16, 16384),
    (1, 64, 8192),
    (1, 128, 8192),
    (1, 256, 8192),
    (1, 64, 32768),
    (2, 64, 4096),
    (4, 64, 2048),
    (8, 16, 4096),
    (16, 64, 1024),
    (1, 320, 4096),
    (1, 700, 4096),
    (2, 300, 3008),
    (1, 128, 128),
    (1, 256, 1024),
    (1, 512, 512),
    (1, 1024, 1024),
    (1, 2048, 2048),
    (1, 4096, 4096),
    (1, 512, 16384),
    (1, 1024, 8192),
    (4, 512, 512),
    (4, 2048, 2048),
    (8, 256, 256),
    (3, 700, 704),
]

LATENT = [(32, 16, 8192), (32, 128, 8192), (128, 16, 32768), (128, 64, 32768), (128, 128, 32768)]  # batch, heads, keys
LATENT_DIM, ROPE_DIM = 512, 64
LATENT_E4M3 = [  # batch, heads, queries, keys
    (32, 16, 1, 8192),
    (128, 16, 1, 32768),
    (32, 16, 2, 8192),
    (32, 16, 4, 8192),
    (32, 128, 1, 8192),
    (128, 64, 1, 32768),
    (128, 128, 1, 32768),
]


def groups() -> list[Group]:
    lengths = torch.randint(16, 16385, (256,), generator=torch.Generator().manual_seed(2)).tolist()
    decode_note = (
        "The floor is that of reading keys and values at 4.3 TB/s. FA3 has its scheduler metadata, computed ahead."
    )
    return [
        Group(
            "decode",
            "Decode in a row: one of 64 calls in a CUDA graph, bf16, heads of 128, one query a sequence, paged",
            "µs",
            [decode(*sizes) for sizes in DECODE],
            decode_note,
            in_a_row_seconds,
        ),
        Group(
            "decode-alone",
            "Decode alone: one call in a CUDA graph, with a cold L2 cache",
            "µs",
            [decode(*sizes) for sizes in DECODE],
            decode_note,
            alone_seconds,
        ),
        Group(
            "decode-e4m3",
            "Decode in a row over an e4m3 cache: one of 64 calls in a CUDA graph, heads of 128, paged",
            "µs",
            [decode_e4m3(*sizes, query) for sizes in DECODE_E4M3 for query in (E4M3, torch.bfloat16)],
            "FA3 takes e4m3 queries, FlashInfer bf16 ones; those of either type hold the same numbers.",
            in_a_row_seconds,
        ),
        Group(
            "latent",
            "Multi-head latent attention, decoding: qv of 512 beside 64, one key head, bf16, pages of 64",
            "µs",
            [latent(*sizes) for sizes in LATENT],
            "The floor is that of reading each key once.",
            alone_seconds,
        ),
        Group(
            "latent-e4m3",
            "The same over an e4m3 cache, in a row: one of 64 calls in a CUDA graph",
            "µs",
            [latent_e4m3(*sizes, query) for sizes in LATENT_E4M3 for query in (torch.bfloat16, E4M3)],
            "Beside MATE over a bf16 cache of the same numbers. The floor is that of reading each key of e4m3 once.",
            in_a_row_seconds,
        ),
        Group(
            "serving",
            "What serving engines call, each alone in a CUDA graph, bf16, 32/8 heads of 128",
            "µs",
            [
                *(serving(f"{n} queries each on 32 x 4096", [4096] * 32, [n] * 32) for n in (2, 4, 8, 16)),
                serving("4 prefills of 2048, 60 decodes at 8192", [2048] * 4 + [8192] * 60, [2048] * 4 + [1] * 60),
                serving("a chunk of 512 at 16384, 31 decodes", [16384] * 32, [512] + [1] * 31),
                serving("8 prefills of 256, 100 decodes at 2048", [256] * 8 + [2048] * 100, [256] * 8 + [1] * 100),
                serving("one of 131072, 63 of 512", [131072] + [512] * 63),
                serving("256 of 16 to 16384", lengths),
                *(serving("32 x 4096", [4096] * 32, page_size=size) for size in (1, 16, 64, 256)),
                serving("32 x 4096", [4096] * 32, page_size=None),
            ],
            "A batch is one call, whatever it mixes. Without a page size the cache is contiguous.",
            alone_seconds,
        ),
        Group(
            "uneven",
            "Decoding sequences of different lengths, alone in a CUDA graph, bf16, 32/8 heads of 128",
            "µs",
            [
                *(serving(f"{batch} of up to {keys}", uneven_lengths(batch, keys)) for batch, keys in UNEVEN),
                serving("one of 8192, 7 of 60", [8192] + [60] * 7),
                serving("8 queries each on one of 16384, 7 of 500", [16384] + [500] * 7, [8] * 8),
            ],
            timing=alone_seconds,
        ),
        Group(
            "prompts",
            "A few prompts, or chunks of them, each alone in a CUDA graph, bf16, 32/8 heads of 128",
            "µs",
            [serving(f"{b} x {n} queries on {k} keys", [k] * b, [n] * b) for b, n, k in PROMPTS],
            timing=alone_seconds,
        ),
        Group(
            "append",
            "Appending a token to each of 32 x 4095 in the same call, alone in a CUDA graph, bf16, 32/8 heads of 128",
            "µs",
            [append(rotates) for rotates in (None, False, True)],
            timing=alone_seconds,
        ),
        Group(
            "host-decode",
            "Host time of a small decode call from Python",
            "µs",
            [decode(4, (32, 8), 512, 64)],
            "Calls are issued without waiting for the GPU.",
            issue_seconds,
        ),
    ]


def uneven_lengths(batch: int, longest: int) -> list[int]:
    """One of the longest, and others of any."""
    numbers = torch.Generator().manual_seed(batch + longest)
    return [longest, *torch.randint(1, longest + 1, (batch - 1,), generator=numbers).tolist()]


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def cache_bytes(lengths: Sequence[int], heads_k: int, element_bytes: int = 2) -> int:
    return 2 * element_bytes * sum(lengths) * heads_k * HEAD_DIM


def floor(read_bytes: int) -> str:
    return f"{read_bytes / MEMORY_BANDWIDTH * 1e6:.1f}"


def copies(read_bytes: int, fewest: int = 16) -> int:
    """How many caches, each of which a call reads, are too many for an L2 cache."""
    return min(LAYERS, max(fewest, -(-L2_BYTES // read_bytes)))


def shuffled_pages(batch: int, keys: int, page_size: int) -> Tensor:
    """A table of so many pages that lie in random order."""
    return torch.randperm(batch * keys // page_size, device="cuda").to(torch.int32).view(batch, -1)


def on_each(caches: Sequence[Any], call: Callable[[Any], Any]) -> Callable[[], Any]:
    """A call that takes the next cache each time."""
    turns = itertools.cycle(caches)
    return lambda: call(next(turns))


def decode(batch: int, heads: tuple[int, int], keys: int, page_size: int) -> Case:
    heads_q, heads_k = heads
    lengths = [keys] * batch

    def contenders() -> list[Contender]:
        pages = batch * keys // page_size
        count = copies(cache_bytes(lengths, heads_k))
        caches = [random_on_gpu(pages, 2, page_size, heads_k, HEAD_DIM) for _ in range(count)]
        q, used = random_on_gpu(batch, 1, heads_q, HEAD_DIM), int32(lengths)
        table = shuffled_pages(batch, keys, page_size)
        call = functools.partial(mate.flash_attn_with_kvcache, q, cache_seqlens=used, page_table=table, causal=True)

        def over(**options: Any) -> Callable[[], Any]:
            return on_each(caches, lambda cache: call(k_cache=cache[:, 0], v_cache=cache[:, 1], **options))

        entrants = [Contender("MATE", over()), Contender("MATE, batch_invariant", over(batch_invariant=True))]
        if (fa3 := flash_attention_3()) is not None:
            plan = fa3.metadata(used, 1, keys, heads, None, page_size)
            entrants.append(
                Contender(
                    "FA3",
                    on_each(
                        caches,
                        lambda cache: fa3.with_kvcache(q, cache[:, 0], cache[:, 1], used, table, None, None, plan),
                    ),
                    peer=True,
                )
            )
        if (planned := flashinfer_decode(q[:, 0], table, caches[0])) is not None:
            entrants.append(Contender("FlashInfer", on_each(caches, planned), lambda out: out[:, None], peer=True))
        return entrants

    labels: dict[str, object] = {
        "type": "bf16",
        "batch": batch,
        "heads": heads_label(*heads),
        "keys": keys,
        "page size": page_size,
        "floor": floor(cache_bytes(lengths, heads_k)),
    }
    return Case(labels, cache_bytes(lengths, heads_k), contenders)


def decode_e4m3(batch: int, heads: tuple[int, int], keys: int, page_size: int, query: torch.dtype) -> Case:
    heads_q, heads_k = heads
    read_bytes = cache_bytes([keys] * batch, heads_k, element_bytes=1)

    def contenders() -> list[Contender]:
        pages = batch * keys // page_size
        shape = (pages, 2, page_size, heads_k, HEAD_DIM)
        caches = [random_on_gpu(*shape, dtype=E4M3) for _ in range(copies(read_bytes))]
        q, used = random_on_gpu(batch, 1, heads_q, HEAD_DIM, dtype=E4M3), int32([keys] * batch)
        wide_q = q.to(torch.bfloat16)
        table = shuffled_pages(batch, keys, page_size)
        call = functools.partial(
            mate.flash_attn_with_kvcache, q.to(query), cache_seqlens=used, page_table=table, causal=True
        )
        entrants = [
            Contender("MATE", on_each(caches, lambda cache: call(k_cache=cache[:, 0], v_cache=cache[:, 1]))),
        ]
        if (fa3 := flash_attention_3()) is not None:
            over = functools.partial(fa3.with_kvcache, used=used, page_table=table, ends=None, longest=None)
            entrants.append(
                Contender(
                    "FA3",
                    on_each(caches, lambda cache: over(q, cache[:, 0], cache[:, 1], metadata=None)),
                    peer=True,
                )
            )
        if (planned := flashinfer_decode(wide_q[:, 0], table, caches[0])) is not None:
            entrants.append(Contender("FlashInfer", on_each(caches, planned), lambda out: out[:, None], peer=True))
        return entrants

    labels: dict[str, object] = {
        "type": "e4m3" if query is E4M3 else "bf16 over e4m3",
        "batch": batch,
        "heads": heads_label(*heads),
        "keys": keys,
        "page size": page_size,
        "floor": floor(read_bytes),
    }
    return Case(labels, read_bytes, contenders)


def latent(batch: int, heads: int, keys: int) -> Case:
    page_size = 64
    read_bytes = 2 * batch * keys * (LATENT_DIM + ROPE_DIM)

    def contenders() -> list[Contender]:
        pages = batch * keys // page_size
        cache = random_on_gpu(pages, page_size, 1, LATENT_DIM + ROPE_DIM)
        latents, ropes = cache.split((LATENT_DIM, ROPE_DIM), -1)
        q, qv = (random_on_gpu(batch, 1, heads, size) for size in (ROPE_DIM, LATENT_DIM))
        used = int32([keys] * batch)
        table = shuffled_pages(batch, keys, page_size)
        options = {"qv": qv, "cache_seqlens": used, "page_table": table, "causal": True}
        entrants = [Contender("MATE", lambda: mate.flash_attn_with_kvcache(q, ropes, latents, **options))]
        if (fa3 := flash_attention_3()) is not None:
            entrants.append(
                Contender(
                    "FA3",
                    lambda: fa3.with_kvcache(q, ropes, latents, used, table, None, None, None, qv=qv),
                    peer=True,
                )
            )
        return entrants

    labels: dict[str, object] = {
        "type": "bf16",
        "batch": batch,
        "heads": heads,
        "keys": keys,
        "floor": floor(read_bytes),
    }
    return Case(labels, read_bytes, contenders)


def latent_e4m3(batch: int, heads: int, queries: int, keys: int, query: torch.dtype) -> Case:
    page_size = 64
    read_bytes = batch * keys * (LATENT_DIM + ROPE_DIM)

    def contenders() -> list[Contender]:
        pages = batch * keys // page_size
        shape = (pages, page_size, 1, LATENT_DIM + ROPE_DIM)
        caches = [random_on_gpu(*shape, dtype=E4M3) for _ in range(copies(read_bytes, fewest=1))]
        wide_caches = [cache.to(torch.bfloat16) for cache in caches]
        q, qv = (random_on_gpu(batch, queries, heads, size, dtype=E4M3) for size in (ROPE_DIM, LATENT_DIM))
        table = shuffled_pages(batch, keys, page_size)
        options = {"cache_seqlens": int32([keys] * batch), "page_table": table, "causal": True}

        def over(caches: Sequence[Tensor], query: torch.dtype) -> Callable[[], Any]:
            of_query = {"q": q.to(query), "qv": qv.to(query), **options}
            views = [cache.split((LATENT_DIM, ROPE_DIM), -1) for cache in caches]
            return on_each(
                views, lambda view: mate.flash_attn_with_kvcache(k_cache=view[1], v_cache=view[0], **of_query)
            )

        return [
            Contender("MATE", over(caches, query)),
            Contender("MATE, bf16 cache", over(wide_caches, torch.bfloat16), peer=True),
        ]

    labels: dict[str, object] = {
        "type": "e4m3" if query is E4M3 else "bf16 over e4m3",
        "batch": batch,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "floor": floor(read_bytes),
    }
    return Case(labels, read_bytes, contenders)


def paged_cache(lengths: Sequence[int], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the table of a cache of pages in random order."""
    pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages), dtype=torch.int64).to(torch.int32)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, part in zip(table, order.split(pages)):
        row[: len(part)] = part
    k, v = (random_on_gpu(sum(pages), page_size, 8, HEAD_DIM) for _ in range(2))
    return k, v, table.cuda()


def serving(
    name: str, lengths: Sequence[int], queries: Sequence[int] | None = None, page_size: int | None = 16
) -> Case:
    counts = queries or [1] * len(lengths)
    heads = (32, 8)

    def contenders() -> list[Contender]:
        k, v, table = (
            (*(random_on_gpu(len(lengths), max(lengths), 8, HEAD_DIM) for _ in range(2)), None)
            if page_size is None
            else paged_cache(lengths, page_size)
        )
        used, ends, longest = int32(lengths), int32([0, *itertools.accumulate(counts)]), max(counts)
        q = random_on_gpu(sum(counts), heads[0], HEAD_DIM)
        ragged = {"cu_seqlens_q": ends, "max_seqlen_q": longest}
        call = functools.partial(
            mate.flash_attn_with_kvcache, q, k, v, cache_seqlens=used, page_table=table, causal=True, **ragged
        )
        entrants = [
            Contender("MATE", call),
            Contender("MATE, batch_invariant", functools.partial(call, batch_invariant=True)),
        ]
        if (fa3 := flash_attention_3()) is not None:
            plan = fa3.metadata(used, longest, max(lengths), heads, ends, page_size or max(lengths))
            entrants.append(
                Contender("FA3", lambda: fa3.with_kvcache(q, k, v, used, table, ends, longest, plan), peer=True)
            )
        return entrants

    labels: dict[str, object] = {
        "type": "bf16",
        "what": name,
        "page size": page_size or "-",
        "floor": floor(cache_bytes(lengths, 8)),
    }
    return Case(labels, cache_bytes(lengths, 8), contenders)


def append(rotates: bool | None) -> Case:
    """`rotates` is None where nothing is appended."""
    batch, keys = 32, 4096

    def contenders() -> list[Contender]:
        q = random_on_gpu(batch, 1, 32, HEAD_DIM)
        k, v = (random_on_gpu(batch, keys, 8, HEAD_DIM) for _ in range(2))
        options: dict[str, Any] = {"cache_seqlens": int32([keys if rotates is None else keys - 1] * batch)}
        if rotates is not None:
            options |= {name: random_on_gpu(batch, 1, 8, HEAD_DIM) for name in ("k", "v")}
        if rotates:
            options |= {f"rotary_{name}": random_on_gpu(keys, HEAD_DIM // 2) for name in ("cos", "sin")}
        return [Contender("MATE", lambda: mate.flash_attn_with_kvcache(q, k, v, causal=True, **options))]

    what = {None: "no", False: "yes", True: "yes, rotated"}[rotates]
    return Case({"type": "bf16", "appends": what}, cache_bytes([keys] * batch, 8), contenders)
