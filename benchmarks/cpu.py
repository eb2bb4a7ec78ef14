"""MATE beside PyTorch's scaled_dot_product_attention (SDPA) on the CPU, in one process, and the machine's own ceilings.

    python benchmarks/cpu.py                          # every table, some minutes
    python benchmarks/cpu.py --quick                  # two small rows of each, some seconds
    python benchmarks/cpu.py --only decode pages      # these tables
    python benchmarks/cpu.py --json figures.json --pictures docs/images

The tables go to stdout, in Markdown. Of several rounds in which all take turns the best counts. `ratio` is how many
times faster MATE is than SDPA, whatever the unit of the table; of several columns, than SDPA's best, by MATE's first.

To measure one more shape, add a line to one of the tables of shapes in `groups`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import QUICK, Case, Contender, Effort, Group, best_seconds, figure, markdown_table
from shapes import heads_label, heads_last, visible_pairs
from tables import group_figures, measured, parse_options, write_json
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

import mate

TYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHE_TYPES = {**TYPES, "bf16 over e4m3": torch.float8_e4m3fn}
QUERY_TYPES = {**TYPES, "bf16 over e4m3": torch.bfloat16}

PAGE_SIZE = 16
# A model reads each layer's cache once a token, so that none of it is still in the processor's caches: decoding goes
# round as many equal caches as make up this many bytes.
COLD_BYTES = 2**28


def groups() -> list[Group]:
    heads = "Heads are of queries, or of queries/keys. "
    return [
        Group(
            "prefill",
            "Prefill",
            "GFLOP/s",
            [
                prefill(dtype, *shape)
                for dtype in TYPES
                for shape in (
                    # batch, query heads, key heads, length, head size, causal
                    (1, 8, 8, 2048, 64, False),
                    (1, 8, 8, 2048, 128, False),
                    (1, 8, 8, 2048, 128, True),
                    (1, 8, 2, 512, 128, True),
                    (4, 12, 12, 128, 32, False),
                    (1, 4, 4, 8192, 128, True),
                )
            ],
            heads + "A causal mask counts as half of the work.",
        ),
        Group(
            "lengths",
            "Prefill against the length",
            "GFLOP/s",
            [prefill(dtype, 1, 8, 8, length, 128, True) for dtype in TYPES for length in (512, 1024, 2048, 4096, 8192)],
        ),
        Group(
            "decode",
            "Decode, one query a sequence, pages of 16",
            "GB/s",
            [
                decode(dtype, *shape)
                for dtype in TYPES
                for shape in (
                    # batch, query heads, key heads, context, head size
                    (1, 32, 8, 1024, 128),
                    (1, 32, 8, 16384, 128),
                    (8, 32, 8, 4096, 128),
                    (1, 32, 32, 4096, 128),
                )
            ],
            heads + "Bytes are those of K and V. SDPA reads the same keys and values, not paged but contiguous.",
        ),
        Group(
            "contexts",
            "Decode against the context, pages of 16",
            "GB/s",
            [
                decode(dtype, 1, 32, 8, context, 128)
                for dtype in CACHE_TYPES
                for context in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
            ],
            "SDPA takes no float8_e4m3fn, nor keys of another type than the queries: `-`.",
        ),
        Group(
            "pages",
            "Decode over pages of other sizes",
            "GB/s",
            [decode(dtype, 8, 32, 8, 4096, 128, pages=(16, 1, 256, None)) for dtype in TYPES],
            "The ratio is that of pages of 16.",
        ),
        Group(
            "ragged",
            "Ragged batches, one long sequence with many short",
            "GFLOP/s",
            [
                ragged(dtype, lengths, 8, 64, causal)
                for dtype in TYPES
                for lengths in ([2048] + 15 * [128], [1024] + 31 * [32])
                for causal in (False, True)
            ],
            "8 heads of size 64. SDPA once on the padded batch with a boolean mask, once sequence by sequence; the "
            "padding itself is not timed, and the work is that of the sequences alone.",
        ),
        Group(
            "windows",
            "Sliding windows",
            "GFLOP/s",
            [prefill(dtype, 1, 8, 8, 4096, 128, True, window=window) for dtype in TYPES for window in (128, 1024)],
            "Causal; the work is that of the pairs inside the window. SDPA has a boolean mask.",
        ),
        Group(
            "softcap",
            "Softcap",
            "GFLOP/s",
            [
                prefill(dtype, 1, 8, 8, length, 128, True, softcap=50.0)
                for dtype in ("float32", "bf16")
                for length in (512, 2048)
            ],
            "SDPA has no softcap: the peer is the plain expression in PyTorch.",
        ),
        Group(
            "head-sizes",
            "Other head sizes",
            "GFLOP/s",
            [prefill(dtype, 1, 4, 4, 2048, size, False) for dtype in TYPES for size in (72, 96, 192, 256, 512)],
        ),
        Group(
            "threads-prefill",
            "Prefill against the number of threads",
            "GFLOP/s",
            [
                prefill(dtype, 1, 8, 8, 2048, 128, True, threads=threads)
                for dtype in TYPES
                for threads in thread_counts()
            ],
        ),
        Group(
            "threads-decode",
            "Decode against the number of threads",
            "GB/s",
            [decode(dtype, 8, 32, 8, 4096, 128, threads=threads) for dtype in TYPES for threads in thread_counts()],
        ),
        Group(
            "small",
            "A small call",
            "µs",
            [
                small_call(*shape)
                for shape in (
                    # query heads, key heads, keys
                    (1, 1, 16),
                    (8, 2, 16),
                    (8, 8, 1),
                    (8, 8, 16),
                    (32, 8, 16),
                )
            ],
            "One query, head size 64: what the call itself costs from Python.",
        ),
    ]


def thread_counts() -> list[int]:
    """One and two; one alone where the machine has no more."""
    return [1, 2][: torch.get_num_threads()]


# The kinds of case. Each takes the numbers of a row and says what is called.


def prefill(
    dtype: str,
    batch: int,
    heads_q: int,
    heads_k: int,
    length: int,
    head_dim: int,
    causal: bool,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    threads: int | None = None,
) -> Case:
    """As many queries as keys; `window` is how many keys before its own a query of a causal call sees."""

    def contenders() -> list[Contender]:
        q = random_tensor(TYPES[dtype], batch, length, heads_q, head_dim)
        k, v = (random_tensor(TYPES[dtype], batch, length, heads_k, head_dim) for _ in range(2))
        q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"is_causal": causal, "enable_gqa": heads_q != heads_k}
        if window is not None:
            options.update(is_causal=False, attn_mask=window_mask(length, window))
        window_size = (-1, -1) if window is None else (window, 0)
        peer = Contender("SDPA", lambda: scaled_dot_product_attention(q_t, k_t, v_t, **options), heads_last, peer=True)
        if softcap:
            peer = Contender("PyTorch", lambda: softcap_attention(q_t, k_t, v_t, softcap), heads_last, peer=True)
        return [
            Contender(
                "MATE",
                lambda: mate.flash_attn_func(q, k, v, causal=causal, window_size=window_size, softcap=softcap),
            ),
            peer,
        ]

    labels: dict[str, object] = {
        "type": dtype,
        "batch": batch,
        "heads": heads_label(heads_q, heads_k),
        "length": length,
        "head size": head_dim,
        "mask": "causal" if causal else "full",
    }
    if window is not None:
        labels["mask"] = f"window {window}"
    if threads is not None:
        labels["threads"] = threads
    work = 4 * batch * heads_q * head_dim * visible_pairs(length, causal, window)
    return Case(labels, work, contenders, threads)


def decode(
    dtype: str,
    batch: int,
    heads_q: int,
    heads_k: int,
    context: int,
    head_dim: int,
    *,
    pages: Sequence[int | None] = (PAGE_SIZE,),
    threads: int | None = None,
) -> Case:
    """One query a sequence over a cache, with pages of each size of `pages` (None: contiguous), in random order."""
    cache_type = CACHE_TYPES[dtype]
    cache_bytes = 2 * batch * context * heads_k * head_dim * cache_type.itemsize
    layers = math.ceil(COLD_BYTES / cache_bytes)

    def contenders() -> list[Contender]:
        q = random_tensor(QUERY_TYPES[dtype], batch, 1, heads_q, head_dim)
        k, v = (random_tensor(cache_type, batch, context, heads_k, head_dim) for _ in range(2))
        lengths = torch.full((batch,), context, dtype=torch.int32)
        entrants = [cache_contender(q, k, v, lengths, page_size, layers, len(pages) > 1) for page_size in pages]
        if q.dtype == k.dtype:
            entrants.append(sdpa_decode(q, k, v, layers))
        entrants.append(Contender("plain read", over_layers(read_all, k, v, layers), limit=True))
        return entrants

    labels: dict[str, object] = {
        "type": dtype,
        "batch": batch,
        "heads": heads_label(heads_q, heads_k),
        "context": context,
        "head size": head_dim,
    }
    if threads is not None:
        labels["threads"] = threads
    return Case(labels, cache_bytes, contenders, threads)


def cache_contender(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, page_size: int | None, layers: int, name_pages: bool
) -> Contender:
    name, page_table = "MATE contiguous", None
    if page_size is not None:
        name = f"MATE pages of {page_size}"
        page_table = torch.randperm(k.shape[0] * k.shape[1] // page_size).int().view(len(k), -1)
        k, v = (paged(x, page_table, page_size) for x in (k, v))

    def call(k: Tensor, v: Tensor) -> Any:
        return mate.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=page_table)

    return Contender(name if name_pages else "MATE", over_layers(call, k, v, layers))


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor, layers: int) -> Contender:
    q_t = q.transpose(1, 2)
    gqa = q.shape[2] != k.shape[2]

    def call(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q_t, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=gqa)

    return Contender("SDPA", over_layers(call, k, v, layers), heads_last, peer=True)


def read_all(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.view(torch.int64).sum()


def ragged(dtype: str, lengths: list[int], heads: int, head_dim: int, causal: bool) -> Case:
    def contenders() -> list[Contender]:
        q, k, v = (random_tensor(TYPES[dtype], sum(lengths), heads, head_dim) for _ in range(3))
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        longest = max(lengths)
        q_padded, k_padded, v_padded = (
            pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2) for x in (q, k, v)
        )
        mask = padding_mask(lengths, causal)
        sequences = list(zip(*([part.transpose(0, 1)[None] for part in x.split(lengths)] for x in (q, k, v))))
        return [
            Contender(
                "MATE", lambda: mate.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal)
            ),
            Contender(
                "SDPA padded",
                lambda: scaled_dot_product_attention(q_padded, k_padded, v_padded, attn_mask=mask),
                lambda out: torch.cat([rows[:length] for rows, length in zip(heads_last(out), lengths)]),
                peer=True,
            ),
            Contender(
                "SDPA in a loop",
                lambda: [scaled_dot_product_attention(q, k, v, is_causal=causal) for q, k, v in sequences],
                lambda outs: torch.cat([heads_last(out)[0] for out in outs]),
                peer=True,
            ),
        ]

    labels: dict[str, object] = {
        "type": dtype,
        "lengths": ", ".join(f"{len(list(same))} x {length}" for length, same in itertools.groupby(lengths)),
        "mask": "causal" if causal else "full",
    }
    return Case(labels, 4 * heads * head_dim * sum(visible_pairs(length, causal) for length in lengths), contenders)


def small_call(heads_q: int, heads_k: int, keys: int, head_dim: int = 64) -> Case:
    def contenders() -> list[Contender]:
        q = random_tensor(torch.float32, 1, 1, heads_q, head_dim)
        k, v = (random_tensor(torch.float32, 1, keys, heads_k, head_dim) for _ in range(2))
        lengths = torch.tensor([keys], dtype=torch.int32)
        q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))
        gqa = heads_q != heads_k
        return [
            Contender("flash_attn_func", lambda: mate.flash_attn_func(q, k, v)),
            Contender("flash_attn_with_kvcache", lambda: mate.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)),
            Contender(
                "SDPA", lambda: scaled_dot_product_attention(q_t, k_t, v_t, enable_gqa=gqa), heads_last, peer=True
            ),
        ]

    labels: dict[str, object] = {"type": "float32", "query heads": heads_q, "key heads": heads_k, "keys": keys}
    return Case(labels, 4 * heads_q * head_dim * keys, contenders)


# What the cases are made of.


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        return torch.randn(*shape, dtype=torch.bfloat16).to(dtype)
    return torch.randn(*shape, dtype=dtype)


def paged(x: Tensor, page_table: Tensor, page_size: int) -> Tensor:
    """The pages that hold x, (batch, length, ...), where page_table says that they are."""
    pages = torch.empty(page_table.numel(), page_size, *x.shape[2:], dtype=x.dtype)
    # As bytes: PyTorch does not index float8.
    pages.view(torch.uint8)[page_table.flatten()] = x.view(torch.uint8).reshape(pages.view(torch.uint8).shape)
    return pages


def over_layers(call: Callable[[Tensor, Tensor], Any], k: Tensor, v: Tensor, layers: int) -> Callable[[], Any]:
    """A call that takes the next of so many equal caches each time."""
    caches = itertools.cycle([(k, v), *((k.clone(), v.clone()) for _ in range(layers - 1))])
    return lambda: call(*next(caches))


def window_mask(length: int, window: int) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance <= window)


def padding_mask(lengths: Sequence[int], causal: bool) -> Tensor:
    """(batch, 1, 1 or longest, longest): which keys of the padded batch are there, and not after the query."""
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]
    return mask & torch.ones(longest, longest, dtype=torch.bool).tril() if causal else mask


def softcap_attention(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


# The machine's own ceilings.


def ceilings(effort: Effort) -> dict[str, float]:
    """GFLOP/s of PyTorch's matrix products, without those that run as if by hand, and GB/s of reading memory."""
    found = {f"{name} matrix product, GFLOP/s": matrix_product(dtype, 2048, effort) for name, dtype in served_types()}
    return {**found, "reading memory, GB/s": read_bandwidth(effort)}


def served_types() -> Iterable[tuple[str, torch.dtype]]:
    """The types whose matrix products are not far slower than float32's, as fp16's are where nothing is made for it."""
    reference = matrix_product(torch.float32, 256, QUICK)
    return [(name, dtype) for name, dtype in TYPES.items() if matrix_product(dtype, 256, QUICK) > reference / 20]


def matrix_product(dtype: torch.dtype, size: int, effort: Effort) -> float:
    a, b = random_tensor(dtype, size, size), random_tensor(dtype, size, size)
    return 2 * size**3 / best_seconds({"product": lambda: a @ b}, effort)["product"] / 1e9


def read_bandwidth(effort: Effort) -> float:
    """Which type PyTorch sums fastest differs from machine to machine; int32 it does not sum in vectors at all."""
    memory = torch.ones(2**29, dtype=torch.uint8)  # not zeros, which may be one page of memory seen many times
    views = [memory.view(dtype) for dtype in (torch.float32, torch.float64, torch.int64)]
    seconds = best_seconds({str(view.dtype): functools.partial(torch.sum, view) for view in views}, effort)
    return memory.nbytes / min(seconds.values()) / 1e9


def ceilings_table(start: dict[str, float], end: dict[str, float]) -> str:
    rows = [[name, figure(start[name]), figure(end.get(name))] for name in start]
    parts = [
        "### Ceilings: PyTorch's matrix products of 2048, reading 512 MiB",
        markdown_table(["", "at the start", "at the end"], rows),
    ]
    missing = [name for name in TYPES if f"{name} matrix product, GFLOP/s" not in start]
    if missing:
        parts.append(f"Left out, more than 20 times slower than float32 here: the product in {', '.join(missing)}.")
    return "\n\n".join(parts)


# The run as a whole.


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mate": mate.info(),
    }


def headline(about: dict[str, Any]) -> str:
    info = about["mate"]
    return (
        f"{about['date'][:10]}, {about['cpu']} ({about['instructions']}), {about['threads']} threads, "
        f"PyTorch {info['torch']}, MATE {info['version']} ({info['backends']['cpu']})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="MATE beside PyTorch's scaled_dot_product_attention on the CPU.")
    options, _ = parse_options(parser, groups())

    about = environment()
    print(headline(about), end="\n\n", flush=True)
    with torch.inference_mode():
        start = ceilings(options.effort)
        rows = measured(options.groups, options.effort)
        end = ceilings(options.effort)
    print(ceilings_table(start, end))

    report = {
        **about,
        "quick": options.effort is QUICK,
        "ceilings": {"start": start, "end": end},
        "groups": {group.name: group_figures(group, rows[group.name]) for group in options.groups},
    }
    if options.json:
        write_json(options.json, report)
    if options.pictures:
        import pictures  # here, so that the tables need no matplotlib

        pictures.draw_cpu(report, options.pictures)


if __name__ == "__main__":
    main()
