"""Pictures of what benchmarks/cpu.py and benchmarks/gpu.py measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = {"float32": "#0072b2", "bf16": "#d55e00", "fp16": "#009e73", "bf16 over e4m3": "#cc79a7"}
LINES: dict[str, dict[str, Any]] = {
    "MATE": {"linestyle": "-", "marker": "o", "markersize": 4},
    "SDPA": {"linestyle": ":", "marker": "s", "markersize": 4, "markerfacecolor": "white"},
}
CEILING: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "color": "black"}

# Text stays text, which keeps the files small, and equal figures give equal files.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "mate", "font.family": "sans-serif", "font.size": 10}


def draw_cpu(report: dict[str, Any], folder: Path) -> None:
    """One picture of each of the two groups, where it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        draw_group(report, "lengths", "length", "float32 matrix product", folder / "cpu_prefill.svg")
        draw_group(report, "contexts", "context", "reading memory", folder / "cpu_decode.svg")


GPU_LINES: dict[str, dict[str, Any]] = {
    "MATE": {"color": "#d55e00", "marker": "o", "markersize": 4},
    "FA3": {"color": "#0072b2", "marker": "s", "markersize": 4, "linestyle": ":"},
    "cuDNN": {"color": "#009e73", "marker": "^", "markersize": 4, "linestyle": "--"},
}


def draw_gpu(report: dict[str, Any], folder: Path) -> None:
    """Prefill against the length, for each head size and mask."""
    if "prefill" not in report["groups"]:
        print("no picture is drawn: the group prefill was not measured", file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = report["groups"]["prefill"]["rows"]
    sizes = list(dict.fromkeys(row["labels"]["head size"] for row in rows))
    masks = list(dict.fromkeys(row["labels"]["mask"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5), layout="constrained")
        grid = figure.subplots(len(masks), len(sizes), sharey=True, squeeze=False)
        for axes_of_mask, mask in zip(grid, masks):
            for axes, size in zip(axes_of_mask, sizes):
                own = [row for row in rows if row["labels"]["head size"] == size and row["labels"]["mask"] == mask]
                for name, line in GPU_LINES.items():
                    points = [(row["labels"]["length"], row["values"][name]) for row in own if name in row["values"]]
                    if points:
                        axes.plot(*zip(*sorted(points)), label=name, **line)
                finish(axes, sorted({row["labels"]["length"] for row in own}))
                axes.set(title=f"head size {size}, {mask}")
            axes_of_mask[0].set(ylabel=report["groups"]["prefill"]["unit"])
        for axes in grid[-1]:
            axes.set(xlabel="length")
        grid[0][-1].legend(loc="lower right")
        figure.savefig(folder / "gpu_prefill.svg", metadata={"Date": None})


def draw_group(report: dict[str, Any], name: str, across: str, ceiling: str, path: Path) -> None:
    if name not in report["groups"]:
        print(f"{path} is not drawn: the group {name} was not measured", file=sys.stderr)
        return
    group = report["groups"][name]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    types = list(dict.fromkeys(row["labels"]["type"] for row in group["rows"]))
    for dtype in types:
        for contender in LINES:
            points = [
                (row["labels"][across], row["values"][contender])
                for row in group["rows"]
                if row["labels"]["type"] == dtype and contender in row["values"]
            ]
            axes.plot(*zip(*sorted(points)), color=COLOURS[dtype], **LINES[contender])
    top = max(speed for key, speed in both_ends(report) if key.startswith(ceiling))
    axes.axhline(top, **CEILING)
    finish(axes, sorted({row["labels"][across] for row in group["rows"]}))
    axes.set(title=group["title"], xlabel=across, ylabel=group["unit"])
    handles = [Line2D([], [], color=COLOURS[dtype], label=dtype) for dtype in types]
    handles += [Line2D([], [], color="grey", label=contender, **line) for contender, line in LINES.items()]
    axes.legend(
        handles=[*handles, Line2D([], [], label=ceiling, **CEILING)], loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.savefig(path, metadata={"Date": None})


def both_ends(report: dict[str, Any]) -> list[tuple[str, float]]:
    return [item for at in ("start", "end") for item in report["ceilings"][at].items()]


def finish(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.grid(linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
