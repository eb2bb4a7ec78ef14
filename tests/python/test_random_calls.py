"""Random calls, everything that the contract permits together, against the reference.

MATE_RANDOM_CALLS=N makes N of them, MATE_CALL_SEED=N the one of a seed.
"""

import os
from types import ModuleType

import pytest
from calls import draw
from judge import check

COUNT = int(os.environ.get("MATE_RANDOM_CALLS", "2000"))
CHUNK = 50  # calls in one test
MOST_REPORTED = 5


@pytest.mark.skipif("MATE_CALL_SEED" in os.environ, reason="one call was asked for")
@pytest.mark.parametrize("chunk", range(-(-COUNT // CHUNK)))
def test_random_calls(mate: ModuleType, device: str, seed: int, chunk: int) -> None:
    failures = []
    for i in range(min(CHUNK, COUNT - chunk * CHUNK)):
        call = draw(seed + i, device)
        text = str(call)
        try:
            check(call, mate)
        except Exception as reason:
            again = f"MATE_CALL_SEED={call.seed} pytest tests/python/test_random_calls.py"
            failures.append(f"{text}\n{type(reason).__name__}: {reason}\nrun it again: {again}\n")
    if failures:
        pytest.fail(
            f"{len(failures)} of {CHUNK} calls failed\n\n" + "\n".join(failures[:MOST_REPORTED]),
            pytrace=False,
        )


@pytest.mark.skipif("MATE_CALL_SEED" not in os.environ, reason="no call was asked for")
def test_one_call(mate: ModuleType, device: str) -> None:
    check(draw(int(os.environ["MATE_CALL_SEED"]), device), mate)
