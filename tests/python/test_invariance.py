"""What must not change a result: asking again, the layout, splits, packing."""

import copy
import random
from types import ModuleType

import pytest
import torch
from calls import Call, draw_some
from judge import bars, check, check_lse, error, same_bits
from layouts import alone, relaid, rows_of
from reference import evaluate, sequences


def with_lse(call: Call) -> Call:
    name = "return_softmax_lse" if call.function == "flash_attn_with_kvcache" else "return_attn_probs"
    arguments = {key: value for key, value in call.arguments.items() if key not in ("return_softmax_lse", "out")}
    return Call(call.function, {**arguments, name: True}, call.seed)


def check_close(mate: ModuleType, call: Call, same: Call) -> None:
    """The results of two calls that mean the same, each within its bar of what is right."""
    magnitude = evaluate(call.function, call.arguments).magnitude
    limits = bars(call, same)
    for b, (one, other) in enumerate(zip(rows_of(call, same.run(mate)), rows_of(call, call.run(mate)))):
        where = sequences(call.normalised)[b]
        assert error(one[0], other[0], magnitude[where.rows]) <= 2 * limits.out, str(call)
        check_lse(one[1], other[1].double(), 2 * limits.lse)


def test_same_call_same_bits(mate: ModuleType, device: str, seed: int) -> None:
    for call in draw_some(150, seed, device=device):
        again = copy.deepcopy(call)
        assert same_bits(call.run(mate), again.run(mate)), str(call)


def test_whole_against_sequences_one_by_one(mate: ModuleType, device: str, seed: int) -> None:
    for call in draw_some(60, seed, lambda call: call.normalised.batch > 1, device=device, rotary=False):
        call = with_lse(call)
        parts = [alone(call, s) for s in sequences(call.normalised)]
        whole = rows_of(call, call.run(mate))
        for part, (out, lse) in zip(parts, whole):
            one_out, one_lse = part.run(mate)
            expected = evaluate(part.function, part.arguments)
            assert error(out, one_out[0], expected.magnitude[0]) <= 2 * bars(call, part).out, str(call)
            check_lse(lse, one_lse[0].T.double(), 2 * bars(call, part).lse)


@pytest.mark.parametrize("keys", ["ragged", "padded", "paged"])
def test_layout_of_the_keys(mate: ModuleType, device: str, seed: int, keys: str) -> None:
    dice = random.Random(seed)
    for call in draw_some(40, seed, lambda call: call.normalised.batch > 0, device=device, rotary=False):
        contiguous, other = relaid(call, dice), relaid(call, dice, keys=keys)
        check_close(mate, contiguous, other)


def test_splits_against_none(mate: ModuleType, device: str, seed: int) -> None:
    def is_split(call: Call) -> bool:
        return int(call.normalised.num_splits) > 1

    for call in draw_some(80, seed, is_split, device=device):
        call = with_lse(call)
        whole = Call(call.function, {**copy.deepcopy(call.arguments), "num_splits": 1})
        check_close(mate, whole, call)


@pytest.mark.parametrize("changed", [{"pack_gqa": True}, {"pack_gqa": False}, {"sm_margin": 3}, {"num_splits": 0}])
def test_choices_of_speed(mate: ModuleType, device: str, seed: int, changed: dict) -> None:
    for call in draw_some(25, seed, device=device, functions=("flash_attn_func", "flash_attn_with_kvcache")):
        call = with_lse(call)
        other = Call(call.function, {**copy.deepcopy(call.arguments), **changed})
        check_close(mate, call, other)


def test_deterministic_changes_nothing(mate: ModuleType, device: str, seed: int) -> None:
    for call in draw_some(20, seed, device=device, functions=("flash_attn_func", "flash_attn_varlen_func")):
        results = [copy.deepcopy(call).run(mate, deterministic=choice) for choice in (False, True)]
        assert same_bits(*results), str(call)


def test_broadcast_tensors(mate: ModuleType, device: str) -> None:
    """Strides of 0: one sequence for all of the batch, one head for all heads, one query for all rows."""
    q, k, v = (torch.randn(1, n, 1, 16, device=device, dtype=torch.bfloat16) for n in (1, 300, 300))
    arguments = {"q": q.expand(3, 4, 6, 16), "k": k.expand(3, 300, 2, 16), "v": v.expand(3, 300, 2, 16)}
    check(Call("flash_attn_func", {**arguments, "causal": True, "return_attn_probs": True}), mate)


@pytest.mark.parametrize("interleaved", [False, True])
def test_new_keys_that_stand_where_they_are_written_to(mate: ModuleType, device: str, interleaved: bool) -> None:
    batch, rows, held, heads, head_dim = 2, 12, 5, 2, 200  # more columns than a warp of the GPU takes at a time
    caches = [torch.randn(batch, rows, heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2)]
    angles = torch.randn(rows, 96, device=device)
    queries = torch.randn(batch, 1, heads, head_dim, dtype=torch.bfloat16, device=device)
    lengths = torch.full((batch,), held, dtype=torch.int32, device=device)

    def append(in_place: bool) -> tuple[torch.Tensor, ...]:
        k_cache, v_cache = (cache.clone() for cache in caches)
        new = [cache[:, held : held + 3] for cache in ((k_cache, v_cache) if in_place else caches)]
        out = mate.flash_attn_with_kvcache(
            queries,
            k_cache,
            v_cache,
            *new,
            rotary_cos=angles.cos(),
            rotary_sin=angles.sin(),
            rotary_interleaved=interleaved,
            cache_seqlens=lengths,
        )
        return out, k_cache, v_cache

    assert same_bits(append(in_place=True), append(in_place=False))
