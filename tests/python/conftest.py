"""Seeds, the device and the library under test, for all the tests in Python."""

import importlib
import os
import random
from types import ModuleType

import pytest
import torch
from environment import DEVICE, RUN_SEED
from kernels import NOT_SERVED, compile_kernels


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*features): what the test needs that some backends may not serve: names of kernels.NOT_SERVED"
    )
    if DEVICE != "cpu" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"MATE_TEST_DEVICE={DEVICE} needs an NVIDIA GPU and PyTorch's build for CUDA; PyTorch {torch.__version__} "
            "sees no GPU here"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"seed of the run: {RUN_SEED} (MATE_SEED={RUN_SEED} repeats it)"]
    try:
        import mate
    except ImportError as reason:
        lines.append(f"mate cannot be imported: {reason}")
    else:
        lines.append(f"mate {mate.__version__} from {os.path.dirname(mate.__file__)}: {mate.info()}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU only the tests that touch it run. Those that need what is not served there must be refused."""
    if DEVICE == "cpu":
        return
    others = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        needed = [name for marker in item.iter_markers("needs") for name in marker.args if name in NOT_SERVED]
        if needed:
            reason = f"not served on an NVIDIA GPU yet: {', '.join(needed)}"
            item.add_marker(pytest.mark.xfail(raises=NotImplementedError, strict=True, reason=reason))


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of the run, before its first test."""
    if DEVICE != "cpu":
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            compile_kernels()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for one test, new in each run."""
    return random.Random(f"{RUN_SEED} {request.node.nodeid}").randrange(2**31)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of the tests live."""
    return DEVICE


@pytest.fixture(scope="session")
def mate() -> ModuleType:
    """The library under test."""
    return importlib.import_module("mate")
