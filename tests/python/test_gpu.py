"""What a call on an NVIDIA GPU owes its caller besides the right numbers: graphs, streams, threads, any strides, any
size, and nothing out of bounds whatever the tensors hold. `make test-gpu` runs these, and the other tests that touch
the device."""

import copy
import functools
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Optional

import pytest
import torch
from calls import Call, draw_some, metadata_arguments
from environment import DEVICE
from judge import bars, check, check_arguments, check_result, check_unwritten, error, same_bits, storage
from kernels import NOT_SERVED
from reference import FP8, evaluate

if DEVICE == "cpu":
    pytest.skip("for an NVIDIA GPU: make test-gpu", allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(**options: Any) -> Call:
    arguments = {"q": randn(2, 300, 8, 64), "k": randn(2, 500, 2, 64), "v": randn(2, 500, 2, 64)}
    return Call("flash_attn_func", {**arguments, "causal": True, "return_attn_probs": True, **options})


def ragged(lengths_q: tuple = (300, 1, 129, 0), lengths_k: tuple = (500, 64, 129, 7), **options: Any) -> Call:
    arguments = {
        "q": randn(sum(lengths_q), 8, 64),
        "k": randn(sum(lengths_k), 2, 64),
        "v": randn(sum(lengths_k), 2, 64),
        "cu_seqlens_q": torch.nn.functional.pad(int32(*lengths_q).cumsum(0, dtype=torch.int32), (1, 0)),
        "cu_seqlens_k": torch.nn.functional.pad(int32(*lengths_k).cumsum(0, dtype=torch.int32), (1, 0)),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
    }
    return Call("flash_attn_varlen_func", {**arguments, "causal": True, "return_attn_probs": True, **options})


def cached(
    lengths: tuple = (500, 64, 129, 0), rows: int = 1, capacity: int = 512, size: int = 64, **options: Any
) -> Call:
    """A call over a cache that has room for so many keys of each sequence."""
    arguments = {
        "q": randn(len(lengths), rows, 8, size),
        "k_cache": randn(len(lengths), capacity, 2, size),
        "v_cache": randn(len(lengths), capacity, 2, size),
        "cache_seqlens": int32(*lengths),
    }
    return Call("flash_attn_with_kvcache", {**arguments, "causal": True, "return_softmax_lse": True, **options})


def over_a_cache(
    batch: int, rows: int, capacity: int, heads: tuple, sizes: tuple, page_size: Optional[int]
) -> dict[str, Any]:
    """Queries of so many rows, and a cache, of pages where they have a size. Heads are those of queries and of keys,
    sizes those of keys and of values."""
    (heads_q, heads_k), (size, size_v) = heads, sizes
    slots = (batch, capacity) if page_size is None else (batch * capacity // page_size, page_size)
    arguments: dict[str, Any] = {
        "q": randn(batch, rows, heads_q, size),
        "k_cache": randn(*slots, heads_k, size),
        "v_cache": randn(*slots, heads_k, size_v),
    }
    if page_size is not None:
        arguments["page_table"] = torch.randperm(slots[0], device=DEVICE).to(torch.int32).view(batch, -1)
    return arguments


def few_tiles(**options: Any) -> Call:
    """So few that the keys of each are shared out in a cluster."""
    return cached((2500, 64, 129, 0), rows=40, capacity=3072, **options)


def paged(
    lengths: tuple = (500, 64, 129, 0),
    rows: int = 1,
    page_size: int = 16,
    capacity: int = 512,
    size: int = 64,
    **options: Any,
) -> Call:
    """The same in pages that lie anywhere, keys and values halves of one tensor."""
    pages = capacity // page_size
    cache = randn(len(lengths) * pages + 3, 2, page_size, 2, size)
    table = torch.randperm(len(cache), device=DEVICE)[: len(lengths) * pages].to(torch.int32).view(-1, pages)
    return cached(lengths, rows, size=size, k_cache=cache[:, 0], v_cache=cache[:, 1], page_table=table, **options)


# Tiles whose keys are shared out in clusters, where the page size lets the copy engine read them.
in_clusters = functools.partial(paged, rows=40, capacity=3072)


def appending(make: Callable[..., Call] = paged, rows: int = 3, **options: Any) -> Call:
    """Appends new keys and rotates them and the queries."""
    new = {name: randn(4, rows, 2, 64) for name in ("k", "v")}
    angles = torch.rand(600, 16, device=DEVICE)
    rotary = {"rotary_cos": angles.cos().to(BF16), "rotary_sin": angles.sin().to(BF16)}
    return make((400, 64, 129, 0), rows, **new, **rotary, **options)


def mixed(
    counts: tuple, make: Callable[..., Call] = paged, capacity: int = 2000, spare_pages: int = 0, **options: Any
) -> Call:
    """Some sequences are read and others decoded: so many queries of each. The page table has room for `spare_pages`
    more.
    """
    call = make(tuple(random.randrange(count, capacity) for count in counts), capacity=capacity, **options)
    ragged_queries = {
        "q": randn(sum(counts), *call.arguments["q"].shape[2:]),
        "cu_seqlens_q": torch.nn.functional.pad(int32(*counts).cumsum(0, dtype=torch.int32), (1, 0)),
        "max_seqlen_q": max(counts),
    }
    if spare_pages > 0:
        call.arguments["page_table"] = torch.nn.functional.pad(call.arguments["page_table"], (0, spare_pages))
    return Call(call.function, {**call.arguments, **ragged_queries})


# Mixed calls whose page table has room for so many keys that two launches serve them; the longest prompt has 2200.
side_by_side = functools.partial(mixed, capacity=2304, spare_pages=50_000)


def latent(
    lengths: tuple = (500, 64, 129, 0), rows: int = 2, heads: int = 16, cache_type: torch.dtype = BF16, **options: Any
) -> Call:
    """Multi-head latent attention: one key head, whose latent and rope parts are views of one paged cache."""
    cache = randn(len(lengths) * 32 + 3, 16, 1, 576).to(cache_type)
    table = torch.randperm(len(cache), device=DEVICE)[: len(lengths) * 32].to(torch.int32).view(-1, 32)
    arguments = {"q": randn(len(lengths), rows, heads, 64), "qv": randn(len(lengths), rows, heads, 512)}
    arguments |= {"k_cache": cache[..., 512:], "v_cache": cache[..., :512], "page_table": table}
    return cached(lengths, rows, **{**arguments, "softmax_scale": 192**-0.5, **options})


def prompts_and_decoding(**options: Any) -> Call:
    return mixed((300, 1, 129, 0), **options)


def prompts_beside_decoding(**options: Any) -> Call:
    return side_by_side((300, 1, 129, 0), **options)


MAKERS = [normal, ragged, cached, few_tiles, paged, appending, latent, prompts_and_decoding, prompts_beside_decoding]


def capture(call: Call, mate: ModuleType) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """A graph of the call, and the tensors that it writes. Any wait for the device would make the capture fail."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(mate)
    return graph, results


@pytest.mark.parametrize("page_size", [16, 1])
@pytest.mark.parametrize(("batch", "rows"), [(33, 1), (300, 1), (1100, 1), (70, 20)])
def test_many_sequences(mate: ModuleType, device: str, batch: int, rows: int, page_size: int) -> None:
    lengths = [random.choice((0, 1, random.randrange(400))) for _ in range(batch)]
    pages = 400 // page_size
    cache = randn(2000 // page_size, 2, page_size, 2, 64)
    table = torch.randint(len(cache), (batch, pages), device=DEVICE, dtype=torch.int32)
    arguments = {"q": randn(batch, rows, 8, 64), "page_table": table}
    arguments |= {"k_cache": cache[:, 0], "v_cache": cache[:, 1]}
    options = {"cache_seqlens": int32(*lengths), "return_softmax_lse": True}
    check(Call("flash_attn_with_kvcache", {**arguments, **options}), mate)


@pytest.mark.parametrize("rows", [2, 3, 20])
def test_rows_beyond_the_longest_sequence_are_cleared(mate: ModuleType, device: str, rows: int) -> None:
    check(cached((500, 64, 129, 0), rows, seqused_q=int32(1, 1, 0, 1), max_seqlen_q=1), mate)


def test_rows_past_max_seqlen_are_cleared(mate: ModuleType, device: str) -> None:
    """Which only the device can know of."""
    call = ragged((150, 1, 59), (40, 64, 3), causal=False)
    lied = Call(call.function, {**call.arguments, "max_seqlen_q": 1})
    expected = evaluate(call.function, {**call.arguments, "seqused_q": int32(1, 1, 1)})
    check_result(*lied.run(mate), expected, bars(lied))


def test_many_prompts_and_decodes(mate: ModuleType, device: str) -> None:
    check(mixed((1,) * 36 + (200, 3, 70, 130)), mate)


# Graphs, streams and threads.


LATE_COPY = """
extern "C" __global__ void copy_late(int* to, const int* from, int count) {
  asm volatile("griddepcontrol.launch_dependents;");
  const long long begin = clock64();
  while (clock64() - begin < 100000) {}
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}
"""


@pytest.mark.parametrize("page_size", [16, 1])
@pytest.mark.parametrize("name", ["cache_seqlens", "page_table", "k_cache"])
@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (paged, (300, 77, 129, 1)),
        (paged, (300, 0, 129, 0)),
        (paged, (0, 129, 0, 300)),
        (paged, (0, 0, 0, 0)),
        (paged, (50, 399) * 20),
        (in_clusters, (2500, 64, 129, 0)),
        (in_clusters, (0, 0, 130, 2500)),
        (in_clusters, (2500,)),
        (mixed, (1, 150, 1, 1)),
        (mixed, (300, *[1] * 39)),
        (side_by_side, (1, 150, 1, 1)),
        (side_by_side, (2200, *[1] * 39)),
    ],
)
def test_what_the_kernel_before_writes_late(
    mate: ModuleType, device: str, make: Callable[..., Call], lengths: tuple, name: str, page_size: int
) -> None:
    """A kernel that lets the next begin before it has written what that one reads."""
    copy_late = torch.cuda._compile_kernel(LATE_COPY, "copy_late")
    call = make(lengths, page_size=page_size)
    target = call.arguments[name]
    old = target.clone()
    new = target.flip(0, 1) if name == "page_table" else target.flip(0)
    late = torch.empty_like(target).copy_(new)
    if name == "k_cache":  # a view of half of a tensor
        target = call.arguments[name] = target.contiguous()
    call.run(mate)
    target.copy_(old)
    as_ints = [x.contiguous().view(-1).view(torch.int32) for x in (target, late)]
    assert as_ints[0].data_ptr() == target.data_ptr()
    torch.cuda.synchronize()
    copy_late((1, 1, 1), (256, 1, 1), (*as_ints, as_ints[0].numel()))
    results = call.run(mate)
    assert torch.equal(target, late)
    check_result(*results[:2], evaluate(call.function, call.arguments), bars(call))


@pytest.mark.parametrize("make", MAKERS)
def test_a_graph_serves_other_values_and_lengths(mate: ModuleType, device: str, make: Callable[[], Call]) -> None:
    call = make()
    want = call.run(mate)
    graph, results = capture(call, mate)
    for tensor in results:
        tensor.fill_(torch.nan)
    graph.replay()
    assert same_bits(results, want)
    names = [name for name in ("q", "k", "v", "k_cache", "v_cache") if name in call.arguments]
    other = {name: randn(*call.arguments[name].shape) for name in names}
    if "cu_seqlens_q" in call.arguments:
        other["cu_seqlens_q"] = int32(0, 0, 299, 300, 430)
    if "cu_seqlens_k" in call.arguments:
        other["cu_seqlens_k"] = int32(0, 10, 400, 401, 700)
    if "cache_seqlens" in call.arguments:
        other["cache_seqlens"] = int32(3, 509, 0, 200)
    if "page_table" in call.arguments:
        other["page_table"] = call.arguments["page_table"].flip(0, 1)
    for name, value in other.items():
        call.arguments[name].copy_(value)
    expected = evaluate(call.function, call.arguments)
    graph.replay()
    check_result(*results, expected, bars(call))
    check_arguments(call.arguments, expected.after)
    assert same_bits(results, call.run(mate))


@pytest.mark.parametrize("num_splits", [0, 3])
def test_a_graph_with_its_scheduler_metadata(mate: ModuleType, device: str, num_splits: int) -> None:
    """The metadata is refreshed in place, with lengths that the host does not know."""
    call = paged(num_splits=num_splits)
    planning = metadata_arguments(call)
    metadata = mate.get_scheduler_metadata(**planning)
    call.arguments["scheduler_metadata"] = metadata
    call.run(mate)
    graph, results = capture(call, mate)
    for lengths in ((3, 509, 0, 200), (512, 512, 512, 512), (0, 0, 0, 1)):
        call.arguments["cache_seqlens"].copy_(int32(*lengths))
        mate.get_scheduler_metadata(**planning, out=metadata)
        graph.replay()
        check_result(*results, evaluate(call.function, call.arguments), bars(call))


def test_a_graph_after_a_larger_call(mate: ModuleType, device: str) -> None:
    """What a captured call needs besides its tensors is its own for good."""
    call = cached((300,) * 4, num_splits=7)
    want = call.run(mate)
    graph, results = capture(call, mate)
    large = cached((512,) * 300, num_splits=16)
    check(large, mate)
    for tensor in results:
        tensor.fill_(torch.nan)
    graph.replay()
    large.run(mate)
    graph.replay()
    assert same_bits(results, want)


FIRST_CALL_IN_A_CAPTURE = """
import torch, mate
q = torch.randn(1, 200, 2, 64, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        out = mate.flash_attn_func(q, q, q, causal=True)
except RuntimeError as reason:
    assert "warm" in str(reason), reason
else:
    graph.replay()
    assert torch.equal(out, mate.flash_attn_func(q, q, q, causal=True))
"""


def test_the_first_call_of_a_process_in_a_capture(device: str) -> None:
    """It works, or asks for a warm-up."""
    subprocess.run([sys.executable, "-c", FIRST_CALL_IN_A_CAPTURE], check=True)


def test_a_thousand_replays_on_several_streams_at_once_give_equal_bits(mate: ModuleType, device: str) -> None:
    graphs = []
    for call in (normal(), ragged(), cached(), few_tiles(), paged(num_splits=5)):
        want = call.run(mate)
        graphs.append((torch.cuda.Stream(), *capture(call, mate), want, torch.zeros((), device=device)))
    torch.cuda.synchronize()
    for _ in range(1000):
        for stream, graph, results, want, wrong in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
                for got, right in zip(results, want):
                    wrong += (got != right).any()
                    got.fill_(torch.nan)
    torch.cuda.synchronize()
    assert [int(wrong) for *_, wrong in graphs] == [0] * len(graphs)


def test_a_call_runs_on_the_stream_of_its_caller(mate: ModuleType, device: str) -> None:
    call = normal()
    want = call.run(mate)
    late = {name: torch.zeros_like(call.arguments[name]) for name in ("q", "k", "v")}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # 50 ms or more
        for name, tensor in late.items():
            tensor.copy_(call.arguments[name])
        got = Call(call.function, {**call.arguments, **late}).run(mate)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert same_bits(got, want)


def test_no_call_waits_for_the_device(mate: ModuleType, device: str) -> None:
    calls = [make() for make in MAKERS]
    calls.append(ragged(seqused_q=int32(1, 1, 5, 0), seqused_k=int32(500, 3, 0, 7)))
    for call in calls:
        call.run(mate)
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    for call in calls:
        call.run(mate)
    assert not torch.cuda.current_stream().query(), "a call waited for the device"


def test_calls_from_several_threads(mate: ModuleType, device: str, seed: int) -> None:
    calls = list(draw_some(64, seed, device=device))
    want = [copy.deepcopy(call).run(mate) for call in calls]
    torch.cuda.synchronize()

    def work(first: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [copy.deepcopy(call).run(mate) for call in calls[first:] + calls[:first]]
            torch.cuda.current_stream().synchronize()
        return same_bits(got[len(calls) - first :] + got[: len(calls) - first], want)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(0, 64, 8)))


def test_calls_of_two_launches_from_several_threads_on_one_stream(mate: ModuleType, device: str) -> None:
    calls = [side_by_side((2200, 1, 129, 0), sm_margin=margin) for margin in (0, 0, 100, 131)]
    calls += [normal(), paged()]
    want = [copy.deepcopy(call).run(mate) for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def work(first: int) -> bool:
        rotated = calls[first:] + calls[:first]
        with torch.cuda.stream(stream):
            got = [[call.run(mate) for call in map(copy.deepcopy, rotated)] for _ in range(10)]
            stream.synchronize()
        return all(same_bits(each, want[first:] + want[:first]) for each in got)

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(work, range(len(calls))))


def test_every_gpu_of_the_machine(mate: ModuleType, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    for call in (normal(), few_tiles()):
        want = call.run(mate)
        for i in range(torch.cuda.device_count()):
            arguments = {name: x.to(i) if isinstance(x, torch.Tensor) else x for name, x in call.arguments.items()}
            got = Call(call.function, arguments).run(mate)  # while another GPU is the current one
            assert same_bits([x.to(device) for x in got], want)


@pytest.mark.parametrize("margin", [0, 100, 10_000])
@pytest.mark.parametrize("make", [cached, paged])
@pytest.mark.parametrize("capacity", [512, 2000])
@pytest.mark.parametrize(
    "counts",
    [(300, *[1] * 9), ([*[1] * 9, 300]), (1, 1, 150, 0, 1, 17, 400, 1, 1, 0, 1, 16, 1), (1, 400, *[2] * 40, 129, 1)],
)
def test_prompts_and_decoding_in_one_call(
    mate: ModuleType, device: str, seed: int, counts: tuple, capacity: int, make: Callable[..., Call], margin: int
) -> None:
    """Where there is room for few keys, blocks of threads take whole tiles; else each takes some keys, on few
    multiprocessors of prompts and of decoded rows in turns.
    """
    random.seed(seed)
    check(mixed(tuple(counts), make, capacity, sm_margin=margin), mate)


@pytest.mark.parametrize("margin", [0, 100, 130, 131])
@pytest.mark.parametrize(("size", "page_size"), [(64, 16), (64, 1), (128, 16)])
@pytest.mark.parametrize(
    "counts",
    [
        (300, *[1] * 9),
        (2, 1, 150, 0, 1, 17, 400, 1, 3, 0, 1, 16, 1),
        (1, 2200, *[2] * 40, 129, 1),  # tiles enough to be left whole
        (900, 1300, 1, 2100, 1),
        (400, 30, 500),  # nothing is decoded
    ],
)
def test_prompts_beside_decoding(
    mate: ModuleType, device: str, seed: int, counts: tuple, size: int, page_size: int, margin: int
) -> None:
    """Two launches side by side, each on its share of the multiprocessors. Clusters take the tiles of larger heads."""
    random.seed(seed)
    check(side_by_side(counts, page_size=page_size, size=size, sm_margin=margin), mate)


def test_nothing_is_read_where_a_prompt_was_expected(mate: ModuleType, device: str) -> None:
    call = side_by_side((1, 2, 1, 1, 2))
    call.arguments["max_seqlen_q"] = 400
    check(call, mate)


@pytest.mark.parametrize("heads", [1, 16, 48, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 150])
@pytest.mark.parametrize("options", [{}, {"num_splits": 1}, {"num_splits": 5}, {"batch_invariant": True}], ids=str)
def test_latent_attention(mate: ModuleType, device: str, rows: int, heads: int, options: dict) -> None:
    check(latent(rows=rows, heads=heads, **options), mate)


@pytest.mark.parametrize("lengths", [(2500,), (1700, 2500)], ids=str)
@pytest.mark.parametrize(("rows", "heads"), [(16, (32, 8)), (33, (8, 2)), (64, (16, 4))], ids=str)
@pytest.mark.parametrize("cache_type", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_splits": 8}, {"window_size": (1800, 3), "causal": False}], ids=str)
def test_few_tiles_of_many_parts(
    mate: ModuleType, device: str, lengths: tuple, rows: int, heads: tuple, cache_type: torch.dtype, options: dict
) -> None:
    """Parts that a launch of its own merges."""
    heads_q, heads_k = heads
    keys, values = (randn(len(lengths), max(lengths), heads_k, 128).to(cache_type) for _ in range(2))
    q = randn(len(lengths), rows, heads_q, 128)
    arguments = {"causal": True, "learnable_sink": randn(heads_q), **options}
    check(cached(lengths, q=q, k_cache=keys, v_cache=values, **arguments), mate)


@pytest.mark.parametrize("sizes", [(128, 128), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 256])
@pytest.mark.parametrize("multiprocessors", [2, 5, 10_000])
@pytest.mark.parametrize("options", [{"causal": False}, {}, {"causal": False, "window_size": (300, 100)}], ids=str)
def test_blocks_of_threads_that_fetch_keys_for_each_other(
    mate: ModuleType,
    device: str,
    sizes: tuple,
    heads: tuple,
    page_size: Optional[int],
    multiprocessors: int,
    options: dict,
) -> None:
    """Tiles of clusters, for most of these sizes, some of which see no keys; on few multiprocessors each has many."""
    lengths = (960, 640, 130, 0)
    arguments = over_a_cache(len(lengths), 490, 1024, heads, sizes, page_size)
    margin = max(0, torch.cuda.get_device_properties(device).multi_processor_count - multiprocessors)
    check(cached(lengths, num_splits=1, sm_margin=margin, **arguments, **options), mate)


@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize(("rows", "heads"), [(20, (8, 8)), (17, (4, 1)), (40, (4, 2)), (150, (6, 6))], ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 256])
@pytest.mark.parametrize("options", [{}, {"causal": False, "window_size": (900, 100)}, {"pack_gqa": False}], ids=str)
def test_blocks_of_threads_that_share_out_the_keys_of_a_tile(
    mate: ModuleType,
    device: str,
    sizes: tuple,
    rows: int,
    heads: tuple,
    page_size: Optional[int],
    options: dict,
) -> None:
    """Tiles of clusters of up to eight, some of whose blocks have no keys, and some tiles none at all. Few rows are
    those of clusters in a sequence alone.
    """
    for lengths in ((3000, 130, 0), (3000,)):
        check(cached(lengths, **over_a_cache(len(lengths), rows, 3072, heads, sizes, page_size), **options), mate)


@pytest.mark.parametrize("lengths", [(1,), (1023,), (8000,), (900, 40, 0), (2040, 500, 1300, 7), (500, 501) * 6])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("heads", [(8, 2), (16, 8), (3, 3), (40, 10)], ids=str)
@pytest.mark.parametrize("key_type", [BF16, FP8])
def test_decoding_of_few_sequences(
    mate: ModuleType, device: str, lengths: tuple, rows: int, heads: tuple, key_type: torch.dtype
) -> None:
    """Keys are shared out so that each block of threads has a part of one tile alone, or evenly."""
    tensors = over_a_cache(len(lengths), rows, -(-max(lengths) // 16) * 16, heads, (128, 128), 16)
    for name in ("k_cache", "v_cache"):
        tensors[name] = tensors[name].to(key_type)
    check(cached(lengths, **tensors), mate)


@pytest.mark.parametrize("types", [(FP8, FP8), (BF16, FP8)], ids=str)
@pytest.mark.parametrize("rows", [8, 40, 150])
def test_e4m3_keys_of_a_tile_are_shared_out(mate: ModuleType, device: str, types: tuple, rows: int) -> None:
    query_type, key_type = types
    lengths = (3000, 700, 129, 0)
    keys, values = (randn(len(lengths), max(lengths), 2, 128).to(key_type) for _ in range(2))
    q = randn(len(lengths), rows, 8, 128).to(query_type)
    check(cached(lengths, q=q, k_cache=keys, v_cache=values), mate)


@pytest.mark.parametrize("rows", [1, 4, 16, 100])
@pytest.mark.parametrize("heads", [8, 128])
def test_parts_of_long_sequences_do_not_depend_on_the_batch(
    mate: ModuleType, device: str, heads: int, rows: int
) -> None:
    lengths = (9000, 500, 8191, 5000)
    call = cached(
        lengths,
        q=randn(len(lengths), rows, heads, 64),
        k_cache=randn(len(lengths), max(lengths), 2, 64),
        v_cache=randn(len(lengths), max(lengths), 2, 64),
        batch_invariant=True,
    )
    check(call, mate)
    out, lse = call.run(mate)[:2]
    assert same_bits((out, lse), Call(call.function, {**call.arguments, "sm_margin": 77}).run(mate)[:2])
    per_sequence = ("q", "k_cache", "v_cache", "cache_seqlens")
    for b in range(len(lengths)):
        own = {name: call.arguments[name][b : b + 1] for name in per_sequence}
        alone = Call(call.function, {**call.arguments, **own})
        assert same_bits((out[b : b + 1], lse[b : b + 1]), alone.run(mate)[:2])


@pytest.mark.parametrize("sizes", [(512, 512), (384, 384), (257, 300)], ids=str)
@pytest.mark.parametrize("qv", [False, True])
def test_wide_heads(mate: ModuleType, device: str, sizes: tuple, qv: bool) -> None:
    d, dv = sizes
    tensors = {"q": randn(2, 200, 4, d), "k": randn(2, 300, 2, d), "v": randn(2, 300, 2, dv)}
    if qv:
        tensors["qv"] = randn(2, 200, 4, dv)
    check(Call("flash_attn_func", {**tensors, "causal": True, "return_attn_probs": True}), mate)


@pytest.mark.parametrize("descales", [None, (0.5, 0.3)])
@pytest.mark.parametrize(("rows", "heads"), [(1, 16), (2, 16), (1, 128), (7, 3), (150, 16)])
@pytest.mark.parametrize("options", [{}, {"num_splits": 1}, {"num_splits": 5}, {"batch_invariant": True}], ids=str)
def test_latent_attention_over_e4m3(
    mate: ModuleType, device: str, rows: int, heads: int, descales: Optional[tuple[float, float]], options: dict
) -> None:
    """Tiles of 16, 32 and 64 rows."""
    call = latent(rows=rows, heads=heads, cache_type=FP8, **options)
    if descales is not None:
        for name, descale in zip(("k_descale", "v_descale"), descales):
            call.arguments[name] = torch.full((4, 1), descale, device=DEVICE)
    check(call, mate)


@pytest.mark.parametrize("margin", [1, 8, 100, 131, 132, 10_000])
@pytest.mark.parametrize("make", MAKERS)
def test_multiprocessors_left_free(mate: ModuleType, device: str, make: Callable, margin: int) -> None:
    check(make(sm_margin=margin), mate)


# Layouts.


def shifted(x: torch.Tensor) -> torch.Tensor:
    """At an address that is aligned to 2 bytes alone."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def padded_by(elements: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def strided(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + elements), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]

    return strided


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads outermost": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "shifted": shifted,
    "gaps of 2 bytes": padded_by(1),
    "gaps of 8 bytes": padded_by(4),
    "gaps of 16 bytes": padded_by(8),
    "one head for all": lambda x: x[:, :, :1].expand(x.shape),
    "one row for all": lambda x: x[:, :1].expand(x.shape),
    "one sequence for all": lambda x: x[:1].expand(x.shape),
    "last dimension not contiguous": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
@pytest.mark.parametrize("size", [64, 100])
def test_strides(mate: ModuleType, device: str, layout: str, which: str, size: int) -> None:
    shapes = {"q": (2, 200, 4, size), "k": (2, 300, 2, size), "v": (2, 300, 2, size)}
    tensors = {name: randn(*shape) for name, shape in shapes.items()}
    for name in tensors if which == "all" else which:
        tensors[name] = LAYOUTS[layout](tensors[name])
    check(Call("flash_attn_func", {**tensors, "causal": True, "return_attn_probs": True}), mate)


@pytest.mark.parametrize(
    "layout", ["heads first", "rows first", "shifted", "gaps of 2 bytes", "gaps of 8 bytes", "gaps of 16 bytes"]
)
@pytest.mark.parametrize("size", [64, 100])
def test_strides_of_out(mate: ModuleType, device: str, layout: str, size: int) -> None:
    tensors = {name: randn(2, 200, 4, size) for name in ("q", "k", "v")}
    out = LAYOUTS[layout](torch.full_like(tensors["q"], torch.nan))
    check(Call("flash_attn_func", {**tensors, "out": out, "return_attn_probs": True}), mate)


# Lengths, and log-sum-exp.


@pytest.mark.parametrize("sink", [None, 0.5])
@pytest.mark.parametrize("keys", ["normal", "ragged", "padded"])
@pytest.mark.parametrize("queries", ["normal", "ragged", "padded", "ragged and padded"])
def test_lse_in_every_mode(mate: ModuleType, device: str, queries: str, keys: str, sink: Optional[float]) -> None:
    b, sq, sk, h = 3, 150, 200, 4
    arguments: dict[str, Any] = {"q": randn(b, sq, h, 64), "k": randn(b, sk, 2, 64), "v": randn(b, sk, 2, 64)}
    arguments |= {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None, "max_seqlen_k": None}
    if "ragged" in queries:
        arguments |= {"q": randn(b * sq, h, 64), "cu_seqlens_q": int32(5, 100, 100, 440), "max_seqlen_q": 340}
    if "padded" in queries:
        arguments["seqused_q"] = int32(90, 0, 140)
    if keys == "ragged":
        arguments |= {"k": randn(b * sk, 2, 64), "v": randn(b * sk, 2, 64)}
        arguments |= {"cu_seqlens_k": int32(0, 300, 300, 600), "max_seqlen_k": 300}
    if keys == "padded":
        arguments["seqused_k"] = int32(200, 0, 1)
    if sink is not None:
        arguments["learnable_sink"] = torch.full((h,), sink, device=device)
    call = Call("flash_attn_varlen_func", {**arguments, "causal": True, "return_attn_probs": True})
    _, lse = call.run(mate)
    assert lse.shape == ((h, b * sq) if "ragged" in queries else (b, h, sq))
    check(call, mate)
    assert same_bits(call.without_lse().run(mate)[0], call.run(mate)[0])


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ((0, 0), (0, 0)),
        ((0, 0), (5, 9)),
        ((3, 200), (0, 0)),
        ((0, 200, 0, 1, 0), (300, 0, 0, 1, 7)),
        ((0,) * 300 + (1,), (1,) * 301),
        ((), ()),
    ],
    ids=lambda lengths: str(lengths[:5]),
)
@pytest.mark.parametrize("pack", [False, True])
def test_sequences_of_no_length(mate: ModuleType, device: str, lengths_q: tuple, lengths_k: tuple, pack: bool) -> None:
    if lengths_q:
        check(ragged(lengths_q, lengths_k, pack_gqa=pack), mate)
    for b, sq, sk in ((0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)):
        arguments = {"q": randn(b, sq, 4, 64), "k": randn(b, sk, 2, 64), "v": randn(b, sk, 2, 64), "pack_gqa": pack}
        check(Call("flash_attn_func", {**arguments, "return_attn_probs": True}), mate)


@pytest.mark.parametrize("lowest", [-5, -(2**31)])
def test_wrong_lengths_stay_inside_the_tensors(mate: ModuleType, device: str, seed: int, lowest: int) -> None:
    """Lengths and offsets that the host cannot see are limited: the call ends, and writes nothing around its out."""
    dice = random.Random(seed)
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    for _ in range(40):
        call = ragged()
        call.arguments |= {"seqused_q": int32(1, 1, 1, 1), "seqused_k": int32(1, 1, 1, 1)}
        for name in dice.sample(names, dice.randint(1, 4)):
            call.arguments[name] = int32(*(dice.randint(lowest, 2**31 - 1) for _ in call.arguments[name]))
        surroundings = torch.full((8 + len(call.arguments["q"]), 8, 72), 7, device=device, dtype=BF16)
        out = surroundings[4:-4, :, :64]
        before = surroundings.clone()
        call.run(mate, out=out)
        out.copy_(before[4:-4, :, :64])
        assert same_bits(storage(surroundings), storage(before))
    check(ragged(), mate)  # the device still works


def test_wrong_lengths_and_pages_stay_inside_the_cache(mate: ModuleType, device: str, seed: int) -> None:
    """Pages that there are not are neither read nor written, whatever lengths and indices hold."""
    dice = random.Random(seed)
    for _ in range(60):
        call = appending(dice.choice((cached, paged)), num_splits=dice.choice((0, 1, 3)))
        wrong = {"cache_seqlens": (4,), "cache_leftpad": (4,), "rotary_seqlens": (4,), "cu_seqlens_q": (5,)}
        if "page_table" in call.arguments:
            wrong["page_table"] = call.arguments["page_table"].shape
        else:
            wrong["cache_batch_idx"] = (4,)
        for name in dice.sample(list(wrong), dice.randint(1, len(wrong))):
            if name == "cu_seqlens_q":
                call.arguments |= {"q": randn(12, 8, 64), "max_seqlen_q": 3}
            values = torch.randint(-(2**31), 2**31, wrong[name], device=device)
            near = torch.randint(-5, 600, wrong[name], device=device)
            call.arguments[name] = (values if dice.random() < 0.5 else near).to(torch.int32)
        around = {}
        for name in ("k_cache", "v_cache"):
            cache = call.arguments[name]
            wide = torch.full((len(cache) + 2, *cache.shape[1:-1], 80), 7, device=device, dtype=BF16)
            wide[1:-1, ..., :64] = cache
            around[name] = wide
            call.arguments[name] = wide[1:-1, ..., :64]
        call.run(mate)
        for wide in around.values():
            wide[1:-1, ..., :64] = 7
            assert (wide == 7).all()
    check(appending(), mate)  # the device still works


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cu_seqlens_q", (0, 301, 300, 430, 430)),
        ("cu_seqlens_q", (0, 300, 301, 430, 431)),
        ("cu_seqlens_k", (-1, 500, 564, 693, 700)),
        ("seqused_q", (300, 2, 129, 0)),
        ("seqused_k", (500, 64, -1, 7)),
        ("max_seqlen_k", 499),
    ],
)
def test_mate_check_names_what_is_wrong(
    mate: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, name: str, values: Any
) -> None:
    monkeypatch.setenv("MATE_CHECK", "1")
    right = {"seqused_q": int32(300, 1, 129, 0), "seqused_k": int32(500, 64, 100, 7)}
    check(ragged(**right), mate)
    out = randn(430, 8, 64)
    before = out.clone()
    wrong = int32(*values) if isinstance(values, tuple) else values
    with pytest.raises(ValueError, match=name):
        ragged(**{**right, name: wrong}, out=out).run(mate)
    assert same_bits(out, before)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cache_seqlens", (400, 64, -1, 0)),
        ("cache_seqlens", (400, 64, 513, 0)),
        ("cache_leftpad", (0, 65, 0, 0)),
        ("page_table", None),
    ],
)
def test_mate_check_names_what_is_wrong_of_a_cache(
    mate: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, name: str, values: Any
) -> None:
    monkeypatch.setenv("MATE_CHECK", "1")
    call = appending(cache_leftpad=int32(0, 3, 0, 0))
    check(call, mate)
    before = copy.deepcopy(call.arguments)
    if name == "page_table":
        call.arguments[name][1, 4] = len(call.arguments["k_cache"])
    else:
        call.arguments[name] = int32(*values)
    with pytest.raises(ValueError, match=name):
        call.run(mate)
    check_unwritten(call.arguments, before, skip=(name,))


def test_mate_check_lets_a_capture_be(mate: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured there are no lengths to be read."""
    call = ragged()
    want = call.run(mate)
    monkeypatch.setenv("MATE_CHECK", "1")
    graph, results = capture(call, mate)
    graph.replay()
    assert same_bits(results, want)


# Scales that few calls have.


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scales_that_are_not_positive(mate: ModuleType, device: str, scale: float, softcap: float) -> None:
    """Their kernels are made here, side by side."""

    def check_one(size: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensors = {name: randn(2, 200, 2, size) for name in ("q", "k", "v")}
            options = {"softmax_scale": scale, "softcap": softcap, "return_attn_probs": True}
            check(Call("flash_attn_func", {**tensors, **options}), mate)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check_one, (64, 128, 256)))


# Accuracy: at most what FlashAttention-3 has, and a few hundredths for the noise.


def outliers(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, device=DEVICE, dtype=torch.float64)
    return x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 0.001)


BARS = {
    ("normal", False): {BF16: 2.4e-3, FP16: 3.0e-4},
    ("normal", True): {BF16: 2.15e-3, FP16: 2.65e-4},
    ("outliers", False): {BF16: 1.6e-3, FP16: 2.15e-4},
    ("outliers", True): {BF16: 1.75e-3, FP16: 2.25e-4},
}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("inputs", ["normal", "outliers"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_accuracy(mate: ModuleType, device: str, size: int, inputs: str, causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = randn if inputs == "normal" else outliers
    tensors = {name: values(2, 2048, 8, size).to(dtype) for name in ("q", "k", "v")}
    arguments = {**tensors, "causal": causal}
    whole = float(error(mate.flash_attn_func(**arguments), evaluate("flash_attn_func", arguments).out))
    assert whole <= BARS[inputs, causal][dtype], f"relative error {whole:.3g}"


E4M3_BARS = {
    ("normal", False): 2.6e-2,
    ("normal", True): 2.1e-2,
    ("outliers", False): 7e-3,
    ("outliers", True): 1.25e-2,
}


def e4m3(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Rounded with one scale."""
    scale = float(x.abs().amax()) / 448
    return (x.double() / scale).to(FP8), scale


def e4m3_call(values: Callable[..., torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, shape in shapes.items():
        arguments[name], scale = e4m3(values(*shape))
        arguments[f"{name[0]}_descale"] = torch.full((shape[0], shapes["k"][2]), scale, device=DEVICE)
    return arguments


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("inputs", ["normal", "outliers"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_e4m3_accuracy(mate: ModuleType, device: str, size: int, inputs: str, causal: bool) -> None:
    torch.manual_seed(0)
    values = randn if inputs == "normal" else outliers
    call = Call(
        "flash_attn_func",
        {**e4m3_call(values, dict.fromkeys("qkv", (2, 2048, 8, size))), "causal": causal},
    )
    whole = float(error(call.run(mate)[0], evaluate(call.function, call.arguments).out))
    assert whole <= E4M3_BARS[inputs, causal], f"relative error {whole:.3g}"


@pytest.mark.parametrize("size", [64, 128, 256])
def test_e4m3_sums_of_many_keys(mate: ModuleType, device: str, size: int) -> None:
    """Values of one sign add up to sums that are large beside each of them."""
    torch.manual_seed(0)
    shapes = {"q": (1, 256, 2, size), "k": (1, 40000, 1, size), "v": (1, 40000, 1, size)}
    call = Call("flash_attn_func", e4m3_call(lambda *shape: randn(*shape) + 1, shapes))
    whole = float(error(call.run(mate)[0], evaluate(call.function, call.arguments).out))
    assert whole <= 3e-2, f"relative error {whole:.3g}"


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_e4m3_with_scores_beyond_all_measure(mate: ModuleType, device: str, size: int, scale: float) -> None:
    """Exponents are rounded to whole numbers, and coarser, long before they are infinite."""
    torch.manual_seed(0)
    tensors = {name: (randn(1, 300, 2, size) * 100).clamp(-448, 448).to(FP8) for name in ("q", "k", "v")}
    check(Call("flash_attn_func", {**tensors, "softmax_scale": scale}), mate)


@pytest.mark.parametrize("inputs", ["normal", "outliers"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_e4m3_accuracy_of_decoding(mate: ModuleType, device: str, size: int, inputs: str) -> None:
    torch.manual_seed(0)
    values = randn if inputs == "normal" else outliers
    shapes = {"q": (4, 1, 16, size), "k": (4, 4096, 2, size), "v": (4, 4096, 2, size)}
    arguments = e4m3_call(values, shapes)
    arguments |= {"k_cache": arguments.pop("k"), "v_cache": arguments.pop("v")}
    call = Call("flash_attn_with_kvcache", {**arguments, "cache_seqlens": int32(4096, 3000, 100, 4000)})
    whole = float(error(call.run(mate)[0], evaluate(call.function, call.arguments).out))
    assert whole <= 5e-3, f"relative error {whole:.3g}"


# Sizes.


def needs_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, and {free:.0f} are free")


def test_more_keys_than_2_to_the_31_elements(mate: ModuleType, device: str) -> None:
    needs_memory(12)
    k = torch.empty(2**31 // (8 * 64) + 1000, 8, 64, device=device, dtype=BF16).normal_()
    v = torch.empty_like(k).normal_()
    assert k.numel() > 2**31
    q, keys = randn(1, 200, 16, 64), len(k)
    options = {"window_size": (500, 0), "return_attn_probs": True}
    want = mate.flash_attn_func(q, k[None, -1000:], v[None, -1000:], **options)
    for got in (
        mate.flash_attn_func(q, k[None], v[None], **options),
        mate.flash_attn_varlen_func(q[0], k, v, int32(0, 200), int32(0, keys), 200, keys, **options),
    ):
        for one, other in zip(got, want):
            torch.testing.assert_close(one.view(other.shape), other, rtol=1e-2, atol=2e-3)


def test_a_cache_of_more_than_2_to_the_31_elements(mate: ModuleType, device: str) -> None:
    needs_memory(12)
    pages = 2**31 // (64 * 2 * 64) + 10
    k = torch.empty(pages, 64, 2, 64, device=device, dtype=BF16).normal_()
    v = torch.empty_like(k).normal_()
    q, new = randn(2, 1, 8, 64), randn(2, 1, 2, 64)
    table = torch.stack((torch.arange(pages - 9, pages - 1), torch.arange(8))).to(device, torch.int32)
    small = [x[table.long()].flatten(1, 2) for x in (k, v)]
    options = {"cache_seqlens": int32(500, 300), "causal": True, "return_softmax_lse": True}
    want = mate.flash_attn_with_kvcache(q, *small, new, new, **options)
    got = mate.flash_attn_with_kvcache(q, k, v, new, new, page_table=table, **options)
    assert same_bits(got, want)
    assert same_bits([x[table.long()].flatten(1, 2) for x in (k, v)], small)


def test_more_queries_than_2_to_the_31_elements(mate: ModuleType, device: str) -> None:
    needs_memory(20)
    q = torch.empty(2**31 // (8 * 64) + 1000, 8, 64, device=device, dtype=BF16).normal_()
    rows, k = len(q), randn(100, 2, 64)
    want = mate.flash_attn_func(q[None, -1000:], k[None], k[None], return_attn_probs=True)
    for got in (
        mate.flash_attn_func(q[None], k[None], k[None], return_attn_probs=True),
        mate.flash_attn_varlen_func(q, k, k, int32(0, rows), int32(0, 100), rows, 100, return_attn_probs=True),
    ):
        out, lse = (got[0].view(q.shape)[-1000:], got[1].view(8, rows)[:, -1000:])
        torch.testing.assert_close(out, want[0][0], rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(lse, want[1][0], rtol=1e-5, atol=1e-5)


# What is refused.


def not_served_calls() -> dict[str, Call]:
    """One call for each thing that is not served, and nothing else."""
    call = normal()
    q, k, v = (call.arguments[name] for name in ("q", "k", "v"))
    return {
        "float32": Call("flash_attn_func", {name: x.float() for name, x in zip("qkv", (q, k, v))}),
    }


@pytest.mark.parametrize("feature", NOT_SERVED)
def test_the_error_says_what_is_not_served(mate: ModuleType, device: str, feature: str) -> None:
    with pytest.raises(NotImplementedError, match=NOT_SERVED[feature]):
        not_served_calls()[feature].run(mate)


@pytest.mark.parametrize("name", ["k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "learnable_sink", "out"])
def test_tensors_on_two_devices(mate: ModuleType, device: str, name: str) -> None:
    call = ragged(seqused_k=int32(5, 5, 5, 5), learnable_sink=torch.zeros(8, device=device), out=randn(430, 8, 64))
    call.arguments[name] = call.arguments[name].cpu()
    with pytest.raises(ValueError, match=name):
        call.run(mate)
