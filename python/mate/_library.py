"""The compiled library: its functions take the fields of the calls in :mod:`mate._calls`, in their order."""

from __future__ import annotations

from pathlib import Path

# PyTorch comes first: the library then shares its OpenMP threads.
import torch  # noqa: F401
import tvm_ffi

# Of the exceptions that the library raises, the one that tvm_ffi does not know by itself.
tvm_ffi.error.register_error("NotImplementedError", NotImplementedError)

_module = tvm_ffi.load_module(Path(__file__).parent / "_lib" / "libmate_python.so")

attention = _module.attention
combine = _module.combine
scheduler_metadata = _module.scheduler_metadata
scheduler_metadata_size = _module.scheduler_metadata_size
describe_backends = _module.describe_backends
version = _module.version
