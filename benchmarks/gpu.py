"""MATE beside its peers on one NVIDIA GPU, in one process.

    python benchmarks/gpu.py                          # every table, some minutes
    python benchmarks/gpu.py --quick                  # two small rows of each
    python benchmarks/gpu.py --only prefill host      # these tables
    python benchmarks/gpu.py --json figures.json --pictures docs/images

Peers: cuDNN, by PyTorch's scaled_dot_product_attention, FlashAttention-3, where the variable FA3_LIBRARY names the
shared library of vLLM's build of it (`vllm/vllm_flash_attn/_vllm_fa3_C*.so` of vLLM's wheel), and FlashInfer where it
can be imported. What a peer refuses has no figure.

The tables go to stdout, in Markdown. All contenders of a row take turns, each with a cold L2 cache, timed by events on
the stream; the median counts. `ratio` is how many times faster MATE is than its best peer.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_cache
import torch
from gpu_peers import cudnn, flash_attention_3, takes
from gpu_timing import events_seconds, issue_seconds
from measure import Case, Contender, Effort, Group, figure, markdown_table
from shapes import E4M3, TYPE_LABELS, heads_label, heads_last, random_on_gpu, visible_pairs
from tables import group_figures, measured, parse_options, write_json

import mate

TOKENS = 16384
HIDDEN = 2048


def groups() -> list[Group]:
    lengths = (512, 2048, 8192, 16384)
    return [
        Group(
            "prefill",
            f"Prefill, bf16, {TOKENS} tokens, hidden size {HIDDEN}",
            "TFLOP/s",
            [
                prefill(TOKENS // length, HIDDEN // size, HIDDEN // size, length, size, size, causal)
                for size in (64, 128, 256)
                for causal in (False, True)
                for length in lengths
            ],
            "A causal mask counts as half of the work.",
            events_seconds,
        ),
        Group(
            "prefill-e4m3",
            f"Prefill, e4m3, {TOKENS} tokens, hidden size {HIDDEN}",
            "TFLOP/s",
            [
                prefill(TOKENS // length, HIDDEN // size, HIDDEN // size, length, size, size, causal, dtype=E4M3)
                for size in (64, 128, 256)
                for causal in (False, True)
                for length in (2048, 8192, 16384)
            ],
            "A causal mask counts as half of the work.",
            events_seconds,
        ),
        Group(
            "ragged",
            "Ragged batches, bf16, 32/8 heads of 128",
            "TFLOP/s",
            [
                ragged(name, sizes, causal)
                for name, sizes in (
                    ("16 x 2048", [2048] * 16),
                    ("16 of 64 to 4096", random_lengths(16, 64, 4096)),
                    ("16384, 255 x 64", [16384] + [64] * 255),
                    ("256 x 128", [128] * 256),
                )
                for causal in (False, True)
            ],
            timing=events_seconds,
        ),
        Group(
            "windows",
            "Sliding windows, bf16, 32/8 heads of 128",
            "TFLOP/s",
            [prefill(1, 32, 8, TOKENS, 128, 128, True, window) for window in (128, 1024, 4096)],
            "Causal; the work is that of the pairs inside the window.",
            events_seconds,
        ),
        Group(
            "heads",
            "Head sizes, bf16, 4 x 4096 tokens, hidden size about 2048",
            "TFLOP/s",
            [
                prefill(4, HIDDEN // size, HIDDEN // size, 4096, size, size_v, causal)
                for size, size_v in (
                    (72, 72),
                    (80, 80),
                    (96, 96),
                    (112, 112),
                    (160, 160),
                    (192, 192),
                    (192, 128),
                    (100, 100),
                    (72, 40),
                    (80, 48),
                )
                for causal in (False, True)
            ],
            "The work is that of the true sizes.",
            events_seconds,
        ),
        Group(
            "wide-heads",
            f"Head sizes above 256, and 256, bf16, one sequence of {TOKENS} tokens, hidden size about {HIDDEN}",
            "TFLOP/s",
            [
                prefill(1, HIDDEN // size, HIDDEN // size, TOKENS, size, size, causal)
                for size in (256, 320, 384, 512)
                for causal in (False, True)
            ],
            "A causal mask counts as half of the work.",
            events_seconds,
        ),
        Group(
            "host",
            "Host time of a small call from Python",
            "µs",
            [prefill(1, 32, 32, 128, 128, 128, True)],
            "Calls are issued without waiting for the GPU.",
            issue_seconds,
        ),
        *gpu_cache.groups(),
    ]


# The kinds of case.


def prefill(
    batch: int,
    heads_q: int,
    heads_k: int,
    length: int,
    head_dim: int,
    head_dim_v: int,
    causal: bool,
    window: int = -1,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """As many queries as keys; `window` is how many keys before its own a query sees, if not negative."""

    def contenders() -> list[Contender]:
        q = random_on_gpu(batch, length, heads_q, head_dim, dtype=dtype)
        k = random_on_gpu(batch, length, heads_k, head_dim, dtype=dtype)
        v = random_on_gpu(batch, length, heads_k, head_dim_v, dtype=dtype)
        size = (window, 0) if window >= 0 else (-1, -1)
        entrants = [Contender("MATE", lambda: mate.flash_attn_func(q, k, v, causal=causal, window_size=size))]
        if (fa3 := flash_attention_3()) is not None:
            entrants.append(Contender("FA3", fa3.dense(q, k, v, causal, window), peer=True))
        if window < 0 and dtype is not E4M3:
            entrants.append(Contender("cuDNN", cudnn(q, k, v, causal), heads_last, peer=True))
        return [entrant for entrant in entrants if not entrant.peer or takes(entrant)]

    labels: dict[str, object] = {
        "type": TYPE_LABELS[dtype],
        "batch": batch,
        "heads": heads_label(heads_q, heads_k),
        "length": length,
        "head size": head_dim if head_dim == head_dim_v else f"{head_dim}, {head_dim_v}",
        "mask": f"window {window}" if window >= 0 else "causal" if causal else "full",
    }
    pairs = visible_pairs(length, causal, window if window >= 0 else None)
    return Case(labels, 2 * batch * heads_q * (head_dim + head_dim_v) * pairs, contenders)


def ragged(name: str, lengths: list[int], causal: bool) -> Case:
    heads_q, heads_k, head_dim = 32, 8, 128

    def contenders() -> list[Contender]:
        q, k, v = (random_on_gpu(sum(lengths), heads, head_dim) for heads in (heads_q, heads_k, heads_k))
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        longest = max(lengths)
        entrants = [
            Contender("MATE", lambda: mate.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal))
        ]
        if (fa3 := flash_attention_3()) is not None:
            entrants.append(Contender("FA3", lambda: fa3.varlen(q, k, v, ends, longest, causal), peer=True))
        return entrants

    labels: dict[str, object] = {"type": "bf16", "lengths": name, "mask": "causal" if causal else "full"}
    return Case(labels, 4 * heads_q * head_dim * sum(visible_pairs(n, causal) for n in lengths), contenders)


def random_lengths(count: int, low: int, high: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(1)).tolist()


# The first call of a kind, in processes of their own.

FIRST_CALL = """
import time, torch, mate
x = torch.randn(1, 128, 4, {size}, dtype=torch.bfloat16, device="cuda")
torch.cuda.synchronize()
started = time.perf_counter()
mate.flash_attn_func(x, x, x, causal=True)
torch.cuda.synchronize()
print(time.perf_counter() - started)
"""


def first_calls(sizes: Sequence[int]) -> list[dict[str, float]]:
    """Seconds of a first call: with nothing on disk, and with its kernel there."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        # NVRTC keeps results in the driver's cache, which would not be cold.
        environment = {**os.environ, "MATE_CACHE_DIR": str(Path(folder) / "kernels"), "CUDA_CACHE_DISABLE": "1"}
        for size in sizes:
            program = FIRST_CALL.format(size=size)
            cold, warm = (
                float(subprocess.check_output([sys.executable, "-c", program], env=environment)) for _ in range(2)
            )
            found.append({"head size": size, "cold": cold, "from disk": warm})
    return found


def first_calls_table(calls: Sequence[dict[str, float]]) -> str:
    rows = [[int(row["head size"]), figure(row["cold"]), figure(row["from disk"])] for row in calls]
    return "### The first call of a kind, seconds\n\n" + markdown_table(["head size", "cold", "from disk"], rows)


# The run as a whole.


def environment() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "mate": mate.info(),
    }


def headline(about: dict[str, Any]) -> str:
    info = about["mate"]
    return (
        f"{about['date'][:10]}, {about['gpu']}, PyTorch {info['torch']}, CUDA {about['cuda']}, "
        f"cuDNN {about['cudnn']}, MATE {info['version']}."
    )


def matrix_product(effort: Effort) -> float:
    """TFLOP/s of PyTorch's bf16 product: what this GPU allows."""
    size = 8192
    a, b = random_on_gpu(size, size), random_on_gpu(size, size)
    return 2 * size**3 / events_seconds({"product": lambda: a @ b}, effort)["product"] / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description="MATE beside its peers on one NVIDIA GPU.")
    parser.add_argument("--no-first-calls", action="store_true", help="leave out the processes that time a first call")
    options, arguments = parse_options(parser, groups())
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")

    about = environment()
    print(headline(about), end="\n\n", flush=True)
    with torch.inference_mode():
        product = matrix_product(options.effort)
        print(f"bf16 matrix product of 8192: {figure(product)} TFLOP/s.", end="\n\n", flush=True)
        rows = measured(options.groups, options.effort)
    report = {
        **about,
        "matrix product": product,
        "groups": {group.name: group_figures(group, rows[group.name]) for group in options.groups},
    }
    if not arguments.no_first_calls:
        report["first calls"] = first_calls((64, 128, 256))
        print(first_calls_table(report["first calls"]))
    if options.json:
        write_json(options.json, report)
    if options.pictures:
        import pictures  # here, so that the tables need no matplotlib

        pictures.draw_gpu(report, options.pictures)


if __name__ == "__main__":
    main()
