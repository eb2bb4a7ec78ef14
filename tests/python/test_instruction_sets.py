"""Every instruction set that this processor has, not just the best: MATE_CPU_ISA names one, once for a process."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from judge import BARS, check_result
from reference import evaluate

HERE = Path(__file__).resolve().parent
# The best first, as the error that names them all lists those of this processor.
KNOWN = ("avx512_bf16", "avx512", "avx2", "portable")
# Promises of bits, in few enough calls for a run in each instruction set.
PROMISES = (
    "test_batch_invariant.py::test_threads[2]",
    "test_invariance.py::test_deterministic_changes_nothing",
    "test_nonfinite.py",
)

pytestmark = pytest.mark.skipif(
    os.environ.get("MATE_TEST_DEVICE", "cpu") != "cpu", reason="instruction sets are those of the CPU"
)


def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Python, in a process of its own that uses the instruction set `name`."""
    environment = {**os.environ, **variables, "MATE_CPU_ISA": name}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@cache
def available() -> tuple[str, ...]:
    """The instruction sets of this processor."""
    refused = run("none", "-c", "import mate, torch; x = torch.ones(1, 1, 1, 1); mate.flash_attn_func(x, x, x)")
    found = re.search(r"there is no instruction set none; it has (.*)", refused.stderr)
    assert found, refused.stderr
    return tuple(found[1].split(", "))


def in_use(mate: ModuleType) -> str:
    return mate.info()["backends"]["cpu"].split(",")[0]


@pytest.fixture(params=KNOWN)
def other(request: pytest.FixtureRequest, mate: ModuleType) -> str:
    """An instruction set that this processor has, other than the one that all the other tests use."""
    if request.param not in available():
        pytest.skip("this processor lacks it")
    if request.param == in_use(mate):
        pytest.skip("it is the one in use")
    return request.param


def run_tests(name: str, seed: int, *tests: str, **variables: str) -> None:
    options = ("-q", "--no-header", "-p", "no:cacheprovider")
    paths = [str(HERE / test) for test in tests]
    done = run(name, "-m", "pytest", *options, *paths, MATE_SEED=str(seed), **variables)
    if done.returncode != 0:
        pytest.fail(f"MATE_CPU_ISA={name} MATE_SEED={seed}\n{done.stdout}{done.stderr}", pytrace=False)


def test_portable_kernels_are_always_there(mate: ModuleType) -> None:
    assert available()[-1] == "portable"
    assert in_use(mate) in available()
    assert in_use(mate) == (os.environ.get("MATE_CPU_ISA") or available()[0])


@pytest.mark.parametrize("name", KNOWN)
def test_description_names_the_one_in_use(name: str) -> None:
    if name not in available():
        pytest.skip("this processor lacks it")
    done = run(name, "-m", "mate", "info")
    assert done.returncode == 0, done.stderr
    assert f"backends.cpu: {name}," in done.stdout


@pytest.mark.parametrize("name", ["sse9", *KNOWN])
def test_name_that_is_not_there(name: str) -> None:
    if name in available():
        pytest.skip("this processor has it")
    program = """
import mate, torch
x = torch.ones(1, 1, 1, 1)
for use in (mate.info, lambda: mate.flash_attn_func(x, x, x)) * 2:
    try:
        use()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
    done = run(name, "-c", program)
    assert done.returncode == 0, done.stderr
    why = "this processor lacks" if name in KNOWN else "there is no instruction set"
    message = f"ValueError: MATE_CPU_ISA: {why} {name}; it has {', '.join(available())}"
    assert done.stdout.splitlines() == [message] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_call_in_all(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (2, 70, 4, 72), "k": (2, 300, 2, 72), "v": (2, 300, 2, 40)}
    call = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    call = {**call, "causal": True, "return_attn_probs": True}
    torch.save(call, tmp_path / "call")
    expected = evaluate("flash_attn_func", call)
    program = """
import sys
import mate, torch
folder, name = sys.argv[1:]
torch.save(mate.flash_attn_func(**torch.load(f"{folder}/call")), f"{folder}/{name}")
"""
    for name in available():
        done = run(name, "-c", program, str(tmp_path), name)
        assert done.returncode == 0, done.stderr
        out, lse = torch.load(tmp_path / name)
        check_result(out, lse, expected, BARS[dtype])


def test_random_calls(other: str, seed: int) -> None:
    run_tests(other, seed, "test_random_calls.py", MATE_RANDOM_CALLS="400")


def test_promises_of_bits(other: str, seed: int) -> None:
    run_tests(other, seed, *PROMISES)
