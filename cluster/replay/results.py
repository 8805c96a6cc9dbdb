"""What became of replayed requests, under the names that ``vllm bench serve`` writes."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)
_METRICS = ("ttft", "tpot", "itl", "e2el")
_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between tokens",
    "e2el": "whole answer",
}


@dataclass(slots=True)
class RequestResult:
    """One request; times in seconds from the start of the replay.

    Attributes:
        number: Its place in the workload.
        tenant, group, request_class, session, turn: As the workload has them.
        due: When it should have been sent.
        sent: When it was.
        arrivals: When each event with tokens came.
        ended: When the answer or the error was complete.
        prompt_tokens: As the server counts, or else as sent.
        output_tokens: As the server counts, or else the number of events.
        cached_tokens: Prompt tokens that the server had in its prefix cache.
        failure: What kind of failure; "" where the answer came whole.
        detail: What the server or the connection said of it.
    """

    number: int
    tenant: str = "default"
    group: str = ""
    request_class: str = "standard"
    session: str = ""
    turn: int = 0
    due: float = 0.0
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    failure: str = ""
    detail: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token; 0 if none came."""
        return self.arrivals[0] - self.sent if self.arrivals else 0.0

    @property
    def e2el(self) -> float:
        """Seconds to the end of the answer."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where there is no second one."""
        if self.output_tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between events with tokens."""
        return [two - one for one, two in itertools.pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Goals:
    """A request is good if it meets all of these; seconds, None for no goal."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def met(self, one: RequestResult) -> bool:
        """Whether an answer that came whole is good."""
        measured = ((self.ttft, one.ttft), (self.tpot, one.tpot or 0.0), (self.e2el, one.e2el))
        return all(goal is None or value <= goal for goal, value in measured)


def summarize(
    results: Sequence[RequestResult],
    seconds: float,
    goals: Goals | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """Figures of a replay, as JSON takes them.

    Args:
        results: Requests that were sent.
        seconds: Duration of the replay.
        goals: For ``request_goodput``; it is None without.
        detailed: Add the figures of every request.
    """
    whole = [one for one in results if not one.failure]
    summary: dict[str, Any] = {
        "duration": seconds,
        **_totals(results, seconds),
        "request_goodput": None,
        **_spreads(whole),
        "max_concurrent_requests": _most_at_once(results),
        "max_output_tokens_per_s": _busiest_second(whole),
        "total_cached_tokens": sum(one.cached_tokens for one in whole),
        "mean_lateness_ms": 1000 * _mean([max(0.0, one.sent - one.due) for one in results]),
        "failures": dict(Counter(one.failure for one in results if one.failure)),
    }
    if goals is not None:
        good = sum(1 for one in whole if goals.met(one))
        summary["request_goodput"] = good / seconds if seconds else 0.0
    for key in ("tenant", "group", "request_class"):
        names = sorted({getattr(one, key) for one in results} - {""})
        if len(names) > 1 or key == "tenant":
            summary["classes" if key == "request_class" else f"{key}s"] = {
                name: _part([one for one in results if getattr(one, key) == name], seconds)
                for name in names
            }
    if detailed:
        summary |= {
            "input_lens": [one.prompt_tokens for one in results],
            "output_lens": [one.output_tokens for one in results],
            "ttfts": [one.ttft for one in results],
            "itls": [one.itl for one in results],
            "errors": [one.detail for one in results],
            "start_times": [one.sent for one in results],
        }
    return summary


def _part(results: Sequence[RequestResult], seconds: float) -> dict[str, Any]:
    whole = [one for one in results if not one.failure]
    # What a tenant is charged for: prompt tokens that were computed, and output twice.
    service = sum(one.prompt_tokens - one.cached_tokens + 2 * one.output_tokens for one in whole)
    return {**_totals(results, seconds), **_spreads(whole), "service": service}


def _totals(results: Sequence[RequestResult], seconds: float) -> dict[str, Any]:
    whole = [one for one in results if not one.failure]
    prompt = sum(one.prompt_tokens for one in whole)
    output = sum(one.output_tokens for one in whole)
    rate = 1.0 / seconds if seconds else 0.0
    return {
        "num_prompts": len(results),
        "completed": len(whole),
        "failed": len(results) - len(whole),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(whole) * rate,
        "output_throughput": output * rate,
        "total_token_throughput": (prompt + output) * rate,
    }


def _spreads(whole: Sequence[RequestResult]) -> dict[str, float]:
    values = {
        "ttft": [one.ttft for one in whole],
        "tpot": [tpot for one in whole if (tpot := one.tpot) is not None],
        "itl": [gap for one in whole for gap in one.itl],
        "e2el": [one.e2el for one in whole],
    }
    found: dict[str, float] = {}
    for name in _METRICS:
        times = 1000 * np.array(values[name] or [0.0])
        found[f"mean_{name}_ms"] = float(times.mean())
        found[f"median_{name}_ms"] = float(np.median(times))
        found[f"std_{name}_ms"] = float(times.std())
        for level, value in zip(PERCENTILES, np.percentile(times, PERCENTILES), strict=True):
            found[f"p{level}_{name}_ms"] = float(value)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _most_at_once(results: Sequence[RequestResult]) -> int:
    # At one instant an end comes before a start.
    changes = sorted(
        change for one in results for change in ((one.sent, 1), (max(one.sent, one.ended), -1))
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _busiest_second(whole: Sequence[RequestResult]) -> float:
    tokens: defaultdict[int, float] = defaultdict(float)
    for one in whole:
        if one.arrivals:
            share = one.output_tokens / len(one.arrivals)
            for arrival in one.arrivals:
                tokens[int(arrival)] += share
    return max(tokens.values(), default=0.0)


def format_summary(summary: dict[str, Any]) -> str:
    """Tables for people."""
    lines = [
        f"requests     {summary['completed']} whole, {summary['failed']} failed, "
        f"{summary['duration']:.1f} s, {summary['max_concurrent_requests']} at once at most",
        f"throughput   {summary['request_throughput']:.2f} requests/s, "
        f"{summary['output_throughput']:.0f} output tokens/s, "
        f"{summary['total_token_throughput']:.0f} tokens/s in all",
    ]
    if summary["request_goodput"] is not None:
        lines.append(f"goodput      {summary['request_goodput']:.2f} requests/s")
    if summary["failures"]:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in summary["failures"].items())
        lines.append(f"failures     {kinds}")
    lines += ["", f"{'ms':24}{'mean':>10}" + "".join(f"{f'P{p}':>10}" for p in PERCENTILES)]
    for name in _METRICS:
        values = [summary[f"mean_{name}_ms"], *(summary[f"p{p}_{name}_ms"] for p in PERCENTILES)]
        lines.append(f"{_TITLES[name]:24}" + "".join(f"{value:10.1f}" for value in values))
    tenants = summary["tenants"]
    if len(tenants) > 1:
        width = max(8, *(len(name) for name in tenants))
        lines += [
            "",
            f"{'tenant':{width}}  whole failed   tokens/s    TTFT P50    TTFT P99    TPOT P50",
        ]
        lines += [
            f"{name:{width}} {part['completed']:6} {part['failed']:6} "
            f"{part['total_token_throughput']:10.0f} {part['median_ttft_ms']:9.0f}ms "
            f"{part['p99_ttft_ms']:9.0f}ms {part['median_tpot_ms']:9.1f}ms"
            for name, part in tenants.items()
        ]
    return "\n".join(lines)
