"""What the package says about itself."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HEADER = Path(__file__).resolve().parents[2] / "include" / "mate" / "version.h"


def test_version_is_that_of_the_library(mate: ModuleType) -> None:
    assert f'"{mate.__version__}"' in HEADER.read_text()
    assert mate.info()["version"] == mate.__version__


def test_info_names_the_backends(mate: ModuleType) -> None:
    info = mate.info()
    assert "cpu" in info["backends"]
    assert info["torch"] == torch.__version__


def test_info_on_the_command_line(mate: ModuleType) -> None:
    command = [sys.executable, "-m", "mate", "info"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert mate.__version__ in printed
    assert "cpu" in printed


def test_every_name_it_exports_is_there(mate: ModuleType) -> None:
    for name in mate.__all__:
        assert getattr(mate, name) is not None


def test_one_small_wheel_serves_every_python() -> None:
    try:
        distribution = importlib.metadata.distribution("mate-attention")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mate runs from a checkout")
    assert "Tag: py3-none-" in (distribution.read_text("WHEEL") or "")
    sizes = [Path(str(file.locate())).stat().st_size for file in distribution.files or ()]
    assert 0 < sum(sizes) < 10e6
