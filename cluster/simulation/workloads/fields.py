"""Fields of recorded traces, checked as they are read."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cluster.simulation.workloads.records import WorkloadError

_SHOWN = 200
"""Characters of a wrong head that an error shows."""


def csv_rows(
    lines: Iterable[str], name: str, wanted: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a head, each with "name:line" for errors."""
    reader = csv.DictReader(lines, restkey="", restval="")
    head = reader.fieldnames
    if head is None:
        raise WorkloadError(f"{name}: empty")
    if missing := [column for column in wanted if column not in head]:
        shown = ", ".join(head)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise WorkloadError(f"{name}: no column {', '.join(missing)}; there are {shown}")
    for row in reader:
        yield f"{name}:{reader.line_num}", row


def json_rows(lines: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, each with the number of its line; empty ones are passed over."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{name}:{number}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise WorkloadError(f"{name}:{number}: not a JSON object")
        yield number, entry


def number_in(entry: Mapping[str, Any], key: str, where: str, least: float = 0.0) -> float:
    """A finite number of at least ``least``; raises WorkloadError."""
    value = entry.get(key)
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise WorkloadError(f"{where}: {key}: a number is wanted, not {value!r}") from None
    if isinstance(value, bool) or not math.isfinite(found) or found < least:
        raise WorkloadError(f"{where}: {key}: {value!r} is not a number of at least {least:g}")
    return found


def count_in(entry: Mapping[str, Any], key: str, where: str, least: int = 1) -> int:
    """A whole number of at least ``least``; raises WorkloadError."""
    found = number_in(entry, key, where, least)
    if found != int(found):
        raise WorkloadError(f"{where}: {key}: {entry[key]!r} is not a whole number")
    return int(found)
