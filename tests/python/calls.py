"""Draws random calls: every mode, type, mask and option that the contract permits, together.

A call follows from its seed, an integer. Whatever must not reach its result is poisoned: NaN (garbage in
integer tensors) past the ends of sequences, before the left padding, in pages and rows that no sequence
reads, in keys that no row sees, between ragged sequences, in the gaps of strided tensors, in arguments that a
type or an option ignores, and in `out`.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
import torch
from kernels import STEP, Kind, kinds_of_run
from reference import FP8, Arguments, normalise, raw, sequences, visible

FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "flash_attn_qkvpacked_func",
)
# Type of q and type of k and v.
TYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (FP8, FP8),
    (torch.bfloat16, FP8),
    (torch.float16, FP8),
)
SMALL_HEAD_SIZES = (
    1,
    2,
    3,
    5,
    7,
    8,
    12,
    16,
    17,
    24,
    31,
    32,
    33,
    40,
    48,
    64,
    65,
    72,
    80,
    96,
    100,
    112,
    127,
    128,
)
LARGE_HEAD_SIZES = (136, 160, 192, 200, 255, 256, 257, 320, 384, 500, 511, 512)
PAGE_SIZES = (1, 2, 3, 7, 16, 16, 64, 64, 100, 128, 256)
KEY_BLOCK = 64  # keys in what the tests count as one block of keys
INT32_MAX = 2**31 - 1


@dataclass
class Call:
    """One call: a function, its keyword arguments, and whether it is to run with scheduler metadata."""

    function: str
    arguments: dict[str, Any]
    seed: int = 0
    with_metadata: bool = False

    @property
    def normalised(self) -> Arguments:
        return normalise(self.function, self.arguments)

    @property
    def returns_lse(self) -> bool:
        return self.normalised.return_attn_probs

    def without_lse(self) -> "Call":
        names = ("return_attn_probs", "return_softmax_lse")
        return replace(self, arguments={name: value for name, value in self.arguments.items() if name not in names})

    def run(self, library: Any, **changed: Any) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Makes the call, with fresh scheduler metadata if it is to have some: out, and lse if asked for."""
        arguments = {**self.arguments, **changed}
        if self.with_metadata and "scheduler_metadata" not in changed:
            arguments["scheduler_metadata"] = library.get_scheduler_metadata(**metadata_arguments(self))
        result = getattr(library, self.function)(**arguments)
        if not self.returns_lse:
            assert isinstance(result, torch.Tensor)
            return result, None
        if self.function == "flash_attn_with_kvcache":
            out, lse, third, fourth = result
            assert third is None
            assert fourth is None
        else:
            out, lse = result
        return out, lse

    def __str__(self) -> str:
        lines = [f"{self.function}(  # seed {self.seed}"]
        for name, value in self.arguments.items():
            lines.append(f"    {name}={describe(value)},")
        if self.with_metadata:
            lines.append("    scheduler_metadata=get_scheduler_metadata(...),")
        return "\n".join([*lines, ")"])


def describe(value: Any) -> str:
    """A value of an argument in one line."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.dim() == 0 or (value.dtype == torch.int32 and value.numel() <= 16):
        return f"{str(value.dtype).removeprefix('torch.')} {value.tolist()}"
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind} {tuple(value.shape)} strides {value.stride()} offset {value.storage_offset()}"


def metadata_arguments(call: Call) -> dict[str, Any]:
    """The arguments with which get_scheduler_metadata plans the call."""
    a = call.normalised
    device = a.q.device
    lengths = a.cache_seqlens
    if a.cu_seqlens_k is None and not isinstance(lengths, torch.Tensor):
        lengths = torch.full((a.batch,), a.capacity if lengths is None else int(lengths), dtype=torch.int32)
        lengths = lengths.to(device)
    longest_new = 0
    if a.k_new is not None:
        longest_new = a.k_new.shape[1]
        if a.cu_seqlens_k_new is not None:
            longest_new = int(a.cu_seqlens_k_new.diff().max()) if a.batch else 0
    return {
        "batch_size": a.batch,
        "max_seqlen_q": a.q.shape[1] if a.cu_seqlens_q is None else a.max_seqlen_q,
        "max_seqlen_k": a.capacity if a.cu_seqlens_k is None else a.max_seqlen_k,
        "num_heads_q": a.q.shape[-2],
        "num_heads_kv": a.k.shape[-2],
        "headdim": a.q.shape[-1],
        "cache_seqlens": lengths,
        "qkv_dtype": a.q.dtype,
        "headdim_v": a.v.shape[-1],
        "cu_seqlens_q": a.cu_seqlens_q,
        "cu_seqlens_k_new": a.cu_seqlens_k_new if a.k_new is not None else None,
        "cache_leftpad": a.cache_leftpad,
        "page_size": None if a.page_table is None else a.k.shape[1],
        "max_seqlen_k_new": longest_new,
        "causal": a.causal,
        "window_size": a.window_size,
        "attention_chunk": a.attention_chunk,
        "has_softcap": a.softcap > 0,
        "num_splits": a.num_splits if "num_splits" in call.arguments else default_num_splits(call.function),
        "pack_gqa": a.pack_gqa,
        "sm_margin": a.sm_margin,
        "seqused_q": a.seqused_q,
        "cu_seqlens_k": a.cu_seqlens_k,
        "has_qv": a.qv is not None,
        "cp_world_size": a.cp_world_size,
        "cp_rank": a.cp_rank,
        "cp_tot_seqused_k": a.cp_tot_seqused_k,
        "batch_invariant": a.batch_invariant,
        "kv_dtype": a.k.dtype,
    }


def default_num_splits(function: str) -> int:
    return 0 if function == "flash_attn_with_kvcache" else 1


def key_blocks_spanned(call: Call) -> int:
    """The most blocks of keys that one sequence of the call attends to."""
    a = call.normalised
    most = 0
    for s in sequences(a):
        seen = visible(s.sq, s.sk, **a.mask, total=s.total).any(0).nonzero()
        most = max(most, len(torch.unique(seen // KEY_BLOCK)))
    return most


def draw(seed: int, device: Any = "cpu", functions: tuple[str, ...] = FUNCTIONS, **forced: Any) -> Call:
    """The call of a seed, to one of `functions`. `forced` fixes some choices: types (a list of pairs like
    TYPES), append, rotary, paged, ragged_q (bools), kinds (a list of kernels.Kind, for what a GPU serves; None for
    everything). On a GPU the kinds are those of the run."""
    return _Drawer(seed, device, functions, forced).draw()


def draw_some(count: int, seed: int, where: Callable[[Call], bool] = lambda call: True, **how: Any) -> Iterator[Call]:
    """`count` calls for which `where` holds, from a seed."""
    tried = 0
    while count > 0:
        call = draw(seed * 1_000_003 + tried, **how)
        tried += 1
        if where(call):
            count -= 1
            yield call
        assert tried < 10_000, "nearly no call is like that"


class _Drawer:
    def __init__(self, seed: int, device: Any, functions: tuple[str, ...], forced: dict) -> None:
        self.seed = seed
        self.device = torch.device(device)
        self.functions = functions
        self.forced = forced
        self.dice = random.Random(seed)
        self.numbers = torch.Generator(self.device).manual_seed(seed)
        on_cpu = self.device.type == "cpu"
        self.kinds: Optional[list[Kind]] = forced["kinds"] if "kinds" in forced else None if on_cpu else kinds_of_run()
        if self.kinds is not None and not any(kind.packs for kind in self.kinds):
            self.functions = tuple(name for name in functions if name != "flash_attn_qkvpacked_func")
        # What a call may cost: its products, the blocks of keys of a wide call, and its query rows.
        self.most_work, self.most_blocks, self.most_rows = (1e7, 9, 700) if on_cpu else (3e8, 16, 1000)
        # A GPU has other kernels for calls that ask for nothing rare, as most do: see is_plain in forward_arguments.h.
        self.plain = self.kinds is not None and self.chance(0.4)
        # Rows that are all aligned to 16 bytes take another way to a GPU's kernels.
        self.unit = 8 if self.kinds is not None and (self.plain or self.chance(0.4)) else 1
        self.arguments: dict[str, Any] = {}

    # What to draw from.

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def rarely(self, probability: float) -> bool:
        """Never in plain calls."""
        return not self.plain and self.chance(probability)

    def choose(self, name: str, probability: float) -> bool:
        """A choice that the caller of `draw` may have fixed."""
        return self.forced.get(name, self.chance(probability))

    def integer(self, value: int) -> Any:
        """An integer argument: an int, or something else with __index__."""
        kind = self.dice.randrange(8)
        if kind == 0:
            return torch.tensor(value)
        return np.int64(value) if kind == 1 else value

    def storage(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        """A poisoned tensor that starts `offset` elements into its storage."""
        numbers = offset + int(np.prod(shape))
        if dtype == torch.int32:
            options = {"generator": self.numbers, "device": self.device}
            flat = torch.randint(-(2**31), 2**31, (numbers,), dtype=torch.int32, **options)
        elif dtype == FP8:
            flat = torch.full((numbers,), 0x7F, dtype=torch.uint8, device=self.device).view(FP8)
        else:
            flat = torch.full((numbers,), torch.nan, dtype=dtype, device=self.device)
        return flat[offset:].view(shape)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, copied: bool = False) -> torch.Tensor:
        """A poisoned tensor in a random layout: any order of the leading dimensions, with gaps. Where the
        library may copy it, its last dimension need not be contiguous."""
        *leading, last = shape
        order = list(range(len(leading)))
        if self.chance(0.3):
            self.dice.shuffle(order)
        gaps = [self.dice.choice((0, 0, 1, 3)) for _ in shape] if self.chance(0.4) else [0] * len(shape)
        step = 2 if copied and self.chance(0.04) else 1
        row = -(-last * step // self.unit) * self.unit + gaps[-1] * self.unit
        padded = [leading[dim] + gaps[dim] for dim in order] + [row]
        whole = self.storage(tuple(padded), dtype, self.dice.choice((0, 0, 1, 3, 8)) * self.unit)
        for position, dim in enumerate(order):
            start = self.dice.randint(0, gaps[dim])
            whole = whole.narrow(position, start, leading[dim])
        whole = whole[..., : last * step : step]
        return whole.permute([order.index(dim) for dim in range(len(leading))] + [len(leading)])

    def fill(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.randn(x.shape, generator=self.numbers, device=self.device)
        return x.copy_((values.clamp(-448, 448) if x.dtype == FP8 else values).to(x.dtype))

    def values(self, shape: tuple[int, ...], dtype: torch.dtype, copied: bool = False) -> torch.Tensor:
        return self.fill(self.allocate(shape, dtype, copied))

    def indices(self, values: list) -> torch.Tensor:
        """An int32 tensor argument."""
        source = torch.tensor(values, dtype=torch.int32)
        return self.allocate(tuple(source.shape), torch.int32).copy_(source)

    # One call.

    def draw(self) -> Call:
        weights = {"flash_attn_func": 3, "flash_attn_varlen_func": 8, "flash_attn_with_kvcache": 10}
        self.function = self.dice.choices(self.functions, [weights.get(name, 2) for name in self.functions])[0]
        self.with_metadata = False
        self.draw_sizes()
        if self.function == "flash_attn_func":
            self.draw_queries(ragged=False, padded=False)
            self.draw_keys(ragged=False, padded=False, paged=False)
        elif self.function == "flash_attn_varlen_func":
            self.draw_queries(ragged=self.choose("ragged_q", 0.7), padded=self.rarely(0.3))
            kind = "paged" if self.choose("paged", 0.4) else self.dice.choice(("ragged", "ragged", "normal"))
            self.draw_keys(ragged=kind == "ragged", padded=self.chance(0.5), paged=kind == "paged")
        elif self.function == "flash_attn_with_kvcache":
            self.draw_queries(ragged=self.choose("ragged_q", 0.4), padded=self.rarely(0.2))
            self.draw_cache()
        else:
            self.draw_packed()
        self.draw_mask()
        self.draw_options()
        call = Call(self.function, self.arguments, self.seed, self.with_metadata)
        self.poison(call.normalised)
        return call

    def draw_sizes(self) -> None:
        packed = self.function == "flash_attn_qkvpacked_func"
        types = self.forced.get("types", TYPES)
        self.kind: Optional[Kind] = None
        if self.kinds is not None:
            kinds = [kind for kind in self.kinds if (kind.dtype, kind.key_type) in types]
            if packed:
                kinds = [kind for kind in kinds if kind.packs]
            self.kind = self.dice.choice(kinds)
            types = [(self.kind.dtype, self.kind.key_type)]
        self.dtype, self.dtype_k = self.dice.choice([pair for pair in types if not packed or pair[0] == pair[1]])
        self.wide = not packed and self.chance(0.7)  # spans many blocks of keys and several splits
        self.huge = self.chance(0.005)
        self.batch = 0 if self.chance(0.02) else self.dice.choice((1, 1, 2, 3) if self.wide else (1, 2, 3, 4, 5, 9))
        self.heads_k = self.dice.choice((1, 1, 2, 3, 4))
        self.heads = self.heads_k * self.dice.choice((1, 1, 2, 3, 4, 5, 8, 16))
        if self.heads > 16 and not self.huge:
            self.heads = self.heads_k * self.dice.choice((1, 2, 3))

        self.d = self.head_size(self.kind and self.kind.head_size)
        self.dv = self.head_size(self.kind and self.kind.head_size_v)
        if packed or (self.chance(0.5) and (self.kind is None or self.kind.head_size == self.kind.head_size_v)):
            self.dv = self.d
        # Keys of each sequence, then as many queries as keep the call cheap.
        self.lengths_k = [self.key_length() for _ in range(self.batch)]
        if self.wide and self.batch:
            self.lengths_k[0] = self.dice.randint(4 * KEY_BLOCK, self.most_blocks * KEY_BLOCK)
        work = max(1, sum(self.lengths_k)) * self.heads * (self.d + self.dv)
        self.most_queries = int(min(self.most_rows, max(1, (3e8 if self.huge else self.most_work) / work)))

    def head_size(self, of_kernel: Optional[int]) -> int:
        """One of those that a kernel serves, or any."""
        if of_kernel is None:
            return self.dice.choice(LARGE_HEAD_SIZES if self.chance(0.12) else SMALL_HEAD_SIZES)
        fewer = self.dice.choice((0, 0, 0, STEP // 2, self.dice.randrange(STEP)))
        return of_kernel - (fewer // self.unit * self.unit if self.plain else fewer)

    def key_length(self) -> int:
        if self.wide:
            many = self.dice.randint(4 * KEY_BLOCK, self.most_blocks * KEY_BLOCK)
            return self.dice.choice((0, 1, self.dice.randint(2, 130), many))
        if self.huge:
            return self.dice.randint(500, 2500)
        return self.dice.choice((0, 1, self.dice.randint(1, 20), self.dice.randint(1, 70), self.dice.randint(1, 140)))

    def query_length(self) -> int:
        most = self.dice.randint(1, self.most_rows)
        length = self.dice.choice((0, 1, 1, self.dice.randint(1, 8), self.dice.randint(1, 40), most))
        return min(length, self.most_queries)

    def cumulative(self, lengths: list[int], gap: bool) -> tuple[torch.Tensor, int]:
        """cu_seqlens of the lengths, and how many rows the tensor has."""
        before, behind = (self.dice.choice((0, 0, 1, 5)) for _ in range(2)) if gap else (0, 0)
        offsets = [before]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        return self.indices(offsets), offsets[-1] + behind

    def draw_queries(self, ragged: bool, padded: bool) -> None:
        lengths = [self.query_length() for _ in range(self.batch)]
        if self.wide and lengths:
            lengths[0] = max(1, lengths[0])
        if not ragged:
            lengths = [max(lengths, default=3)] * self.batch
        used = [self.dice.randint(0, length) if self.chance(0.7) else length for length in lengths]
        self.longest_q = max(lengths, default=3)
        bound = self.longest_q + self.dice.choice((0, 0, 1, 17, 1000))
        if ragged:
            cumulative, total = self.cumulative(lengths, gap=self.chance(0.5))
            self.rows: tuple[int, ...] = (total,)
            self.arguments["cu_seqlens_q"] = cumulative
            self.arguments["max_seqlen_q"] = self.integer(bound)
        else:
            self.rows = (self.batch, self.longest_q)
            if self.function == "flash_attn_varlen_func":
                self.arguments["cu_seqlens_q"] = None
                self.arguments["max_seqlen_q"] = None if self.chance(0.5) else self.integer(bound)
            elif self.function == "flash_attn_with_kvcache" and self.chance(0.3):
                self.arguments["max_seqlen_q"] = self.integer(bound)
        if padded:
            self.arguments["seqused_q"] = self.indices(used)
        self.lengths_q = used if padded else lengths
        self.arguments["q"] = self.values((*self.rows, self.heads, self.d), self.dtype, copied=True)
        if self.chance(0.15) if self.kind is None else self.kind.qv:
            self.arguments["qv"] = self.values((*self.rows, self.heads, self.dv), self.dtype, copied=True)

    def keys_and_values(self, shape: tuple[int, ...], names: tuple[str, str], copied: bool) -> None:
        """k and v, at times as two views of one tensor."""
        leading = (*shape, self.heads_k)
        if self.d == self.dv and self.chance(0.25):
            at = self.dice.randint(0, len(shape))
            both = self.values((*leading[:at], 2, *leading[at:], self.d), self.dtype_k)
            self.arguments[names[0]], self.arguments[names[1]] = both.unbind(at)
            return
        self.arguments[names[0]] = self.values((*leading, self.d), self.dtype_k, copied)
        self.arguments[names[1]] = self.values((*leading, self.dv), self.dtype_k, copied)

    def draw_keys(self, ragged: bool, padded: bool, paged: bool) -> None:
        """Keys of flash_attn_func and flash_attn_varlen_func."""
        varlen = self.function == "flash_attn_varlen_func"
        lengths = self.lengths_k
        capacity = max(lengths, default=5)
        if ragged:
            held = lengths if not padded else [length + self.dice.choice((0, 0, 1, 9, 60)) for length in lengths]
            cumulative, total = self.cumulative(held, gap=self.chance(0.5))
            self.arguments["cu_seqlens_k"] = cumulative
            self.arguments["max_seqlen_k"] = self.integer(max(held, default=0) + self.dice.choice((0, 0, 1, 1000)))
            self.keys_and_values((total,), ("k", "v"), copied=True)
        elif paged:
            self.draw_pages(lengths if padded else None, [0] * self.batch, capacity, appended=[0] * self.batch)
        else:
            if padded:
                capacity += self.dice.choice((0, 0, 1, 30))
            self.keys_and_values((self.batch, capacity), ("k", "v"), copied=True)
        if not (padded or ragged):
            lengths = [self.capacity if paged else capacity] * self.batch
        self.lengths_k = lengths
        if varlen:
            if padded:
                self.arguments["seqused_k"] = self.indices(lengths)
            if not ragged:
                self.arguments["cu_seqlens_k"] = None
                longest = max(lengths, default=0)
                self.arguments["max_seqlen_k"] = self.dice.choice((None, self.integer(longest + 3), longest))

    def draw_pages(self, held: Optional[list[int]], leftpad: list[int], capacity: int, appended: list[int]) -> None:
        """A page table and the pages that it names. Where `held` is None the sequences fill their pages."""
        names = ("k_cache", "v_cache") if self.function == "flash_attn_with_kvcache" else ("k", "v")
        page_size = self.dice.choice(PAGE_SIZES)
        if self.batch > 3 and not self.wide:
            page_size = min(page_size, 64)
        columns = -(-capacity // page_size) + self.dice.choice((0, 0, 1, 2))
        if held is None:
            columns = min(columns, max(1, 600 // page_size))
        self.capacity = columns * page_size
        row_of = list(range(self.batch))
        count = self.batch
        if names[0] == "k_cache" and self.rarely(0.3):
            row_of, count = self.draw_rows(shared=not any(appended))
        # The pages of each row of the table that some sequence reads or writes.
        needed: list[set[int]] = [set() for _ in range(count)]
        for b, row in enumerate(row_of):
            end = self.capacity if held is None else held[b] + appended[b]
            if end > leftpad[b]:
                needed[row] |= set(range(leftpad[b] // page_size, (end - 1) // page_size + 1))
        # Pages that are full before the call may be shared by all sequences.
        common = 0
        if self.batch and self.chance(0.2):
            common = min(self.capacity if held is None else length for length in held or [0]) // page_size
        total = common + sum(len(columns_needed) for columns_needed in needed)
        num_pages = total + self.dice.choice((0, 1, 3))
        pool = list(range(num_pages))
        self.dice.shuffle(pool)
        shared = [pool.pop() for _ in range(common)]
        table = []
        for row in range(count):
            entries = []
            for column in range(columns):
                if column not in needed[row]:
                    entries.append(self.dice.choice((-1, num_pages, INT32_MAX, -(2**31), 0)))
                else:
                    entries.append(shared[column] if column < common else pool.pop())
            table.append(entries)
        table_name = self.dice.choice(("page_table", "block_table"))
        source = torch.tensor(table, dtype=torch.int32).reshape(count, columns)
        self.arguments[table_name] = self.allocate((count, columns), torch.int32).copy_(source)
        self.keys_and_values((num_pages, page_size), names, copied=False)

    def draw_rows(self, shared: bool) -> tuple[list[int], int]:
        """cache_batch_idx: the row of each sequence, and the number of rows."""
        count = self.batch + self.dice.choice((0, 1, 3))
        if shared and count and self.chance(0.3):
            row_of = [self.dice.randrange(count) for _ in range(self.batch)]
        else:
            row_of = self.dice.sample(range(count), self.batch)
        self.arguments["cache_batch_idx"] = self.indices(row_of)
        return row_of, count

    def draw_cache(self) -> None:
        """The keys of flash_attn_with_kvcache, and what it appends."""
        appends = self.choose("append", 0.5)
        known = appends or self.chance(0.8)
        lengths = self.lengths_k
        appended = [0] * self.batch
        if appends:
            appended = [
                self.dice.choice((0, 1, 1, self.dice.randint(1, 9), self.lengths_q[b])) for b in range(self.batch)
            ]
            if not self.chance(0.4):
                appended = [max(1, max(appended, default=1))] * self.batch
                self.packed_new = False
            else:
                self.packed_new = True
        # lengths counts the appended keys; held is what the cache holds before, left padding included.
        leftpad = [0] * self.batch
        if self.rarely(0.3):
            leftpad = [self.dice.choice((0, 1, self.dice.randint(0, 70))) for _ in range(self.batch)]
            self.arguments["cache_leftpad"] = self.indices(leftpad)
        held = [leftpad[b] + max(0, lengths[b] - appended[b]) for b in range(self.batch)]
        same = known and self.batch > 0 and self.chance(0.15)
        if same:
            held = [max(held)] * self.batch
        capacity = max((held[b] + appended[b] for b in range(self.batch)), default=7)
        capacity += self.dice.choice((0, 0, 1, 40))
        if self.choose("paged", 0.5):
            self.draw_pages(held if known else None, leftpad, max(capacity, max(leftpad, default=0)), appended)
            self.leave_room_for(leftpad)
        else:
            count = self.batch
            if self.rarely(0.3):
                _, count = self.draw_rows(shared=not appends)
            self.capacity = max(capacity, max(leftpad, default=0))
            self.keys_and_values((count, self.capacity), ("k_cache", "v_cache"), copied=False)
        if known:
            self.arguments["cache_seqlens"] = held[0] if same else self.indices(held)
        self.lengths_k = [(held[b] if known else self.capacity) + appended[b] - leftpad[b] for b in range(self.batch)]
        if appends:
            self.draw_append(held, appended)
        elif self.chance(0.1):  # ignored without new keys
            self.arguments["cu_seqlens_k_new"] = self.indices([0] * (self.batch + 1))

    def leave_room_for(self, leftpad: list[int]) -> None:
        """Left padding never exceeds the capacity."""
        if max(leftpad, default=0) > self.capacity:
            leftpad[:] = [min(pad, self.capacity) for pad in leftpad]
            self.arguments["cache_leftpad"] = self.indices(leftpad)

    def draw_append(self, held: list[int], appended: list[int]) -> None:
        dtype = self.dtype
        if self.dtype_k == FP8 and self.chance(0.4):
            dtype = FP8
        if self.packed_new:
            cumulative, total = self.cumulative(appended, gap=self.chance(0.5))
            self.arguments["cu_seqlens_k_new"] = cumulative
            rows: tuple[int, ...] = (total,)
        else:
            rows = (self.batch, appended[0] if self.batch else 2)
        for name, size in (("k", self.d), ("v", self.dv)):
            self.arguments[name] = self.values((*rows, self.heads_k, size), dtype, copied=True)
        if self.d >= 16 and self.choose("rotary", 0.5):
            self.draw_rotary(held, appended)

    def draw_rotary(self, held: list[int], appended: list[int]) -> None:
        starts = held
        if self.chance(0.4):
            starts = [self.dice.randint(0, 90) for _ in range(self.batch)]
            self.arguments["rotary_seqlens"] = self.indices(starts)
        # A query row stands at the first position or, under a mask, that many rows on.
        ends = [starts[b] + max(appended[b], self.lengths_q[b], 1) for b in range(self.batch)]
        rows = max(ends, default=3) + self.dice.choice((0, 0, 5, 100))
        if self.chance(0.1):  # positions past the end count as the last one
            rows = self.dice.randint(1, rows)
        half = 8 * self.dice.randint(1, self.d // 16)
        dtype = self.dice.choice((self.dtype, torch.bfloat16, torch.float16, torch.float32))
        angles = 6.3 * torch.rand(rows, half, generator=self.numbers, device=self.device)
        self.arguments["rotary_cos"] = self.allocate((rows, half), dtype).copy_(angles.cos().to(dtype))
        self.arguments["rotary_sin"] = self.allocate((rows, half), dtype).copy_(angles.sin().to(dtype))
        self.arguments["rotary_interleaved"] = self.chance(0.5)

    def draw_packed(self) -> None:
        """The tensor of flash_attn_qkvpacked_func, in either layout."""
        length = min(max(self.lengths_k, default=4), self.most_queries)
        if self.chance(0.5):
            self.heads = self.heads_k
            self.arguments["qkv"] = self.values((self.batch, length, 3, self.heads, self.d), self.dtype, copied=True)
            if self.chance(0.3):
                self.arguments["num_heads_q"] = None
        else:
            shape = (self.batch, length, self.heads + 2 * self.heads_k, self.d)
            self.arguments["qkv"] = self.values(shape, self.dtype, copied=True)
            self.arguments["num_heads_q"] = self.integer(self.heads)
        self.rows = (self.batch, length)
        self.lengths_q = self.lengths_k = [length] * self.batch

    def draw_mask(self) -> None:
        world_size = 1
        if "rotary_cos" not in self.arguments and self.rarely(0.15):
            world_size = self.dice.choice((2, 3, 4, 8))
            rank = self.dice.randrange(world_size)
            totals = []
            for length in self.lengths_k:
                first, last = (length - 1) * world_size + rank + 1, length * world_size + rank
                if self.chance(0.2):  # not what the rank holds: too many keys or too few
                    first, last = 0, (length + 2) * world_size
                totals.append(self.dice.randint(max(0, first), last))
            self.arguments["cp_world_size"] = self.integer(world_size)
            self.arguments["cp_rank"] = self.integer(rank)
            self.arguments["cp_tot_seqused_k"] = self.indices(totals)
        elif self.chance(0.05):
            self.arguments["cp_world_size"] = 1
            self.arguments["cp_rank"] = 0
            self.arguments["cp_tot_seqused_k"] = self.indices([-7] * self.batch)  # ignored

        # A wide call keeps most of its blocks of keys in sight.
        least = 5 * KEY_BLOCK * world_size if self.wide and self.chance(0.9) else 0

        def side() -> Any:
            bound = self.dice.choice((0, 1, self.dice.randint(0, 20), self.dice.randint(0, 200), INT32_MAX, 2**20, -1))
            if self.chance(0.1):
                return None
            return self.integer(least + bound if 0 <= bound <= 200 else bound)

        if self.chance(0.5):
            self.arguments["causal"] = self.chance(0.8)
        if self.chance(0.35):
            self.arguments["window_size"] = self.dice.choice((tuple, list))((side(), side()))
        if self.rarely(0.2):
            chunk = self.dice.choice((0, None, 1, 2, self.dice.randint(1, 200), KEY_BLOCK, 2**20, INT32_MAX))
            self.arguments["attention_chunk"] = chunk if not chunk else self.integer(max(least, chunk))

    def draw_options(self) -> None:
        arguments, dice = self.arguments, self.dice
        packed = self.function == "flash_attn_qkvpacked_func"
        a = normalise(self.function, arguments)
        if self.chance(0.5):
            arguments["softmax_scale"] = a.scale * 2 ** dice.uniform(-1, 1)
        if self.chance(0.25) if self.kind is None else self.kind.softcap:
            arguments["softcap"] = dice.choice((0.5, 2.0, 15.0, 50.0, 30))
        if self.rarely(0.3):
            dtype = dice.choice((torch.bfloat16, torch.float16, torch.float32))
            name = dice.choice(("learnable_sink", "sinks", "s_aux"))
            arguments[name] = self.values((self.heads,), dtype)
        self.draw_scales()
        if not packed:
            if self.plain:
                arguments["num_splits"] = 0
            elif self.wide:
                arguments["num_splits"] = self.integer(dice.choice((3, 3, 4, 5, 7, 8)))
                if self.chance(0.1):
                    arguments["num_splits"] = dice.choice((0, 1))
            elif self.chance(0.7):
                arguments["num_splits"] = self.integer(dice.choice((0, 1, 1, 2, 3, 17, 256, -1)))
            if self.chance(0.4):
                arguments["pack_gqa"] = dice.choice((None, False, True))
        if self.chance(0.2):
            arguments["sm_margin"] = self.integer(dice.choice((0, 1, 8, 100)))
        if self.rarely(0.15 if self.wide else 0.3):
            arguments["batch_invariant"] = self.chance(0.7)
        if self.function != "flash_attn_with_kvcache" and self.chance(0.2):
            arguments["deterministic"] = self.chance(0.5)
        if self.rarely(0.85):
            kvcache = self.function == "flash_attn_with_kvcache"
            arguments["return_softmax_lse" if kvcache or self.chance(0.3) else "return_attn_probs"] = True
        default = torch.bfloat16 if self.dtype == FP8 else self.dtype
        dtype = default
        if self.kind is not None:
            dtype = self.kind.out_type
        elif self.dtype == FP8:
            dtype = dice.choice((torch.bfloat16, torch.float16))
        if self.chance(0.5) or dtype != default:
            arguments["out"] = self.allocate((*self.rows, self.heads, self.dv), dtype)
        if self.function in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
            self.with_metadata = self.chance(0.3)

    def draw_scales(self) -> None:
        """The descales: some absent, some with odd strides, NaN where the type ignores them."""
        if not self.chance(0.8 if self.dtype_k == FP8 else 0.1):
            return
        for name, dtype in (
            ("q_descale", self.dtype),
            ("k_descale", self.dtype_k),
            ("v_descale", self.dtype_k),
        ):
            if self.chance(0.2):
                continue
            shape = (self.batch, self.heads_k)
            kind = self.dice.randrange(4)
            if kind == 0:  # one value for all
                scale = self.storage((1,), torch.float32, 1).expand(shape)
                parent = scale[:1, :1]
            elif kind == 1:  # heads first, with gaps
                scale = self.storage((self.heads_k, max(1, 2 * self.batch)), torch.float32, 0)[
                    :, : 2 * self.batch : 2
                ].T
                parent = scale
            else:
                parent = scale = self.allocate(shape, torch.float32)
            if dtype == FP8:
                parent.copy_(0.6 + 0.8 * torch.rand(parent.shape, generator=self.numbers, device=self.device))
            self.arguments[name] = scale

    def poison(self, a: Arguments) -> None:
        """NaN in every row of the drawn tensors that must not reach the result."""
        device = self.device
        queries = torch.zeros(a.q.shape[:-2], dtype=torch.bool, device=device)
        keys = torch.zeros(a.k.shape[:-2], dtype=torch.bool, device=device)
        new = None if a.k_new is None else torch.zeros(a.k_new.shape[:-2], dtype=torch.bool, device=device)
        angles = None if a.rotary_cos is None else torch.zeros(len(a.rotary_cos), dtype=torch.bool, device=device)
        for s in sequences(a):
            queries[s.rows] = True
            seen = visible(s.sq, s.sk, **a.mask, total=s.total, device=device).any(0)
            seen[s.sk - s.appended :] = False  # their place in the cache is written before it is read
            keys[tuple(index[seen] for index in s.keys)] = True
            if new is not None:
                new[s.new_rows] = True
            if angles is not None:
                varying = a.mask["causal"] or max(a.mask["window"]) >= 0 or a.mask["chunk"] > 0
                rows = max(s.appended, s.sq if varying else min(s.sq, 1))
                used = torch.arange(s.position, s.position + rows, device=device)
                angles[used.clamp(max=len(angles) - 1)] = True
        poisoned = [(a.q, queries), (a.qv, queries), (a.k, keys), (a.v, keys)]
        poisoned += [(a.k_new, new), (a.v_new, new), (a.rotary_cos, angles), (a.rotary_sin, angles)]
        for x, used in poisoned:
            if x is not None:
                used = used.reshape(used.shape + (1,) * (x.dim() - used.dim()))
                raw(x).masked_fill_(~used, 0x7F if x.dtype == FP8 else torch.nan)
