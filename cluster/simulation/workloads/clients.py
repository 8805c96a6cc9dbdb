"""Workloads from statistics of clients, as ServeGen publishes them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.simulation.workloads.arrivals import renewal_until, weibull_until
from cluster.simulation.workloads.fields import number_in
from cluster.simulation.workloads.lengths import Lengths, weighted
from cluster.simulation.workloads.records import Span, WorkloadError, WorkloadRequest, by_arrival

_TRACE = re.compile(r"chunk-(\w+)-trace\.csv$")
_PAIR = re.compile(r"([\d.]+)\s*:\s*([\d.eE+-]+)")


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a client's day.

    Attributes:
        start, end: Seconds.
        rate: Requests per second; 0 for none.
        cv: Coefficient of variation of the intervals.
        law: "Gamma", "Weibull", or "" where none was fitted.
        shape, scale: Parameters of the law.
    """

    start: float
    end: float
    rate: float
    cv: float
    law: str
    shape: float
    scale: float


@dataclass(frozen=True, slots=True)
class Client:
    """One client: when it asks, and lengths (prompt, output) by the second they hold from."""

    name: str
    windows: tuple[Window, ...]
    lengths: tuple[tuple[float, Lengths, Lengths], ...]


def read_clients(files: Mapping[str, str], name: str) -> list[Client]:
    """Clients of a ServeGen pool.

    Args:
        files: Text by path: chunk-N-trace.csv and chunk-N-dataset.json of each client.
        name: What errors call the pool.
    """
    found = []
    for path in sorted(files):
        match = _TRACE.search(path)
        if match is None:
            continue
        other = path[: match.start()] + f"chunk-{match[1]}-dataset.json"
        if other not in files:
            raise WorkloadError(f"{name}: {path} has no {other}")
        found.append(
            Client(
                f"client-{match[1]}",
                _windows(files[path], f"{name}/{path}"),
                _lengths(files[other], f"{name}/{other}"),
            )
        )
    if not found:
        raise WorkloadError(f"{name}: no chunk-N-trace.csv")
    return found


def _windows(text: str, name: str) -> tuple[Window, ...]:
    rows = []
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        if len(row) != 6:
            raise WorkloadError(f"{name}:{number}: six columns are wanted, not {len(row)}")
        where = f"{name}:{number}"
        keys = ("start", "rate", "cv", "law", "shape", "scale")
        entry = dict(zip(keys, row, strict=True))
        start, rate, cv, shape, scale = (
            number_in(entry, key, where) for key in keys if key != "law"
        )
        if entry["law"] not in ("Gamma", "Weibull", ""):
            raise WorkloadError(f"{where}: law: {entry['law']!r} is neither Gamma nor Weibull")
        rows.append((start, rate, cv, entry["law"], shape, scale))
    starts = [row[0] for row in rows]
    width = starts[1] - starts[0] if len(starts) > 1 else 600.0
    ends = [*starts[1:], *([starts[-1] + width] if starts else [])]
    return tuple(
        Window(row[0], end, row[1], row[2], row[3], row[4], row[5])
        for row, end in zip(rows, ends, strict=True)
    )


def _lengths(text: str, name: str) -> tuple[tuple[float, Lengths, Lengths], ...]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise WorkloadError(f"{name}: not JSON: {error}") from None
    found = []
    for start, tables in entries.items():
        pairs = [_PAIR.findall(str(tables.get(key))) for key in ("input_tokens", "output_tokens")]
        if all(pairs):
            prompt, output = (
                weighted(
                    [int(float(value)) for value, _ in one], [float(share) for _, share in one]
                )
                for one in pairs
            )
            found.append((float(start), prompt, output))
    return tuple(sorted(found, key=lambda entry: entry[0]))


def client_requests(
    seed: int, clients: list[Client], start: float, duration: float, factor: float = 1.0
) -> list[WorkloadRequest]:
    """Draw requests of ``duration`` seconds from second ``start`` of the day.

    Arrivals are renewal processes of each client's fitted law, window by window; prompt and
    output lengths are drawn independently. Each client is a tenant.

    Args:
        seed: Of all draws.
        clients: The pool.
        start: Second of the day; becomes second 0.
        duration: Seconds.
        factor: Multiplies every client's rate.
    """
    made: list[WorkloadRequest] = []
    for number, client in enumerate(clients):
        rng = np.random.default_rng([seed, number])
        for window in client.windows:
            begin, end = max(start, window.start), min(start + duration, window.end)
            tables = [entry for entry in client.lengths if entry[0] <= window.start]
            if begin >= end or window.rate <= 0 or not tables:
                continue
            seconds = end - begin
            if window.law == "Weibull" and window.scale > 0:
                times = weibull_until(rng, window.shape, window.scale / factor, seconds)
            else:
                cv = window.cv if window.cv > 0 else 1.0
                times = renewal_until(rng, window.rate * factor, cv, seconds)
            _, prompt, output = tables[-1]
            drawn = zip(
                (times + (begin - start)).tolist(),
                prompt(rng, len(times)).tolist(),
                output(rng, len(times)).tolist(),
                strict=True,
            )
            for arrival, prompt_tokens, output_tokens in drawn:
                span = Span(f"{client.name}/{len(made)}", prompt_tokens)
                made.append(WorkloadRequest(arrival, (span,), output_tokens, client.name))
    return by_arrival(made)
