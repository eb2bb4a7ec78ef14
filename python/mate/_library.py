"""The compiled library: its functions take the fields of the calls in :mod:`mate._calls`, in their order."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# PyTorch comes first: the library then shares its OpenMP threads.
try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("MATE takes PyTorch's tensors: install PyTorch first, in the build for your device") from error
import tvm_ffi

# Of the exceptions that the library raises, the one that tvm_ffi does not know by itself.
tvm_ffi.error.register_error("NotImplementedError", NotImplementedError)

_module = tvm_ffi.load_module(Path(__file__).parent / "_lib" / "libmate_python.so")

attention = _module.attention
combine = _module.combine
scheduler_metadata = _module.scheduler_metadata
describe_backends = _module.describe_backends
kernel_sources = _module.kernel_sources
compile_kernel = _module.compile_kernel
version = _module.version

# Where NVIDIA's packages put the compiler of GPU kernels. The library looks there when it first needs one.
_COMPILER_FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib")
_module.set_compiler_folders(
    [os.path.join(entry, folder) for entry in sys.path if os.path.isabs(entry) for folder in _COMPILER_FOLDERS]
)
