"""get_scheduler_metadata: a plan of the work that a call may be given, and may be given late."""

import copy
import random
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Call, draw_some, metadata_arguments
from judge import check_arguments, same_bits
from reference import evaluate

PLANNED = ("flash_attn_varlen_func", "flash_attn_with_kvcache")


def planned_calls(count: int, seed: int, device: str) -> list[tuple[Call, dict[str, Any]]]:
    """Random calls without metadata, each with the arguments that plan it."""
    calls = draw_some(count, seed, device=device, functions=PLANNED)
    return [(Call(call.function, call.arguments, call.seed), metadata_arguments(call)) for call in calls]


def other_lengths(planning: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """The arguments with other lengths in the tensors, which the host need not look at."""
    changed = dict(planning)

    def draw(name: str, cumulative: str, longest: Any) -> None:
        if planning[name] is None:
            return
        bounds = [int(longest)] * len(planning[name])
        if planning[cumulative] is not None:
            bounds = planning[cumulative].diff().tolist()
        values = [dice.randint(0, bound) for bound in bounds]
        changed[name] = torch.tensor(values, dtype=torch.int32, device=planning[name].device)

    draw("seqused_q", "cu_seqlens_q", planning["max_seqlen_q"])
    draw("cache_seqlens", "cu_seqlens_k", planning["max_seqlen_k"])
    if planning["cache_leftpad"] is not None:
        changed["cache_leftpad"] = torch.zeros_like(planning["cache_leftpad"])
    return changed


def test_with_against_without_bit_for_bit(mate: ModuleType, device: str, seed: int) -> None:
    for call, planning in planned_calls(200, seed, device):
        again = copy.deepcopy(call)
        metadata = mate.get_scheduler_metadata(**planning)
        assert same_bits(call.run(mate, scheduler_metadata=metadata), again.run(mate)), str(call)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_each_way_to_split(mate: ModuleType, device: str, seed: int, num_splits: int) -> None:
    for call, planning in planned_calls(40, seed, device):
        call.arguments["num_splits"] = num_splits
        again = copy.deepcopy(call)
        metadata = mate.get_scheduler_metadata(**{**planning, "num_splits": num_splits})
        assert same_bits(call.run(mate, scheduler_metadata=metadata), again.run(mate)), str(call)


def test_does_not_depend_on_bounds_or_paging(mate: ModuleType, device: str, seed: int) -> None:
    """A larger max_seqlen_k and another page size give a plan that serves the call alike."""
    for call, planning in planned_calls(40, seed, device):
        again = copy.deepcopy(call)
        planning["max_seqlen_k"] = int(planning["max_seqlen_k"] or 0) + 1000
        if planning["page_size"] is not None:
            planning["page_size"] += 13
        metadata = mate.get_scheduler_metadata(**planning)
        assert same_bits(call.run(mate, scheduler_metadata=metadata), again.run(mate)), str(call)


def test_is_an_int32_tensor_whose_shape_the_host_knows(mate: ModuleType, device: str, seed: int) -> None:
    dice = random.Random(seed)
    for _, planning in planned_calls(40, seed, device):
        metadata = mate.get_scheduler_metadata(**planning)
        other = mate.get_scheduler_metadata(**other_lengths(planning, dice))
        assert metadata.dtype == other.dtype == torch.int32
        assert metadata.dim() == 1
        assert metadata.shape == other.shape
        assert (
            metadata.device == planning["cache_seqlens" if planning["cu_seqlens_k"] is None else "cu_seqlens_k"].device
        )


def test_out_is_refreshed_in_place(mate: ModuleType, device: str, seed: int) -> None:
    dice = random.Random(seed)
    for call, planning in planned_calls(40, seed, device):
        metadata = mate.get_scheduler_metadata(**other_lengths(planning, dice))
        refreshed = mate.get_scheduler_metadata(**planning, out=metadata)
        assert refreshed.data_ptr() == metadata.data_ptr()
        assert same_bits(metadata, mate.get_scheduler_metadata(**planning))
        again = copy.deepcopy(call)
        assert same_bits(call.run(mate, scheduler_metadata=metadata), again.run(mate)), str(call)


def test_calls_share_it_and_never_write_it(mate: ModuleType, device: str, seed: int) -> None:
    for call, planning in planned_calls(30, seed, device):
        metadata = mate.get_scheduler_metadata(**planning)
        before = metadata.clone()
        results = [copy.deepcopy(call).run(mate, scheduler_metadata=metadata) for _ in range(2)]
        assert same_bits(*results), str(call)
        assert same_bits(metadata, before)


@pytest.mark.parametrize("stale", ["other lengths", "zeros", "garbage"])
def test_stale_metadata_ends_inside_the_tensors(mate: ModuleType, device: str, seed: int, stale: str) -> None:
    dice = random.Random(seed)
    for call, planning in planned_calls(60, seed, device):
        metadata = mate.get_scheduler_metadata(**other_lengths(planning, dice))
        if stale == "zeros":
            metadata.zero_()
        elif stale == "garbage":
            metadata.copy_(torch.randint(-(2**31), 2**31, metadata.shape, dtype=torch.int32))
        expected = evaluate(call.function, call.arguments)
        call.run(mate, scheduler_metadata=metadata)
        check_arguments(call.arguments, expected.after)


def test_seqused_k_is_another_name_of_cache_seqlens(mate: ModuleType, device: str) -> None:
    lengths = torch.tensor([5, 300, 0], dtype=torch.int32, device=device)
    sizes = {
        "batch_size": 3,
        "max_seqlen_q": 1,
        "max_seqlen_k": 400,
        "num_heads_q": 8,
        "num_heads_kv": 2,
        "headdim": 64,
    }
    one = mate.get_scheduler_metadata(3, 1, 400, 8, 2, 64, lengths)
    assert same_bits(one, mate.get_scheduler_metadata(**sizes, cache_seqlens=lengths))
    assert same_bits(one, mate.get_scheduler_metadata(**sizes, seqused_k=lengths))
