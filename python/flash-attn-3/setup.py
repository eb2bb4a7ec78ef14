"""The version is MATE's own, and exactly that MATE is required; the rest of the metadata is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def mate_version() -> str:
    """MATE's version: from its header in a checkout, from the metadata in a source distribution."""
    here = Path(__file__).resolve().parent
    sources = {
        here.parents[1] / "include" / "mate" / "version.h": r'"(\d+\.\d+\.\d+)"',
        here / "PKG-INFO": r"(?m)^Version: (\S+)$",
    }
    for path, pattern in sources.items():
        if path.is_file() and (match := re.search(pattern, path.read_text())):
            return match.group(1)
    raise RuntimeError(f"no version found in {' or '.join(map(str, sources))}")


version = mate_version()
setup(version=version, install_requires=[f"mate-attention=={version}"])
