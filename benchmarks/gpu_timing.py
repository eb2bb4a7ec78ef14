"""How time is taken on a GPU. Every function is a Timing of measure.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from measure import Effort, seconds_of

# More than the L2 cache of any GPU holds.
FLUSH_BYTES = 2**28
SAMPLES = 8  # of a contender in a round
# Calls of a graph, as a model has layers. Each takes the next of the caches that its contender has.
LAYERS = 64


def events_seconds(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """The median time of each call on the stream, each with a cold L2 cache; the calls take turns."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    started = time.perf_counter()
    for _ in range(effort.rounds):
        for name, call in calls.items():
            call()
            for _ in range(SAMPLES):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                call()
                end.record()
                events[name].append((start, end))
            torch.cuda.synchronize()
        if time.perf_counter() - started > effort.case_s:
            break
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3 for name, pairs in events.items()
    }


def issue_seconds(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """The least mean time of issuing a call, so few at once that the GPU's queue does not fill."""
    repetitions = 50
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(4 * effort.rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            best[name] = min(best[name], seconds_of(call, repetitions) / repetitions)
    torch.cuda.synchronize()
    return best


def alone_seconds(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """Of a call that is all of a CUDA graph."""
    return graph_seconds(calls, effort, 1)


def in_a_row_seconds(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """Of one of many calls in a CUDA graph."""
    return graph_seconds(calls, effort, LAYERS)


def graph_seconds(calls: dict[str, Callable[[], object]], effort: Effort, repetitions: int) -> dict[str, float]:
    graphs = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(repetitions):
                call()
    seconds = events_seconds({name: graph.replay for name, graph in graphs.items()}, effort)
    return {name: total / repetitions for name, total in seconds.items()}
