"""Which keys a row sees, read off the output: with queries of 0 a row of out is the mean of the values that it
sees, and the values here are unit vectors."""

from types import ModuleType
from typing import Any, Optional

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import visible

BOUNDS = [-1, 0, 1, 2, 3, 5, 63, 64, 65, 200, 2**31 - 1]
LENGTHS = [0, 1, 2, 3, 5, 63, 64, 65, 127, 128, 129, 200, 300]


def seen_by(mate: ModuleType, device: str, sq: int, sk: int, **mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(sq, sk), True where the library counts key j for row i, and how many keys it counts for each row."""
    q = torch.zeros(1, sq, 1, 8, device=device, dtype=torch.bfloat16)
    k = torch.zeros(1, sk, 1, 8, device=device, dtype=torch.bfloat16)
    # On a GPU each head size has kernels of its own, and there are no large ones.
    columns = max(sk, 1) if device == "cpu" else 64
    v = torch.eye(sk, -(-max(sk, 1) // columns) * columns, device=device, dtype=torch.bfloat16)[None, :, None]
    results = [mate.flash_attn_func(q, k, part, return_attn_probs=True, **mask) for part in v.split(columns, -1)]
    out, lse = torch.cat([out for out, _ in results], -1), results[0][1]
    return out[0, :, 0, :sk] > 0, lse[0, 0].exp().round().long()


def check(mate, device: str, sq: int, sk: int, causal: bool, window: Any, chunk: Any, **options: Any) -> None:
    seen, count = seen_by(mate, device, sq, sk, causal=causal, window_size=window, attention_chunk=chunk, **options)
    bounds = (-1, -1) if window is None else tuple(-1 if side is None else int(side) for side in window)
    want = visible(sq, sk, causal, bounds, int(chunk or 0), device=device)
    assert torch.equal(seen, want)
    assert torch.equal(count, want.sum(1))


@settings(max_examples=300, deadline=None)
@given(
    sq=st.one_of(st.integers(0, 12), st.sampled_from(LENGTHS)),
    sk=st.one_of(st.integers(0, 12), st.sampled_from(LENGTHS)),
    causal=st.booleans(),
    window=st.tuples(st.sampled_from([*BOUNDS, None]), st.sampled_from([*BOUNDS, None])),
    chunk=st.sampled_from([0, None, 1, 2, 3, 5, 64, 100, 2**31 - 1]),
    num_splits=st.sampled_from([0, 1, 3]),
    pack_gqa=st.sampled_from([None, True, False]),
)
def test_every_rule_together(mate, device, sq, sk, causal, window, chunk, num_splits, pack_gqa) -> None:
    check(mate, device, sq, sk, causal, window, chunk, num_splits=num_splits, pack_gqa=pack_gqa)


@pytest.mark.parametrize("sq", range(5))
@pytest.mark.parametrize("sk", range(5))
def test_small_sizes_exhaustively(mate: ModuleType, device: str, sq: int, sk: int) -> None:
    for causal in (False, True):
        for left in (-1, 0, 1, 2):
            for right in (-1, 0, 1, 2):
                for chunk in (0, 1, 2, 3):
                    check(mate, device, sq, sk, causal, (left, right), chunk)


@settings(max_examples=150, deadline=None)
@given(
    sq=st.integers(0, 9),
    sk=st.sampled_from([0, 1, 3, 64, 70, 130]),
    world_size=st.integers(2, 4),
    surplus=st.integers(-6, 6),
    causal=st.booleans(),
    left=st.sampled_from([-1, 0, 3, 100]),
    right=st.sampled_from([-1, 0, 3]),
    chunk=st.sampled_from([0, 1, 5, 64]),
    data=st.data(),
)
def test_context_parallel(mate, device, sq, sk, world_size, surplus, causal, left, right, chunk, data) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    total = max(0, sk * world_size + surplus)
    seen, count = seen_by(
        mate,
        device,
        sq,
        sk,
        causal=causal,
        window_size=(left, right),
        attention_chunk=chunk,
        cp_world_size=world_size,
        cp_rank=rank,
        cp_tot_seqused_k=torch.tensor([total], dtype=torch.int32, device=device),
    )
    want = visible(sq, sk, causal, (left, right), chunk, world_size, rank, total, device)
    assert torch.equal(seen, want)
    assert torch.equal(count, want.sum(1))


@pytest.mark.parametrize("window", [[3, 2], (3, 2), torch.Size([3, 2]), (torch.tensor(3), torch.tensor(2))])
def test_window_is_any_sequence_of_two(mate: ModuleType, device: str, window: Any) -> None:
    check(mate, device, 6, 9, False, window, 0)


@pytest.mark.parametrize("side", [None, -1, -7])
def test_no_bound(mate: ModuleType, device: str, side: Optional[int]) -> None:
    check(mate, device, 6, 9, False, (side, 1), 0)
    check(mate, device, 6, 9, False, (1, side), 0)
