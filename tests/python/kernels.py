"""What the backend of NVIDIA GPUs serves, and which of its kernels a run of the tests uses.

A kernel takes seconds to compile. So the random calls of a run keep to some kinds, new in each run, and the other tests
to fixed ones; the kernels of all these are compiled before the first test, side by side.
"""

import functools
import importlib
import os
import random
from typing import Any, NamedTuple, Optional

import torch
from environment import RUN_SEED
from reference import FP8

LARGEST_HEAD_SIZE = 512
# What is not served yet, and what the error says then. The documentation has the same list.
NOT_SERVED = {
    "float32": "float32 is served on the CPU only",
}


def not_served(call: Any) -> list[str]:
    """What the call asks for that is not served on a GPU."""
    a = call.normalised
    asked = {
        "float32": torch.float32 in (a.q.dtype, a.k.dtype),
    }
    return [feature for feature, is_asked in asked.items() if is_asked and feature in NOT_SERVED]


class Kind(NamedTuple):
    """Calls that share their kernels: MOST_KERNELS_OF_KIND or fewer, for any way to load and share out keys."""

    head_size: int  # of keys, the largest that the kernels serve
    head_size_v: int
    dtype: torch.dtype
    softcap: bool = False
    qv: bool = False
    kv_dtype: Optional[torch.dtype] = None  # where it is not dtype
    out_dtype: Optional[torch.dtype] = None  # where it is not dtype, nor bfloat16 under e4m3

    @property
    def key_type(self) -> torch.dtype:
        return self.kv_dtype or self.dtype

    @property
    def out_type(self) -> torch.dtype:
        return self.out_dtype or (torch.bfloat16 if self.dtype is FP8 else self.dtype)

    @property
    def packs(self) -> bool:
        """Whether flash_attn_qkvpacked_func can ask for it."""
        return self.head_size == self.head_size_v and not self.qv and self.kv_dtype is None

    @property
    def sources(self) -> dict[str, str]:
        library = importlib.import_module("mate")._library
        types = (self.dtype, self.key_type, self.out_type)
        return dict(library.kernel_sources(self.head_size, self.head_size_v, *types, self.softcap, self.qv))


MOST_KERNELS_OF_KIND = 46
STEP = 16  # kernels are made for head sizes that are multiples of it
# Those of the tests that choose their head sizes themselves, and some of all models' sizes.
FIXED = (
    *(Kind(16, 16, dtype, softcap) for dtype in (torch.bfloat16, torch.float16) for softcap in (False, True)),
    *(Kind(16, size, torch.bfloat16) for size in (32, 64)),
    Kind(32, 32, torch.bfloat16, True),
    *(Kind(size, size, dtype) for dtype in (torch.bfloat16, torch.float16) for size in (64, 128, 256)),
    Kind(192, 128, torch.bfloat16),
    Kind(272, 320, torch.bfloat16),
    *(Kind(64, 512, dtype, qv=True) for dtype in (torch.bfloat16, torch.float16)),
    Kind(512, 512, torch.bfloat16),
    Kind(16, 16, torch.bfloat16, softcap=True, qv=True),
    *(Kind(size, size, FP8) for size in (16, 128)),
    Kind(192, 144, FP8),
    *(Kind(size, size, torch.bfloat16, kv_dtype=FP8) for size in (16, 128)),
    Kind(64, 512, torch.bfloat16, qv=True, kv_dtype=FP8),
)
TYPES = (
    (torch.bfloat16, None, None),
    (torch.float16, None, None),
    (FP8, None, None),
    (FP8, None, torch.float16),
    (torch.bfloat16, FP8, None),
    (torch.float16, FP8, None),
)


def draw_new_kind(dice: random.Random) -> Kind:
    size = STEP * dice.randint(1, LARGEST_HEAD_SIZE // STEP)
    size_v = size if dice.random() < 0.5 else STEP * dice.randint(1, LARGEST_HEAD_SIZE // STEP)
    dtype, kv_dtype, out_dtype = dice.choice(TYPES)
    return Kind(size, size_v, dtype, dice.random() < 0.3, dice.random() < 0.2, kv_dtype, out_dtype)


def draw_kinds(seed: Any, most_kernels: int) -> list[Kind]:
    """Fixed kinds, one of each pair of types among them, and about as many new ones, with no more kernels than that."""
    dice = random.Random(f"{seed} kinds")
    of_types: dict[tuple[torch.dtype, torch.dtype], list[Kind]] = {}
    for kind in FIXED:
        if kind.packs or kind.kv_dtype is not None:
            of_types.setdefault((kind.dtype, kind.key_type), []).append(kind)
    kinds = [dice.choice(alike) for alike in of_types.values()]
    names = {name for kind in kinds for name in kind.sources}
    while True:
        kind = dice.choice(FIXED) if dice.random() < 0.5 else draw_new_kind(dice)
        names |= set(kind.sources)
        if len(names) > most_kernels:
            return kinds
        if kind not in kinds:
            kinds.append(kind)


@functools.cache
def kinds_of_run() -> list[Kind]:
    """Those of the random calls."""
    return draw_kinds(RUN_SEED, int(os.environ.get("MATE_TEST_KERNELS", "200")))


def compile_kernels() -> None:
    """Compiles what the calls of this run need, unless it is compiled already."""
    warmup = importlib.import_module("mate._warmup")
    warmup.compile_kernels({name: text for kind in (*FIXED, *kinds_of_run()) for name, text in kind.sources.items()})
