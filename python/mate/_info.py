"""What this machine has."""

from __future__ import annotations

import platform
from typing import Any

import torch

from mate import _library


def info() -> dict[str, Any]:
    """What MATE and this machine are, for bug reports and for programs that choose by it.

    Returns:
        ``version`` of MATE, ``python``, ``torch``, ``platform``, and ``backends``, a line for each: "cpu" has its
        instruction set and number of threads, "cuda" the GPUs and the compiler, or what is missing.
    """
    backends = dict(line.split(": ", 1) for line in _library.describe_backends().splitlines())
    return {
        "version": _library.version(),
        "backends": backends,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
