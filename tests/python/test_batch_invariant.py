"""batch_invariant=True: the bits of a row depend on its own sequence alone."""

import copy
import random
from types import ModuleType

import pytest
import torch
from calls import Call, draw_some
from judge import same_bits
from layouts import alone, relaid, rows_of
from reference import sequences


def invariant_calls(count: int, seed: int, device: str) -> list[Call]:
    """Random calls, made batch invariant, that return lse. None has rotary embedding: a call that has the
    rotated queries laid out anew would have to round them as the library does."""
    result = []
    for call in draw_some(count, seed, lambda call: call.normalised.batch > 0, device=device, rotary=False):
        kvcache = call.function == "flash_attn_with_kvcache"
        dropped = ("return_softmax_lse", "return_attn_probs", "out")
        arguments = {name: value for name, value in call.arguments.items() if name not in dropped}
        arguments["return_softmax_lse" if kvcache else "return_attn_probs"] = True
        result.append(Call(call.function, {**arguments, "batch_invariant": True}, call.seed))
    return result


def test_each_sequence_alone_and_unpadded(mate: ModuleType, device: str, seed: int) -> None:
    for call in invariant_calls(150, seed, device):
        parts = [alone(call, s) for s in sequences(call.normalised)]
        for part, (out, lse) in zip(parts, rows_of(call, call.run(mate))):
            one_out, one_lse = part.run(mate)
            assert same_bits((out, lse.T), (one_out[0], one_lse[0])), f"{call}\n{part}"


@pytest.mark.parametrize("ragged_q", [True, False])
@pytest.mark.parametrize("keys", ["ragged", "padded", "paged"])
def test_order_batch_and_layout(mate: ModuleType, device: str, seed: int, ragged_q: bool, keys: str) -> None:
    dice = random.Random(seed)
    for call in invariant_calls(40, seed, device):
        batch = call.normalised.batch
        order = dice.choices(range(batch), k=dice.randint(1, batch + 2))
        other = relaid(call, dice, order, ragged_q, keys)
        got = rows_of(other, other.run(mate))
        assert same_bits(got, rows_of(call, call.run(mate), order)), f"{call}\n{other}"


@pytest.mark.parametrize(
    "changed",
    [{"sm_margin": 1}, {"sm_margin": 100}, {"num_splits": 0}, {"num_splits": 7}, {"max_seqlen_q": 10_000}],
)
def test_options_that_have_no_say(mate: ModuleType, device: str, seed: int, changed: dict) -> None:
    dice = random.Random(seed)
    for call in invariant_calls(40, seed, device):
        call = relaid(call, dice)
        assert same_bits(call.run(mate), copy.deepcopy(call).run(mate, **changed)), str(call)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(mate: ModuleType, device: str, seed: int, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for call in invariant_calls(40, seed, device):
            again = copy.deepcopy(call)
            want = call.run(mate)
            torch.set_num_threads(threads)
            assert same_bits(want, again.run(mate)), str(call)
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
