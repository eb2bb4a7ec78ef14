"""The results of all ranks of context parallel, combined by their lse, are those of the whole sequence."""

import random
from types import ModuleType

import pytest
import torch
from calls import Call, draw_some
from judge import bars, check_lse, error
from layouts import relaid, sequences
from reference import evaluate


def can_be_spread(call: Call) -> bool:
    a = call.normalised
    return a.batch > 0 and int(a.cp_world_size) == 1


def combined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges partial results out (total_q, h, dv) and lse (h, total_q) by the definition of lse."""
    outs = torch.stack([out.double() for out, _ in parts])
    lses = torch.stack([lse.double() for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse).masked_fill(torch.isneginf(lses), 0)
    return (weights.transpose(-1, -2)[..., None] * outs).sum(0), lse


def calls_of_ranks(call: Call, dice: random.Random, world_size: int, keys: str) -> list[Call]:
    """Each rank's call, with its part of the call's keys."""
    parts = []
    for rank in range(world_size):
        part = relaid(call, dice, keys=keys, world_size=world_size, rank=rank)
        if rank != 1:  # one rank counts the sink
            part.arguments.pop("learnable_sink", None)
        parts.append(part)
    return parts


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("keys", ["ragged", "padded", "paged"])
def test_ranks_against_the_whole(mate: ModuleType, device: str, seed: int, world_size: int, keys: str) -> None:
    dice = random.Random(seed)
    for call in draw_some(20, seed, can_be_spread, device=device, rotary=False):
        whole = relaid(call, dice)
        expected = evaluate(whole.function, whole.arguments)
        ranks = calls_of_ranks(call, dice, world_size, keys)
        out, lse = combined([rank.run(mate) for rank in ranks])
        assert error(out, expected.out, expected.magnitude) <= 2 * bars(*ranks).out, str(call)
        check_lse(lse.float(), expected.lse, 2 * bars(*ranks).lse)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_combined_by_the_library(mate: ModuleType, device: str, seed: int, world_size: int) -> None:
    dice = random.Random(seed)
    for call in draw_some(30, seed, can_be_spread, device=device, rotary=False):
        whole = relaid(call, dice)
        expected = evaluate(whole.function, whole.arguments)
        ranks = calls_of_ranks(call, dice, world_size, "ragged")
        parts = [rank.run(mate) for rank in ranks]
        merged, merged_lse = mate.flash_attn_combine(
            torch.stack([out.float() for out, _ in parts])[:, None],
            torch.stack([lse.T for _, lse in parts])[:, None],
        )
        assert merged.dtype == torch.float32
        assert error(merged[0], expected.out, expected.magnitude) <= 2 * bars(*ranks).out, str(call)
        check_lse(merged_lse[0].T, expected.lse, 2 * bars(*ranks).lse)


def test_a_world_of_one_ignores_the_total(mate: ModuleType, device: str, seed: int) -> None:
    for call in draw_some(20, seed, can_be_spread, device=device):
        a = call.normalised
        garbage = torch.full((a.batch,), -5, dtype=torch.int32, device=device)
        want = evaluate(call.function, call.arguments)
        out, _ = call.run(mate, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=garbage)
        assert error(out, want.out, want.magnitude) <= bars(call).out, str(call)


def test_a_rank_without_keys_contributes_nothing(mate: ModuleType, device: str) -> None:
    q = torch.randn(1, 1, 2, 8, device=device, dtype=torch.bfloat16)
    k = torch.full((1, 3, 1, 8), torch.nan, device=device, dtype=torch.bfloat16)
    total = torch.tensor([2], dtype=torch.int32, device=device)
    out, lse = mate.flash_attn_func(q, k, k, cp_world_size=4, cp_rank=2, cp_tot_seqused_k=total, return_attn_probs=True)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()
    call = Call(
        "flash_attn_func",
        {"q": q, "k": k, "v": k, "cp_world_size": 4, "cp_rank": 2, "cp_tot_seqused_k": total},
    )
    assert [s.total for s in sequences(call.normalised)] == [2]
