"""Readers of recorded traces: each turns lines of text into requests.

A reader takes the lines and the name that its errors call them by; it opens nothing.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.simulation.workloads.generators import Conversation, single_requests
from cluster.simulation.workloads.records import (
    Span,
    WorkloadError,
    WorkloadRequest,
    by_arrival,
)

MOONCAKE_BLOCK = 512
"""Tokens that one of Mooncake's hash ids stands for."""
_JITTER = 10.0
"""Milliseconds by which times of one tick differ at most."""


def mooncake(
    lines: Iterable[str], name: str, seed: int, sessions: Mapping[int, tuple[str, int]]
) -> list[WorkloadRequest]:
    """A Mooncake trace: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

    Equal ids, each chained over those before it, are equal blocks of 512 prompt tokens. Some
    of these traces tell the time in steps of seconds; requests of one step are spread over
    it at random, in their order.

    Args:
        lines: The trace.
        name: What errors call it.
        seed: Of the spread.
        sessions: Session and turn of each row, from 0, as far as known.
    """
    rows, times = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{where}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise WorkloadError(f"{where}: not a JSON object")
        time = number_in(entry, "timestamp", where)
        length = count_in(entry, "input_length", where)
        output = count_in(entry, "output_length", where)
        ids = entry.get("hash_ids")
        if not isinstance(ids, list) or len(ids) != -(-length // MOONCAKE_BLOCK):
            raise WorkloadError(
                f"{where}: hash_ids: {-(-length // MOONCAKE_BLOCK)} ids are wanted for "
                f"{length} tokens"
            )
        spans = [Span(f"m{one}", MOONCAKE_BLOCK) for one in ids]
        spans[-1] = spans[-1]._replace(length=length - MOONCAKE_BLOCK * (len(ids) - 1))
        rows.append((tuple(spans), output))
        times.append(time)
    arrivals = _spread(times, seed)
    made = []
    for row, ((prompt, output), arrival) in enumerate(zip(rows, arrivals, strict=True)):
        session, turn = sessions.get(row, ("", 0))
        made.append(WorkloadRequest(arrival, prompt, output, session=session, turn=turn))
    return by_arrival(made)


def _spread(milliseconds: list[float], seed: int) -> list[float]:
    """Seconds; where the clock ticked in seconds, a tick's requests are spread over it."""
    times = np.array(milliseconds)
    order = np.argsort(times, kind="stable")
    gaps = np.diff(times[order], prepend=-np.inf)
    starts = times[order][gaps > _JITTER]
    tick = float(np.median(np.diff(starts))) if len(starts) > 1 else 0.0
    if tick >= 1000.0 and len(times) >= 2 * len(starts):
        rng = np.random.default_rng([seed, 0x71C45])
        begun = np.searchsorted(starts, times[order], side="right") - 1
        room = np.minimum(np.diff(starts, append=starts[-1] + tick), tick)
        # Sorting keeps a tick's requests in their order, and ticks apart.
        times[order] = np.sort(starts[begun] + rng.random(len(times)) * room[begun])
    seconds: list[float] = (times / 1000.0).tolist()
    return seconds


def mooncake_sessions(lines: Iterable[str], name: str) -> dict[int, tuple[str, int]]:
    """Sessions inferred for a Mooncake trace: CSV of row, inferred_session, inferred_turn
    (from 1)."""
    wanted = ("row", "inferred_session", "inferred_turn")
    return {
        int(count_in(row, "row", where, least=0)): (
            row["inferred_session"],
            count_in(row, "inferred_turn", where) - 1,
        )
        for where, row in csv_rows(lines, name, wanted)
    }


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


def rounds(lines: Iterable[str], name: str) -> list[Conversation]:
    """Conversations of a CSV table of their rounds, in order: conversation, turn,
    num_prefill_tokens (the whole history and the message), num_decode_tokens."""
    wanted = ("conversation", "turn", "num_prefill_tokens", "num_decode_tokens")
    dialogues: dict[str, list[tuple[int, int]]] = {}
    said: dict[str, int] = {}
    last: dict[str, int] = {}
    for where, row in csv_rows(lines, name, wanted):
        key = row["conversation"]
        turns = dialogues.setdefault(key, [])
        number = count_in(row, "turn", where, least=0)
        if turns and number != last[key] + 1:
            raise WorkloadError(f"{where}: turn: {last[key] + 1} is wanted, not {number}")
        last[key] = number
        whole = count_in(row, "num_prefill_tokens", where)
        answer = max(1, count_in(row, "num_decode_tokens", where, least=0))
        message = whole - said.get(key, 0)
        if message < 0:
            raise WorkloadError(f"{where}: num_prefill_tokens: less than was said before")
        turns.append((max(1, message), answer))
        said[key] = whole + answer
    if not dialogues:
        raise WorkloadError(f"{name}: no conversation")
    return list(dialogues.values())


# ---- fields


def csv_rows(
    lines: Iterable[str], name: str, wanted: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a head, each with "name:line" for errors."""
    reader = csv.DictReader(lines, restkey="", restval="")
    head = reader.fieldnames
    if head is None:
        raise WorkloadError(f"{name}: empty")
    if missing := [column for column in wanted if column not in head]:
        raise WorkloadError(f"{name}: no column {', '.join(missing)}; there are {', '.join(head)}")
    for row in reader:
        yield f"{name}:{reader.line_num}", row


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
