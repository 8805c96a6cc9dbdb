"""Drover's own form of a workload: JSON lines, one request each, in order of arrival.

Keys are those of ``WorkloadRequest``; ``prompt`` is a list of [stream, length] and, for an
earlier turn's output, {"turn": n, "length": m}. ``prompt_tokens`` stands for a prompt with
nothing in common with others. Keys that have their default may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.simulation.workloads.fields import count_in, json_rows, number_in
from cluster.simulation.workloads.records import Span, WorkloadError, WorkloadRequest, by_arrival
from instance.request import RequestClass

_KEYS = {
    *("arrival", "prompt", "prompt_tokens", "output_tokens", "tenant", "class", "group"),
    *("session", "turn", "think"),
}


def write(requests: Iterable[WorkloadRequest]) -> Iterator[str]:
    """Lines, without line breaks."""
    for request in requests:
        entry: dict[str, Any] = {
            "arrival": request.arrival,
            "prompt": [
                [span.stream, span.length]
                if span.turn < 0
                else {"turn": span.turn, "length": span.length}
                for span in request.prompt
            ],
            "output_tokens": request.output_tokens,
            "tenant": request.tenant,
            "class": request.request_class.name.lower(),
        }
        if request.group:
            entry["group"] = request.group
        if request.session:
            entry |= {"session": request.session, "turn": request.turn}
        if request.think is not None:
            entry["think"] = request.think
        yield json.dumps(entry)


def read(lines: Iterable[str], name: str) -> list[WorkloadRequest]:
    """What ``write`` wrote, or somebody by hand.

    Raises:
        WorkloadError: naming the line and what is wrong there.
    """
    made, turns = [], set()
    for number, entry in json_rows(lines, name):
        request = _request(entry, f"{name}:{number}", number)
        turns.add((request.session, request.turn))
        if request.think is not None and (request.session, request.turn - 1) not in turns:
            raise WorkloadError(f"{name}:{number}: think: the turn before is not there yet")
        made.append(request)
    return by_arrival(made)


def _request(entry: dict[str, Any], where: str, number: int) -> WorkloadRequest:
    if unknown := entry.keys() - _KEYS:
        raise WorkloadError(f"{where}: unknown key {', '.join(sorted(unknown))}")
    texts = {key: entry.get(key, "") for key in ("tenant", "class", "group", "session")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise WorkloadError(f"{where}: {key}: a string is wanted, not {value!r}")
    name = (texts["class"] or "standard").upper()
    if name not in RequestClass.__members__:
        raise WorkloadError(f"{where}: class: {texts['class']!r} is no class")
    if ("prompt" in entry) == ("prompt_tokens" in entry):
        raise WorkloadError(f"{where}: either prompt or prompt_tokens is wanted")
    if "prompt" in entry:
        prompt = _prompt(entry["prompt"], where)
    else:
        prompt = (Span(f"line {number}", count_in(entry, "prompt_tokens", where)),)
    session = texts["session"]
    if not session and (entry.get("think") is not None or any(span.turn >= 0 for span in prompt)):
        raise WorkloadError(f"{where}: session: think and earlier turns need one")
    return WorkloadRequest(
        arrival=number_in(entry, "arrival", where),
        prompt=prompt,
        output_tokens=count_in(entry, "output_tokens", where),
        tenant=texts["tenant"] or "default",
        request_class=RequestClass[name],
        group=texts["group"],
        session=session,
        turn=count_in(entry, "turn", where, least=0) if "turn" in entry else 0,
        think=None if entry.get("think") is None else number_in(entry, "think", where),
    )


def _prompt(value: Any, where: str) -> tuple[Span, ...]:
    if not isinstance(value, list) or not value:
        raise WorkloadError(f"{where}: prompt: a list of pieces is wanted")
    spans = []
    for index, piece in enumerate(value):
        place = f"{where}: prompt[{index}]"
        if isinstance(piece, dict) and piece.keys() == {"turn", "length"}:
            turn = count_in(piece, "turn", place, least=0)
            spans.append(Span("", count_in(piece, "length", place), turn))
        elif isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str):
            length = count_in({"length": piece[1]}, "length", place)
            spans.append(Span(piece[0], length))
        else:
            raise WorkloadError(f'{place}: [stream, length] or {{"turn", "length"}} is wanted')
    return tuple(spans)
