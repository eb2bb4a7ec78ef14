"""How the benchmarks measure: contenders of one case take turns in one process, and the best of their rounds counts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Enough for a wrong mask or a wrong key to show, whatever the type; how exact MATE is, the tests say.
MOST_DIFFERENCE = 0.05


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a measurement may take; `round_s` is the least time that a contender repeats its call in each round."""

    round_s: float
    rounds: int
    case_s: float  # no further round starts after this


THOROUGH = Effort(round_s=0.05, rounds=5, case_s=5)
QUICK = Effort(round_s=0.005, rounds=2, case_s=0.2)


# Takes the calls of a case by name, and gives the seconds of each.
Timing = Callable[[dict[str, Callable[[], object]], Effort], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case. `comparable` brings what `call` returns into the layout in which all are compared."""

    name: str
    call: Callable[[], Any]
    comparable: Callable[[Any], torch.Tensor] = lambda out: out
    peer: bool = False
    limit: bool = False  # does less than the case asks for: what the machine would allow


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of a table. `work` is the floating-point operations or bytes of one call, as the unit of its group has it.

    `contenders` makes the tensors, so that only those of the case that is running are in memory.
    """

    labels: dict[str, object]
    work: float
    contenders: Callable[[], list[Contender]]
    threads: int | None = None  # None: as many as PyTorch takes


@dataclasses.dataclass(frozen=True)
class Group:
    """A table: cases that have their labels and contenders in common."""

    name: str
    title: str
    unit: str  # one of VALUES
    cases: Sequence[Case]
    note: str = ""
    timing: Timing | None = None  # None: best_seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """A case as it was measured: the seconds of a call of each contender."""

    labels: dict[str, object]
    work: float
    seconds: dict[str, float]
    ratio: float | None  # how many times faster the first contender is than its best peer


VALUES: dict[str, Callable[[float, float], float]] = {  # of work and seconds
    "TFLOP/s": lambda work, seconds: work / seconds / 1e12,
    "GFLOP/s": lambda work, seconds: work / seconds / 1e9,
    "GB/s": lambda work, seconds: work / seconds / 1e9,
    "µs": lambda work, seconds: seconds * 1e6,
}


def run(case: Case, effort: Effort, timing: Timing | None = None) -> Row:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads_before)
    try:
        contenders = case.contenders()
        check_agreement(case, contenders)
        seconds = (timing or best_seconds)({contender.name: contender.call for contender in contenders}, effort)
    finally:
        torch.set_num_threads(threads_before)
    peers = [seconds[contender.name] for contender in contenders if contender.peer]
    ratio = min(peers) / seconds[contenders[0].name] if peers else None
    return Row(case.labels, case.work, seconds, ratio)


def check_agreement(case: Case, contenders: Sequence[Contender]) -> None:
    """A figure of something else than was asked for would be worth nothing, so all contenders must agree."""
    first, *others = (contender for contender in contenders if not contender.limit)
    expected = first.comparable(first.call()).float()
    for other in others:
        difference = (other.comparable(other.call()).float() - expected).norm() / expected.norm()
        if not difference <= MOST_DIFFERENCE:  # NaN fails too
            raise RuntimeError(f"{first.name} and {other.name} differ by {difference:.2g} at {case.labels}")


def best_seconds(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """The least seconds of each call; they take turns, so that what else the machine does meets all alike."""
    started = time.perf_counter()
    repetitions = {name: repetitions_for(call, effort.round_s) for name, call in calls.items()}
    best = dict.fromkeys(calls, math.inf)
    for _ in range(effort.rounds):
        for name, call in calls.items():
            best[name] = min(best[name], seconds_of(call, repetitions[name]) / repetitions[name])
        if time.perf_counter() - started > effort.case_s:
            break
    return best


def repetitions_for(call: Callable[[], object], least_s: float) -> int:
    """How often to call so that it takes at least `least_s`; finding out warms the caches and the threads too."""
    repetitions = 1
    while (elapsed := seconds_of(call, repetitions)) < least_s:
        growth = 1.2 * least_s / elapsed
        repetitions = math.ceil(repetitions * min(max(growth, 1.2), 10))
    return repetitions


def seconds_of(call: Callable[[], object], repetitions: int) -> float:
    started = time.perf_counter()
    for _ in range(repetitions):
        call()
    return time.perf_counter() - started


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """The geometric mean of the ratios of each type."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            ratios.setdefault(str(row.labels["type"]), []).append(row.ratio)
    return {dtype: geometric_mean(values) for dtype, values in ratios.items()}


def figure(value: float | None) -> str:
    """Three digits of a number, `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def group_table(group: Group, rows: Sequence[Row]) -> str:
    """The Markdown of a group: its table, the mean ratios and the note."""
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    peers_at_all = any(row.ratio is not None for row in rows)
    header = [*rows[0].labels, *names, *(["ratio"] if peers_at_all else [])]
    value = VALUES[group.unit]
    cells = [
        [
            *row.labels.values(),
            *(figure(value(row.work, row.seconds[name]) if name in row.seconds else None) for name in names),
            *([figure(row.ratio)] if peers_at_all else []),
        ]
        for row in rows
    ]
    means = ", ".join(f"{dtype} {figure(mean)}" for dtype, mean in mean_ratios(rows).items())
    parts = [
        f"### {group.title}, {group.unit}",
        markdown_table(header, cells),
        f"Geometric mean of the ratios: {means}." if means else "",
        group.note,
    ]
    return "\n\n".join(part for part in parts if part)
