"""Compiling GPU kernels ahead of the calls that need them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from mate import _library
from mate._arguments import boolean, dtype, integer


def warmup(
    head_dim: int,
    head_dim_v: int | None = None,
    dtypes: torch.dtype | Sequence[torch.dtype] = torch.bfloat16,
    *,
    kv_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    softcap: bool = False,
    qv: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> int:
    """Compiles the GPU kernels that a model's calls need, so that none of them waits for the compiler.

    Without it the first call of each kind compiles its kernel, which takes seconds. Compiled kernels serve all later
    processes of this user: they are kept in MATE_CACHE_DIR, else $XDG_CACHE_HOME/mate, else ~/.cache/mate. No GPU is
    needed.

    Args:
        head_dim: the head size of queries and keys.
        head_dim_v: that of values; ``head_dim`` by default.
        dtypes: the type of queries, or several: torch.bfloat16, torch.float16 and torch.float8_e4m3fn.
        kv_dtype: the type of keys and values, where it is not that of queries: torch.float8_e4m3fn.
        out_dtype: the type of results, where it is neither that of queries nor, for torch.float8_e4m3fn,
            torch.bfloat16: torch.float16.
        softcap: for calls with a softcap, else for calls without.
        qv: for calls with ``qv`` (multi-head latent attention), else for calls without.
        jobs: how many kernels are compiled at once; by default one on each processor.
        progress: show a progress bar on stderr.

    Returns:
        How many kernels were compiled. The others were in the folder already.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which.
        RuntimeError: what the compiler reports; there is none.
    """
    size = integer("head_dim", head_dim)
    size_v = size if head_dim_v is None else integer("head_dim_v", head_dim_v)
    types = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    if jobs is not None and integer("jobs", jobs) < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    sources = {
        name: text
        for query_type in types
        for name, text in _library.kernel_sources(
            size,
            size_v,
            dtype("dtypes", query_type),
            dtype("kv_dtype", kv_dtype or query_type),
            dtype("out_dtype", out_dtype or _out_dtype(query_type)),
            boolean("softcap", softcap),
            boolean("qv", qv),
        )
    }
    return compile_kernels(sources, jobs, progress)


def _out_dtype(query_type: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if query_type is torch.float8_e4m3fn else query_type


def compile_kernels(sources: dict[str, str], jobs: int | None = None, progress: bool = True) -> int:
    """Compiles the kernels of these names and sources, many at once. Returns how many were not in the folder before."""
    pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)))
    compiled = 0
    try:
        kernels = [pool.submit(_library.compile_kernel, name, text) for name, text in sources.items()]
        for done, kernel in enumerate(as_completed(kernels), 1):
            compiled += kernel.result()
            if progress:
                _show_progress(done, len(kernels))
    finally:
        pool.shutdown(cancel_futures=True)
    return compiled


def _show_progress(done: int, total: int) -> None:
    bar = "#" * (40 * done // total)
    end = "\n" if done == total else ""
    print(f"\rCompiling kernels [{bar:<40}] {done}/{total}", end=end, file=sys.stderr, flush=True)
