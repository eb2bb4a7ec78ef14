"""What the package says about itself."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
