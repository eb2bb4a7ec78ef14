"""Seeds, the device and the library under test, for all the tests in Python."""

import importlib
import os
import random
from types import ModuleType

import pytest

# The seed of the run: every test that draws numbers starts from it. MATE_SEED=N repeats a run.
RUN_SEED = int(os.environ.get("MATE_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"seed of the run: {RUN_SEED} (MATE_SEED={RUN_SEED} repeats it)"]
    try:
        import mate
    except ImportError as reason:
        lines.append(f"mate cannot be imported: {reason}")
    else:
        lines.append(f"mate {mate.__version__} from {os.path.dirname(mate.__file__)}: {mate.info()}")
    return lines


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for one test, new in each run."""
    return random.Random(f"{RUN_SEED} {request.node.nodeid}").randrange(2**31)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of the tests live."""
    return os.environ.get("MATE_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def mate() -> ModuleType:
    """The library under test."""
    return importlib.import_module("mate")
