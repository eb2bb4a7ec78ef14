"""What a small call costs from Python, beside PyTorch's scaled_dot_product_attention: one query row over a few keys.

    python benchmarks/small_call.py

Prints, for each shape, the least microseconds a call of several rounds, in which both take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

import mate

ROUNDS, CALLS = 30, 500
HEAD_DIM = 64


def microseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS * 1e6


def main() -> None:
    print(f"mate {mate.__version__} ({mate.info()['backends']['cpu']}), torch {torch.__version__}")
    print(f"{'query heads':>11} {'key heads':>9} {'keys':>5} {'flash_attn_func':>16} {'with_kvcache':>13} {'sdpa':>6}")
    with torch.inference_mode():
        for heads_q, heads_k, keys in ((1, 1, 16), (8, 2, 16), (8, 8, 1), (8, 8, 16), (32, 8, 16)):
            q = torch.randn(1, 1, heads_q, HEAD_DIM)
            k, v = torch.randn(2, 1, keys, heads_k, HEAD_DIM)
            lengths = torch.tensor([keys], dtype=torch.int32)
            q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))
            calls: list[Callable[[], object]] = [
                lambda q=q, k=k, v=v: mate.flash_attn_func(q, k, v),
                lambda q=q, k=k, v=v, lengths=lengths: mate.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths),
                lambda q=q_t, k=k_t, v=v_t, gqa=heads_q != heads_k: scaled_dot_product_attention(
                    q, k, v, enable_gqa=gqa
                ),
            ]
            best = [min(times) for times in zip(*([microseconds(call) for call in calls] for _ in range(ROUNDS)))]
            print(f"{heads_q:11} {heads_k:9} {keys:5} {best[0]:16.1f} {best[1]:13.1f} {best[2]:6.1f}", flush=True)


if __name__ == "__main__":
    main()
