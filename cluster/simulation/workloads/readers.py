"""CSV traces of single requests, and tables of lengths: lines of text turned into requests.

A reader takes the lines and the name that its errors call them by; it opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cluster.simulation.workloads.fields import count_in, csv_rows
from cluster.simulation.workloads.generators import single_requests
from cluster.simulation.workloads.records import WorkloadError, WorkloadRequest, by_arrival


@dataclass(frozen=True, slots=True)
class TraceColumns:
    """Columns of a CSV trace of single requests; "" for one that it does not have.

    Attributes:
        arrival: Seconds, or dates; their first is the start.
        prompt: Prompt tokens.
        output: Output tokens; rows with 0, which failed, are left out.
        tenant: Who asked.
    """

    arrival: str
    prompt: str
    output: str
    tenant: str = ""


TRACES: dict[str, TraceColumns] = {
    "azure": TraceColumns("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": TraceColumns("Timestamp", "Request tokens", "Response tokens", "Model"),
    "vtc": TraceColumns("req_time", "prompt_len", "output_len", "adapter_dir"),
    "servegen": TraceColumns("timestamp_s", "input_length", "output_length", "client_id"),
}
"""The public traces of this form. (Azure's LLM inference traces; BurstGPT; the arena trace of
the VTC artifact; requests drawn from ServeGen's clients.)"""


def trace(lines: Iterable[str], name: str, columns: TraceColumns) -> list[WorkloadRequest]:
    """A CSV trace of single requests."""
    wanted = tuple(filter(None, (columns.arrival, columns.prompt, columns.output, columns.tenant)))
    times, prompts, outputs, tenants = [], [], [], []
    for where, row in csv_rows(lines, name, wanted):
        output = count_in(row, columns.output, where, least=0)
        prompt = count_in(row, columns.prompt, where, least=0)
        if output == 0 or prompt == 0:
            continue
        times.append(_seconds(row[columns.arrival], columns.arrival, where))
        prompts.append(prompt)
        outputs.append(output)
        tenants.append(row[columns.tenant] if columns.tenant else "default")
    if not times:
        raise WorkloadError(f"{name}: no request")
    first = min(times)
    arrivals = [time - first for time in times]
    return by_arrival(single_requests(arrivals, prompts, outputs, tenants))


def _seconds(text: str, column: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        # numpy reads all nine digits of a second's fraction.
        return int(np.datetime64(text.strip(), "ns").astype(np.int64)) / 1e9
    except ValueError:
        raise WorkloadError(f"{where}: {column}: {text!r} is neither seconds nor a date") from None


LENGTH_COLUMNS = (
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("input_length", "output_length"),
)
"""Columns of prompt and output lengths, in the tables that have no times."""


def lengths(lines: Iterable[str], name: str) -> list[tuple[int, int]]:
    """Prompt and output tokens of each row of a CSV table without times."""
    found: list[tuple[int, int]] = []
    columns: tuple[str, str] | None = None
    for where, row in csv_rows(lines, name, ()):
        if columns is None:
            columns = next((pair for pair in LENGTH_COLUMNS if set(pair) <= set(row)), None)
            if columns is None:
                pairs = " or ".join(f"{a}, {b}" for a, b in LENGTH_COLUMNS)
                raise WorkloadError(f"{name}: no columns {pairs}")
        prompt, output = (count_in(row, column, where, least=0) for column in columns)
        if prompt and output:
            found.append((prompt, output))
    if not found:
        raise WorkloadError(f"{name}: no lengths")
    return found
