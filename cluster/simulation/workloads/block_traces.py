"""Traces of JSON lines in which prompts are told by hashes of their blocks.

Equal ids behind equal ids are equal blocks of a prompt, so that who replays such a trace has
its prefixes without its texts. A row without ids shares nothing. Some of these traces tell the
time in steps of seconds; requests of one step are spread over it at random, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cluster.simulation.workloads.fields import count_in, csv_rows, json_rows, number_in
from cluster.simulation.workloads.records import (
    Span,
    WorkloadError,
    WorkloadRequest,
    by_arrival,
)

MOONCAKE_BLOCK = 512
BAILIAN_BLOCK = 16
"""Tokens that an id stands for in the published traces."""
_JITTER = 10.0
"""Milliseconds by which times of one tick differ at most."""


def mooncake(
    lines: Iterable[str],
    name: str,
    seed: int,
    sessions: Mapping[int, tuple[str, int]],
    block: int = MOONCAKE_BLOCK,
) -> list[WorkloadRequest]:
    """A trace in Mooncake's form: timestamp (ms), input_length, output_length, hash_ids.

    Args:
        lines: The trace.
        name: What errors call it.
        seed: Of the spread.
        sessions: Session and turn of each row, from 0, as far as known.
        block: Tokens of a block.
    """
    rows = _rows(lines, name, block)
    times = [number_in(entry, "timestamp", where) for where, entry, _ in rows]
    unknown = ("", 0)
    known = (sessions.get(row, unknown) for row in range(len(rows)))
    return _requests(rows, _spread(times, seed), known)


def bailian(
    lines: Iterable[str], name: str, seed: int, block: int = BAILIAN_BLOCK
) -> list[WorkloadRequest]:
    """A trace of Alibaba's Bailian service (qwen-bailian-usagetraces-anon): timestamp (s),
    chat_id, parent_chat_id, input_length, output_length, hash_ids.

    A chat and those that go back to it are a session; one whose parent is not in the trace
    begins its own.
    """
    rows = _rows(lines, name, block)
    times = [1000.0 * number_in(entry, "timestamp", where) for where, entry, _ in rows]
    places: dict[Any, tuple[str, int]] = {}
    known: list[tuple[str, int]] = []
    for _, entry, _ in rows:
        chat = str(entry.get("chat_id", f"row {len(known)}"))
        session, turn = places.get(str(entry.get("parent_chat_id", -1)), (chat, -1))
        places[chat] = session, turn + 1
        known.append(places[chat])
    return _requests(rows, _spread(times, seed), known)


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


_Row = tuple[str, Mapping[str, Any], tuple[Span, ...]]
"""Where it stands, what is there, and its prompt."""


def _rows(lines: Iterable[str], name: str, block: int) -> list[_Row]:
    blocks: dict[str, Span] = {}  # one object each: prompts have thousands of small ones
    rows: list[_Row] = []
    for number, entry in json_rows(lines, name):
        where = f"{name}:{number}"
        length = count_in(entry, "input_length", where)
        ids = entry.get("hash_ids", [])
        most = -(-length // block)
        if not isinstance(ids, list) or (ids and not length // block <= len(ids) <= most):
            raise WorkloadError(
                f"{where}: hash_ids: {most} ids are wanted for {length} tokens in blocks of "
                f"{block}; block=TOKENS says how long a block is"
            )
        spans = [blocks.setdefault(f"m{one}", Span(f"m{one}", block)) for one in ids]
        rest = length - block * len(ids)
        if rest < 0:
            spans[-1] = spans[-1]._replace(length=block + rest)
        elif rest > 0:
            spans.append(Span(f"row {number}", rest))
        rows.append((where, entry, tuple(spans)))
    return rows


def _requests(
    rows: Iterable[_Row], arrivals: Iterable[float], places: Iterable[tuple[str, int]]
) -> list[WorkloadRequest]:
    return by_arrival(
        WorkloadRequest(
            arrival,
            prompt,
            count_in(entry, "output_length", where),
            session=session,
            turn=turn,
        )
        for (where, entry, prompt), arrival, (session, turn) in zip(
            rows, arrivals, places, strict=True
        )
    )


def _spread(milliseconds: list[float], seed: int) -> list[float]:
    """Seconds from the first; where the clock ticked in seconds, a tick's requests are spread
    over it."""
    times = np.array(milliseconds) - min(milliseconds, default=0.0)
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
