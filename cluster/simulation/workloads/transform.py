"""Workloads made from workloads: other lengths, rates, parts, classes and tenants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from cluster.simulation.workloads.arrivals import renewal
from cluster.simulation.workloads.records import (
    Span,
    WorkloadError,
    WorkloadRequest,
    by_arrival,
)
from instance.request import RequestClass


def scale_lengths(
    requests: Iterable[WorkloadRequest], prompt: float, output: float
) -> list[WorkloadRequest]:
    """Multiply prompt and output lengths; what was shared stays shared.

    Pieces of a prompt are rounded one by one, to at least one token; a piece that is an
    earlier turn's output gets the length which that output gets.
    """

    def scaled(span: Span) -> Span:
        return span._replace(length=_scaled(span.length, prompt if span.turn < 0 else output))

    return [
        dataclasses.replace(
            request,
            prompt=tuple(map(scaled, request.prompt)),
            output_tokens=_scaled(request.output_tokens, output),
        )
        for request in requests
    ]


def _scaled(length: int, factor: float) -> int:
    return max(1, round(length * factor))


def longest(requests: Iterable[WorkloadRequest]) -> int:
    """Prompt and output tokens of the longest request; 0 if there is none."""
    return max((one.prompt_tokens + one.output_tokens for one in requests), default=0)


def fit(requests: Sequence[WorkloadRequest], max_model_len: int, how: str) -> list[WorkloadRequest]:
    """Make every request fit a model's length.

    Args:
        requests: In order of arrival.
        max_model_len: Prompt and output tokens at most, at least 2.
        how: "scale" shrinks all lengths by one factor until the longest fits; "drop" leaves
            out what is too long; "cut" shortens the end of the prompt, and the output where
            that alone is too long; what is quoted of earlier answers goes whole. A session
            ends before its first turn that "drop" leaves out, and with its first one that
            "cut" shortens.

    Raises:
        WorkloadError: for another ``how``.
    """
    if how == "scale":
        return _shrink(requests, max_model_len)
    if how not in ("drop", "cut"):
        raise WorkloadError(f"fit: {how!r} is not one of scale, drop, cut")
    kept, ended = [], set()
    for request in requests:
        if request.session and request.session in ended:
            continue
        if request.prompt_tokens + request.output_tokens > max_model_len:
            ended.add(request.session)
            if how == "drop":
                continue
            request = _cut(request, max_model_len)
        kept.append(request)
    return _with_predecessors(kept)


def _shrink(requests: Sequence[WorkloadRequest], max_model_len: int) -> list[WorkloadRequest]:
    shrunk = list(requests)
    factor = 1.0
    # Rounding up to one token keeps many short pieces longer than their share.
    while (length := longest(shrunk)) > max_model_len:
        pieces = max(len(one.prompt) for one in requests) + 1
        if pieces > max_model_len:
            raise WorkloadError(f"prompts of {pieces - 1} pieces cannot shrink to {max_model_len}")
        factor *= 0.999 * max_model_len / length
        shrunk = scale_lengths(requests, factor, factor)
    return shrunk


def _cut(request: WorkloadRequest, max_model_len: int) -> WorkloadRequest:
    output = min(request.output_tokens, max_model_len - 1)
    room = max_model_len - output
    prompt: list[Span] = []
    for span in request.prompt:
        # An earlier answer is quoted whole or not at all.
        if room <= 0 or (prompt and span.turn >= 0 and span.length > room):
            break
        prompt.append(span._replace(length=min(span.length, room)))
        room -= span.length
    return dataclasses.replace(request, prompt=tuple(prompt), output_tokens=output)


def mean_rate(requests: Sequence[WorkloadRequest]) -> float:
    """Requests per second, of those that do not wait for an earlier turn.

    Raises:
        WorkloadError: if there are fewer than two, or all come at once.
    """
    arrivals = [request.arrival for request in requests if request.think is None]
    if len(arrivals) < 2 or max(arrivals) == min(arrivals):
        raise WorkloadError("a rate needs two requests that come at different times")
    return (len(arrivals) - 1) / (max(arrivals) - min(arrivals))


def with_arrivals(
    requests: Sequence[WorkloadRequest], arrivals: Iterable[float]
) -> list[WorkloadRequest]:
    """Let requests come at other times, in their order. People think as long as before.

    Args:
        requests: In order of arrival.
        arrivals: One for each request that does not wait for an earlier turn.
    """
    times = iter(arrivals)
    moved: dict[tuple[str, int], float] = {}
    result = []
    for request in requests:
        if request.think is None:
            arrival = next(times)
        else:
            arrival = moved[request.session, request.turn - 1] + request.think
        if request.session:
            moved[request.session, request.turn] = arrival
        result.append(dataclasses.replace(request, arrival=arrival))
    return by_arrival(result)


def speed_up(requests: Sequence[WorkloadRequest], factor: float) -> list[WorkloadRequest]:
    """Let requests come ``factor`` times as fast. People think as long as before."""
    return with_arrivals(requests, (one.arrival / factor for one in requests if one.think is None))


def drawn_anew(
    requests: Sequence[WorkloadRequest], rate: float, cv: float, seed: int
) -> list[WorkloadRequest]:
    """Let requests come by a law, in place of their own times; see ``renewal``."""
    rng = np.random.default_rng([seed, 0xA44178])
    count = sum(1 for one in requests if one.think is None)
    return with_arrivals(requests, renewal(rng, rate, cv, count).tolist())


def at_rate(requests: Sequence[WorkloadRequest], rate: float) -> list[WorkloadRequest]:
    """Speed a workload up, or slow it down, to ``rate`` as ``mean_rate`` counts it; at infinity
    all come at once."""
    return speed_up(requests, rate / mean_rate(requests) if math.isfinite(rate) else rate)


def window(
    requests: Iterable[WorkloadRequest],
    start: float = 0.0,
    duration: float | None = None,
    limit: int | None = None,
) -> list[WorkloadRequest]:
    """What comes in the ``duration`` seconds from ``start``, the first ``limit`` of it; time
    then begins at ``start``. A turn whose previous one is left out is left out too."""
    kept = [
        dataclasses.replace(request, arrival=request.arrival - start)
        for request in requests
        if request.arrival >= start and (duration is None or request.arrival < start + duration)
    ]
    return _with_predecessors(kept if limit is None else kept[:limit])


def _with_predecessors(requests: Iterable[WorkloadRequest]) -> list[WorkloadRequest]:
    there: set[tuple[str, int]] = set()
    kept = []
    for request in requests:
        if request.think is None or (request.session, request.turn - 1) in there:
            kept.append(request)
            if request.session:
                there.add((request.session, request.turn))
    return kept


def with_class(
    requests: Iterable[WorkloadRequest],
    share: float,
    request_class: RequestClass,
    group: str,
    seed: int,
) -> list[WorkloadRequest]:
    """Put a random share of requests, or of whole sessions, into a class and a group."""
    chance = np.random.default_rng([seed, 0xC1A55])
    chosen: dict[str, bool] = {}
    result = []
    for request in requests:
        drawn = bool(chance.random() < share)
        if request.session:
            drawn = chosen.setdefault(request.session, drawn)
        if drawn:
            request = dataclasses.replace(request, request_class=request_class, group=group)
        result.append(request)
    return result


def with_tenants(
    requests: Iterable[WorkloadRequest], count: int, skew: float, seed: int
) -> list[WorkloadRequest]:
    """Deal requests, or whole sessions, out to ``count`` tenants.

    Tenant n, from 1 on, gets a share proportional to n**-skew: 0 deals evenly.
    """
    chance = np.random.default_rng([seed, 0x7E4A47])
    shares = np.arange(1, count + 1, dtype=np.float64) ** -skew
    borders = np.cumsum(shares / shares.sum())
    chosen: dict[str, int] = {}
    result = []
    for request in requests:
        drawn = min(int(np.searchsorted(borders, chance.random(), side="right")), count - 1)
        if request.session:
            drawn = chosen.setdefault(request.session, drawn)
        result.append(dataclasses.replace(request, tenant=f"tenant-{drawn + 1}"))
    return result
