"""NVIDIA's compute-sanitizer over small calls of each kind: `make sanitize-gpu`.

    python tests/python/sanitize_gpu.py [--reports FOLDER] [TOOL ...]

Compiles the kernels, then makes the calls under each tool, all of them by default, side by side. Leaves one report a
tool, and fails where one of them has found something or where a result is wrong. The calls are the same in each run;
MATE_SEED=N draws others. Nothing but the library's kernels runs on the GPU: inputs are made, and results are judged, on
the host.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch
from calls import Call, draw
from judge import bars, check_result
from kernels import Kind
from reference import FP8, evaluate

import mate
from mate._warmup import compile_kernels

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KINDS = (
    Kind(64, 64, torch.bfloat16),
    Kind(64, 64, torch.bfloat16, softcap=True),
    Kind(128, 128, torch.bfloat16),
    Kind(80, 48, torch.float16),
    Kind(256, 256, torch.float16),
    Kind(64, 512, torch.bfloat16, qv=True),
    Kind(512, 512, torch.float16),
    Kind(64, 64, FP8),
    Kind(256, 256, FP8),
    Kind(192, 144, FP8),
    Kind(128, 128, torch.bfloat16, kv_dtype=FP8),
    Kind(64, 512, FP8, qv=True),
)
CALLS_OF_KIND = 8
ROTARY = ("rotary_cos", "rotary_sin", "rotary_interleaved")
SEED = int(os.environ.get("MATE_SEED", "1"))


def calls() -> list[Call]:
    """On the CPU. Every other one runs on one multiprocessor, which then takes all of the tiles, and one on two, which
    may be a cluster.
    """
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 2
    result = []
    for number, kind in enumerate(KINDS):
        seeds = itertools.count(SEED * 1_000_003 + number * 1000)
        drawn = (draw(seed, kinds=[kind]) for seed in seeds)
        with_rows = (call for call in drawn if call.normalised.q.numel() > 0)
        chosen = [several_tiles(kind, causal=False), several_tiles(kind, causal=True)]
        chosen += [decoding(kind, (390, 70)).without_lse(), mixed(kind), decoding(kind, (33, 0) * 20)]
        chosen.append(few_tiles(kind))
        if kind.dtype is FP8 and not kind.qv:
            chosen.append(many_keys(kind))
        chosen += itertools.islice(with_rows, CALLS_OF_KIND - len(chosen))
        for call in chosen[::2]:
            call.arguments["sm_margin"] = 10_000
        chosen[1].arguments["sm_margin"] = multiprocessors - 2
        # On all multiprocessors, each of which then has a part of one sequence alone.
        result += [*chosen, decoding(kind, (390, 70, 7))]
        if kind.qv:
            result += [many_heads(kind, (390, 70)), many_heads(kind, (390, 70) + (20,) * 31)]
    return result


def several_tiles(kind: Kind, causal: bool) -> Call:
    """A call with several tiles of queries for each head, which may be those of clusters, of several blocks of keys."""
    numbers = torch.Generator().manual_seed(SEED)
    shapes = {"q": (1, 370, 4, kind.head_size), "k": (1, 400, 2, kind.head_size), "v": (1, 400, 2, kind.head_size_v)}
    if kind.qv:
        shapes["qv"] = (1, 370, 4, kind.head_size_v)
    types = {"k": kind.key_type, "v": kind.key_type}
    tensors = {
        name: torch.randn(shape, generator=numbers).to(types.get(name, kind.dtype)) for name, shape in shapes.items()
    }
    softcap = 5.0 if kind.softcap else 0.0
    return Call("flash_attn_func", {**tensors, "causal": causal, "softcap": softcap, "return_attn_probs": causal})


def few_tiles(kind: Kind) -> Call:
    """A call whose tiles' keys are shared out in clusters, if its kind has such kernels."""
    numbers = torch.Generator().manual_seed(SEED)
    shapes = {"q": (1, 90, 4, kind.head_size)}
    shapes |= {"k_cache": (1, 1500, 2, kind.head_size), "v_cache": (1, 1500, 2, kind.head_size_v)}
    if kind.qv:
        shapes["qv"] = (1, 90, 4, kind.head_size_v)
    types = {"k_cache": kind.key_type, "v_cache": kind.key_type}
    arguments: dict[str, Any] = {
        name: torch.randn(shape, generator=numbers).to(types.get(name, kind.dtype)) for name, shape in shapes.items()
    }
    arguments["cache_seqlens"] = torch.tensor([1490], dtype=torch.int32)
    softcap = 5.0 if kind.softcap else 0.0
    return Call("flash_attn_with_kvcache", {**arguments, "causal": True, "softcap": softcap})


def many_heads(kind: Kind, lengths: tuple[int, ...]) -> Call:
    """A call whose query heads, which share a key head, are those of two tiles, which a cluster may have together."""
    numbers = torch.Generator().manual_seed(SEED)
    batch = len(lengths)
    shapes = {"q": (batch, 1, 128, kind.head_size), "qv": (batch, 1, 128, kind.head_size_v)}
    shapes |= {"k_cache": (batch, 400, 1, kind.head_size), "v_cache": (batch, 400, 1, kind.head_size_v)}
    types = {"k_cache": kind.key_type, "v_cache": kind.key_type}
    arguments: dict[str, Any] = {
        name: torch.randn(shape, generator=numbers).to(types.get(name, kind.dtype)) for name, shape in shapes.items()
    }
    arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    return Call("flash_attn_with_kvcache", {**arguments, "causal": True, "num_splits": 2})


def many_keys(kind: Kind) -> Call:
    """A call whose sums of e4m3 products are set aside on the way."""
    numbers = torch.Generator().manual_seed(SEED)
    shapes = {"q": (1, 70, 2, kind.head_size), "k": (1, 3000, 1, kind.head_size), "v": (1, 3000, 1, kind.head_size_v)}
    tensors = {name: torch.randn(shape, generator=numbers).to(kind.dtype) for name, shape in shapes.items()}
    return Call("flash_attn_func", {**tensors, "return_attn_probs": True})


def decoding(kind: Kind, lengths: tuple[int, ...]) -> Call:
    """A call that appends to a cache of pages, rotates, and shares out the keys of long sequences."""
    numbers = torch.Generator().manual_seed(SEED)
    sizes = {"k": kind.head_size, "v": kind.head_size_v}
    batch, pages = len(lengths), max(lengths) // 16 + 1
    shapes = {"q": (batch, 2, 4, kind.head_size)}
    if kind.qv:
        shapes["qv"] = (batch, 2, 4, kind.head_size_v)
    shapes |= {name: (batch, 2, 2, size) for name, size in sizes.items()}
    shapes |= {f"{name}_cache": (batch * pages, 16, 2, size) for name, size in sizes.items()}
    types = {"k_cache": kind.key_type, "v_cache": kind.key_type}
    arguments: dict[str, Any] = {
        name: torch.randn(shape, generator=numbers).to(types.get(name, kind.dtype)) for name, shape in shapes.items()
    }
    angles = torch.rand((400, 8), generator=numbers)
    arguments |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": False}
    arguments["page_table"] = torch.randperm(batch * pages, generator=numbers).to(torch.int32).view(batch, pages)
    arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    softcap = 5.0 if kind.softcap else 0.0
    return Call(
        "flash_attn_with_kvcache", {**arguments, "causal": True, "softcap": softcap, "return_softmax_lse": True}
    )


def mixed(kind: Kind) -> Call:
    """A call that reads a prompt and decodes other sequences."""
    call = decoding(kind, (390, 70))
    numbers = torch.Generator().manual_seed(SEED)
    counts = torch.tensor([1, 150, 1, 1, 0, 1], dtype=torch.int32)
    ends = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    arguments = {name: value for name, value in call.arguments.items() if name not in ("k", "v", *ROTARY)}
    for name in ("q", "qv"):
        if name in arguments:
            shape = (int(ends[-1]), *arguments[name].shape[2:])
            arguments[name] = torch.randn(shape, generator=numbers).to(kind.dtype)
    # With room for so many keys that both may be served side by side.
    arguments["page_table"] = torch.randint(50, (len(counts), 50_000), generator=numbers, dtype=torch.int32)
    arguments["cache_seqlens"] = torch.tensor([390, 200, 5, 17, 100, 64], dtype=torch.int32)
    return Call(call.function, {**arguments, "cu_seqlens_q": ends, "max_seqlen_q": 150})


def moved(x: torch.Tensor, device: Any, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """The tensor on another device with all that surrounds it in memory, copied without the help of a kernel."""
    key = x.untyped_storage().data_ptr()
    if key not in storages:
        storages[key] = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).to(device)
    return storages[key].view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def make_calls(device: str) -> None:
    for call in calls():
        storages: dict[int, torch.Tensor] = {}
        arguments = {
            name: moved(x, device, storages) if isinstance(x, torch.Tensor) and x.dim() > 0 else x
            for name, x in call.arguments.items()
        }
        out, lse = Call(call.function, arguments).run(mate)
        lse = None if lse is None else moved(lse, "cpu", {})
        check_result(
            moved(out, "cpu", {}),
            lse,
            evaluate(call.function, call.arguments),
            bars(call, device=device),
        )


def find_sanitizer() -> str:
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders)])
    found = shutil.which("compute-sanitizer", path=places)
    if found is None:
        sys.exit("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
    return found


def run_tool(sanitizer: str, tool: str, reports: Path) -> bool:
    """Makes the calls under a tool, and says whether all is well."""
    report = reports / f"{tool}.txt"
    report.unlink(missing_ok=True)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--log-file", str(report)]
    command += [sys.executable, __file__, "--calls"]
    began = time.monotonic()
    result = subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    lines = report.read_text().splitlines() if report.exists() else ["no report"]
    print(f"{tool}: {lines[-1].strip('= ')} ({time.monotonic() - began:.0f} s; {report})", flush=True)
    if result.returncode != 0:
        print("\n".join([*lines[:40], f"exit status {result.returncode}"]), flush=True)
    return result.returncode == 0


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", default=[], help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--reports", type=Path, default=Path("build/sanitize-gpu"), help="where reports go")
    parser.add_argument("--calls", action="store_true", help="only make the calls, under no tool")
    parser.add_argument("--device", default="cuda", help="where the calls are made")
    options = parser.parse_args(arguments)
    if unknown := set(options.tools) - set(TOOLS):
        parser.error(f"there is no tool {', '.join(sorted(unknown))}")
    if options.calls:
        make_calls(options.device)
        return
    sanitizer = find_sanitizer()
    sources = {name: text for kind in KINDS for name, text in kind.sources.items()}
    compile_kernels(sources)
    options.reports.mkdir(parents=True, exist_ok=True)
    tools = options.tools or TOOLS
    with ThreadPoolExecutor(len(tools)) as pool:  # they keep the host busy, not the GPU
        well = list(pool.map(lambda tool: run_tool(sanitizer, tool, options.reports), tools))
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
