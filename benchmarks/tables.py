"""What the benchmark programs have in common: options, running the groups, tables, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import QUICK, THOROUGH, VALUES, Effort, Group, Row, group_table, mean_ratios, run
from tqdm import tqdm

QUICK_CASES = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    groups: Sequence[Group]
    effort: Effort
    json: Path | None
    pictures: Path | None


def parse_options(parser: argparse.ArgumentParser, everything: Sequence[Group]) -> tuple[Options, argparse.Namespace]:
    """Adds the options of every benchmark program to `parser`, and reads the command line."""
    names = [group.name for group in everything]
    parser.epilog = f"Groups: {' '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="GROUP", help="measure these groups")
    parser.add_argument("--quick", action="store_true", help="two small rows of each group, in short rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw what was measured into this folder")
    arguments = parser.parse_args()
    chosen = [group for group in everything if group.name in arguments.only]
    if arguments.quick:
        chosen = [small_cases(group) for group in chosen]
    effort = QUICK if arguments.quick else THOROUGH
    return Options(chosen, effort, arguments.json, arguments.pictures), arguments


def small_cases(group: Group) -> Group:
    """Those with the least work, for a run that only shows that all is well."""
    return dataclasses.replace(group, cases=sorted(group.cases, key=lambda case: case.work)[:QUICK_CASES])


def measured(chosen: Sequence[Group], effort: Effort) -> dict[str, list[Row]]:
    """Measures the groups, and prints each as soon as it is done."""
    rows: dict[str, list[Row]] = {}
    with tqdm(total=sum(len(group.cases) for group in chosen), file=sys.stderr, unit="case") as bar:
        for group in chosen:
            bar.set_description(group.name)
            rows[group.name] = []
            for case in group.cases:
                rows[group.name].append(run(case, effort, group.timing))
                bar.update()
            tqdm.write(group_table(group, rows[group.name]), file=sys.stdout, end="\n\n")
            sys.stdout.flush()
    return rows


def group_figures(group: Group, rows: Sequence[Row]) -> dict[str, Any]:
    value = VALUES[group.unit]
    return {
        "title": group.title,
        "unit": group.unit,
        "mean_ratios": mean_ratios(rows),
        "rows": [
            {
                **dataclasses.asdict(row),
                "values": {name: value(row.work, seconds) for name, seconds in row.seconds.items()},
            }
            for row in rows
        ],
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
