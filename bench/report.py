"""What every bench shares: its arguments, a table for people, one JSON, a verdict."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that must hold: ``measured`` at most (or at least) ``bound``."""

    name: str
    measured: float
    bound: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        verdict = "ok" if self.holds else "short"
        return f"{self.name}: {self.measured:.3g} (target {sign} {self.bound:g}) {verdict}"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every bench has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a smaller run, within 60 s on 2 cores")
    made.add_argument("--json", type=Path, help="also write the result to this file")
    return made


def percentile(values: Sequence[float], share: float) -> float:
    """Linear-interpolation percentile, ``share`` in [0, 100]; nan for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Iterable[float]) -> float:
    """The median; nan for no values."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns padded to their widest cell; floats with three significant digits."""
    cells = [list(head)] + [
        [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def finish(result: dict[str, Any], targets: Sequence[Target], path: Path | None) -> int:
    """Print the JSON and, as the last line, the targets; returns the exit status."""
    result["machine"] = machine()
    result["targets"] = [
        {
            "name": target.name,
            "measured": target.measured,
            "bound": target.bound,
            "at_most": target.at_most,
            "holds": target.holds,
        }
        for target in targets
    ]
    text = json.dumps(result, indent=1)
    if path is not None:
        path.write_text(text + "\n")
    print(json.dumps(result))
    print("; ".join(str(target) for target in targets), flush=True)
    sys.stdout.flush()
    return 0 if all(target.holds for target in targets) else 1
