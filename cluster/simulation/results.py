"""Figures of a run, ready for JSON: latencies, preemptions, migrations, memory, fairness."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.simulation.records import InstanceRecord, RequestRecord
from cluster.simulation.simulation import Outcome
from instance.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT

Floats = NDArray[np.float64]

POINTS = 240
"""Points of a series over time at most."""
WINDOW = 60.0
"""Seconds over which the service of tenants is compared, as in VTC's evaluation."""


CURVE = tuple(float(share) for share in range(0, 101, 2))
"""Percentiles of a latency's curve."""


def statistics(values: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles; empty for no values."""
    found = values if isinstance(values, np.ndarray) else _array(values)
    if not len(found):
        return {}
    p50, p80, p95, p99 = np.percentile(found, (50, 80, 95, 99)).tolist()
    return {
        "mean": float(found.mean()),
        "p50": p50,
        "p80": p80,
        "p95": p95,
        "p99": p99,
        "max": float(found.max()),
    }


def summarize(outcome: Outcome) -> dict[str, Any]:
    """Everything that the report shows of one run."""
    requests = outcome.requests
    done = [one for one in requests if one.status == "finished"]
    refused = Counter(one.status for one in requests if one.status not in ("finished", "open"))
    seconds = max((one.ended for one in done), default=0.0)
    tokens = sum(len(one.times) for one in done)
    prompts = sum(one.prompt_tokens for one in done)
    return {
        "complete": outcome.complete,
        "requests": len(requests),
        "finished": len(done),
        "refused": dict(refused),
        "open": sum(one.status == "open" for one in requests),
        "lost_tokens": sum(one.wanted - len(one.times) for one in done),
        "seconds": seconds,
        "throughput": {
            "requests_per_second": len(done) / seconds if seconds else 0.0,
            "output_tokens_per_second": tokens / seconds if seconds else 0.0,
            "tokens_per_second": (tokens + prompts) / seconds if seconds else 0.0,
        },
        "latency": {
            name: {**statistics(values), "curve": _curve(values)}
            for name, values in _values(done).items()
        },
        "stages": stages(done),
        "tenants": _by(done, lambda one: one.tenant),
        "classes": _by(done, lambda one: one.request_class.name.lower()),
        "groups": _by([one for one in done if one.group], lambda one: one.group),
        "cached_prompt_share": sum(max(0, one.cached) for one in done) / max(1, prompts),
        "preemptions": _preemptions(done),
        "migrations": _migrations(outcome),
        "replays": sum(one.replays for one in requests),
        "fragmentation": _fragmentation(outcome.instances),
        "fairness": _fairness(requests),
        "instances": {
            name: _instance(record, outcome.seconds) for name, record in outcome.instances.items()
        },
        "balance": _balance(outcome.instances, seconds),
        "steps": outcome.steps,
        "steps_jumped": outcome.jumped,
        "counters": outcome.counters,
    }


def latencies(done: Sequence[RequestRecord]) -> dict[str, dict[str, float]]:
    """Statistics in seconds: to the first token, per further one, between tokens, in all, and
    until an instance was found."""
    return {name: statistics(values) for name, values in _values(done).items()}


def _values(done: Sequence[RequestRecord]) -> dict[str, Floats]:
    several = [one for one in done if len(one.times) > 1]
    gaps = [np.diff(np.frombuffer(one.times)) for one in several]
    return {
        "ttft": _array(one.times[0] - one.arrival for one in done),
        "tpot": _array((one.times[-1] - one.times[0]) / (len(one.times) - 1) for one in several),
        "itl": np.concatenate(gaps) if gaps else np.zeros(0),
        "e2e": _array(one.ended - one.arrival for one in done),
        "held": _array(one.placed - one.arrival for one in done),
    }


def stages(done: Sequence[RequestRecord]) -> dict[str, dict[str, float]]:
    """Statistics in seconds of where the time of requests went; of each they add up to all of it.

    Waiting before the first step with some of the prompt, computing it until the first token,
    leaving batches for other instances until the KV is there, waiting there for a step, and
    decoding, which includes what preemptions cost.
    """
    parts = {
        "prefill_queue": _array(one.started - one.arrival for one in done),
        "prefill": _array(one.times[0] - one.started for one in done),
        "transfer": _array(one.transfer for one in done),
        "decode_queue": _array(one.joining for one in done),
        "decode": _array(one.ended - one.times[0] - one.transfer - one.joining for one in done),
    }
    return {name: statistics(values) for name, values in parts.items()}


def _array(values: Iterable[float]) -> Floats:
    return np.fromiter(values, np.float64)


def _curve(values: Floats) -> list[float]:
    """The percentiles of ``CURVE``; empty for no values."""
    curve: list[float] = np.percentile(values, CURVE).round(5).tolist() if len(values) else []
    return curve


def _by(
    done: Sequence[RequestRecord], label: Any
) -> dict[str, dict[str, dict[str, float] | float]]:
    groups: dict[str, list[RequestRecord]] = defaultdict(list)
    for one in done:
        groups[label(one)].append(one)
    return {
        name: {"requests": len(members), **latencies(members)}
        for name, members in sorted(groups.items())
    }


def _preemptions(done: Sequence[RequestRecord]) -> dict[str, Any]:
    hit = [one for one in done if one.preemptions]
    return {
        "count": sum(one.preemptions for one in hit),
        "requests": len(hit),
        "loss_mean": sum(one.preemption_loss for one in hit) / max(1, len(done)),
        "loss": statistics(one.preemption_loss for one in hit),
    }


def _migrations(outcome: Outcome) -> dict[str, Any]:
    by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    moved = []
    for _, report in outcome.migrations:
        by_reason[report.reason][report.outcome.partition(":")[0]] += 1
        if report.outcome == "moved":
            moved.append(report)
    return {
        "count": len(outcome.migrations),
        "moved": len(moved),
        "by_reason": {reason: dict(counts) for reason, counts in sorted(by_reason.items())},
        "bytes": sum(report.bytes_copied for report in moved),
        "stages": statistics(report.stages for report in moved),
        "duration": statistics(report.duration for report in moved),
        "pause": statistics(
            pause for one in outcome.requests for pause in one.pauses if math.isfinite(pause)
        ),
    }


# ---- over time


def _instance(record: InstanceRecord, end: float) -> dict[str, list[float]]:
    """A report of an instance now and then: time, share of KV used, running, waiting."""
    every = max(1, len(record.times) // POINTS)
    return {
        "t": [round(at, 3) for at in record.times[::every]],
        "kv": [round(used / record.total_blocks, 4) for used in record.used[::every]],
        "running": list(record.running[::every]),
        "waiting": list(record.waiting[::every]),
    }


def _sampled(record: InstanceRecord, values: Sequence[int], at: Floats) -> Floats:
    """What an instance last reported at each of the times; 0 before its first report."""
    if not len(record.times):
        return np.zeros(len(at))
    index = np.searchsorted(np.frombuffer(record.times), at, side="right") - 1
    found: Floats = np.asarray(values, np.float64)[np.maximum(index, 0)]
    found[index < 0] = 0.0
    return found


def _grid(instances: Mapping[str, InstanceRecord], end: float | None = None) -> Floats:
    last = max((one.times[-1] for one in instances.values() if len(one.times)), default=0.0)
    return np.linspace(0.0, last if end is None else min(last, end), POINTS)


def _fragmentation(instances: Mapping[str, InstanceRecord]) -> dict[str, Any]:
    """Free memory that would serve those who wait first, were it all in one place.

    As Llumnix defines it (section 2): of the requests at the heads of the queues, in order of
    size, as many as all free memory together could take; what they want, as a share of all
    memory, is lost to fragmentation.
    """
    at = _grid(instances)
    total = sum(one.total_blocks for one in instances.values())
    free = np.zeros(len(at))
    heads = []
    for one in instances.values():
        free += one.total_blocks - _sampled(one, one.used, at)
        heads.append(_sampled(one, one.wanted, at))
    wanted = np.sort(np.stack(heads), axis=0) if heads else np.zeros((0, len(at)))
    taken = np.cumsum(wanted, axis=0)
    share = np.where(taken <= free, wanted, 0.0).sum(axis=0) / max(1, total)
    return {
        "mean": float(share.mean()) if len(share) else 0.0,
        "t": at.round(3).tolist(),
        "share": share.round(5).tolist(),
    }


def _balance(instances: Mapping[str, InstanceRecord], end: float) -> dict[str, float]:
    """How evenly memory is used: mean share, and the mean spread between instances."""
    at = _grid(instances, end)
    shares = [_sampled(one, one.used, at) / one.total_blocks for one in instances.values()]
    if not shares:
        return {}
    together = np.stack(shares)
    return {"kv_mean": float(together.mean()), "kv_spread": float(together.std(axis=0).mean())}


def _fairness(requests: Sequence[RequestRecord]) -> dict[str, Any]:
    """Service of tenants, and by how much it differs among those who ask for it all the time.

    Service is a prompt token's worth each, and two for an output token. Within a window only
    tenants count of which a request is open at every moment.
    """
    tenants = sorted({one.tenant for one in requests})
    end = max((one.ended for one in requests if math.isfinite(one.ended)), default=0.0)
    if not end:
        return {}
    edges = np.linspace(0.0, end, POINTS + 1)
    service = {tenant: np.zeros(POINTS) for tenant in tenants}
    busy = {tenant: np.zeros(POINTS, np.int64) for tenant in tenants}
    for one in requests:
        times = np.frombuffer(one.times)
        if len(times):
            counts = np.histogram(times, edges)[0]
            service[one.tenant] += OUTPUT_WEIGHT * counts
            first = min(POINTS - 1, int(times[0] / end * POINTS))
            service[one.tenant][first] += PROMPT_WEIGHT * (one.prompt_tokens - max(0, one.cached))
        # Bins in which it is open from end to end.
        begins = int(np.searchsorted(edges, one.arrival))
        ends = int(np.searchsorted(edges, one.ended if math.isfinite(one.ended) else end, "right"))
        busy[one.tenant][begins : max(begins, ends - 1)] += 1
    width = max(1, round(WINDOW / (end / POINTS)))
    gaps = [_gap(service, busy, at, width, end / POINTS) for at in range(POINTS)]
    known = [gap for gap in gaps if gap is not None]
    return {
        "service": {tenant: float(values.sum()) for tenant, values in service.items()},
        "t": edges[1:].round(3).tolist(),
        "cumulative": {
            tenant: np.cumsum(values).round(1).tolist() for tenant, values in service.items()
        },
        "gap": gaps,
        "gap_mean": float(np.mean(known)) if known else None,
        "gap_max": max(known, default=None),
    }


def _gap(
    service: Mapping[str, Floats],
    busy: Mapping[str, NDArray[np.int64]],
    at: int,
    width: int,
    seconds: float,
) -> float | None:
    """Service per second that the best served busy tenant had over the worst in a window."""
    low = max(0, at + 1 - width)
    rates = [
        float(values[low : at + 1].sum()) / ((at + 1 - low) * seconds)
        for tenant, values in service.items()
        if (busy[tenant][low : at + 1] > 0).all()
    ]
    return round(max(rates) - min(rates), 3) if len(rates) > 1 else None
