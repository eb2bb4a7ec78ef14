"""Random calls, everything that the contract permits together, against the reference.

MATE_RANDOM_CALLS=N makes N of them, MATE_CALL_SEED=N the one of a seed. On a GPU they are calls that it serves, and
those that it does not serve are refused.
"""

import copy
import os
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
from calls import Call, draw
from environment import RUN_SEED
from judge import check, check_unwritten
from kernels import NOT_SERVED, not_served

COUNT = int(os.environ.get("MATE_RANDOM_CALLS", "2000"))
CHUNK = 50  # calls in one test
MOST_REPORTED = 5

one_call_asked_for = pytest.mark.skipif("MATE_CALL_SEED" in os.environ, reason="one call was asked for")


@one_call_asked_for
@pytest.mark.parametrize("chunk", range(-(-COUNT // CHUNK)))
def test_random_calls(mate: ModuleType, device: str, seed: int, chunk: int) -> None:
    failures = []
    count = min(CHUNK, COUNT - chunk * CHUNK)
    for i in range(count):
        call = draw(seed + i, device)
        text = str(call)
        try:
            check(call, mate)  # on a GPU none of them may be refused
        except Exception as reason:
            again = f"MATE_SEED={RUN_SEED} MATE_CALL_SEED={call.seed} pytest tests/python/test_random_calls.py"
            failures.append(f"{text}\n{type(reason).__name__}: {reason}\nrun it again: {again}\n")
    if failures:
        pytest.fail(
            f"{len(failures)} of {count} calls failed\n\n" + "\n".join(failures[:MOST_REPORTED]),
            pytrace=False,
        )


@pytest.mark.skipif("MATE_CALL_SEED" not in os.environ, reason="no call was asked for")
def test_one_call(mate: ModuleType, device: str) -> None:
    check(draw(int(os.environ["MATE_CALL_SEED"]), device), mate)


def calls_not_served(count: int, seed: int, device: str) -> Iterator[tuple[Call, list[str]]]:
    """Calls of everything, of which each asks for something that is not served on a GPU, and for what."""
    for i in range(20 * count):
        call = draw(seed + i, device, kinds=None)
        asked = not_served(call)
        if asked:
            yield call, asked
            count -= 1
        if count == 0:
            return


@one_call_asked_for
def test_what_a_gpu_does_not_serve_is_refused(mate: ModuleType, device: str, seed: int) -> None:
    if device == "cpu":
        pytest.skip("the CPU backend serves everything")
    refused: set[str] = set()
    for call, asked in calls_not_served(400, seed, device):
        before = copy.deepcopy(call.arguments)
        with pytest.raises(NotImplementedError) as refusal:
            call.run(mate)
        named = [feature for feature in asked if re.search(NOT_SERVED[feature], str(refusal.value))]
        assert named, f"{call}\nasks for {asked}, and was refused with: {refusal.value}"
        check_unwritten(call.arguments, before)
        refused.update(named)
    assert refused == set(NOT_SERVED), "what was refused"
