"""Figures of a replay."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replay.results import Goals, RequestResult, format_summary, summarize

FIELDS = {
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_concurrent_requests", "max_output_tokens_per_s"),
    *(
        f"{kind}_{name}_ms"
        for kind in ("mean", "median", "std", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}
"""What `vllm bench serve` writes."""


def result(number: int, sent: float, gaps: list[float], **more: object) -> RequestResult:
    arrivals, at = [], sent
    for gap in gaps:
        at += gap
        arrivals.append(at)
    made = RequestResult(
        number, sent=sent, due=sent, arrivals=arrivals, ended=at, output_tokens=len(gaps)
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_figures() -> None:
    results = [
        result(0, 0.0, [0.1, 0.2, 0.3], prompt_tokens=10, tenant="a"),
        result(1, 0.5, [0.5], prompt_tokens=20, cached_tokens=5, tenant="b"),
        result(2, 0.2, [], ended=0.3, failure="http_429", detail="429: no", tenant="b"),
    ]
    summary = summarize(results, 2.0, Goals(ttft=0.2, tpot=0.3), detailed=True)
    assert set(summary) >= FIELDS
    assert (summary["num_prompts"], summary["completed"], summary["failed"]) == (3, 2, 1)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (30, 4)
    assert summary["request_throughput"] == 1.0
    assert summary["total_token_throughput"] == 17.0
    assert summary["request_goodput"] == 0.5
    assert summary["mean_ttft_ms"] == pytest.approx(300)
    assert summary["mean_tpot_ms"] == pytest.approx(250)
    assert summary["mean_itl_ms"] == pytest.approx(250)
    assert summary["mean_e2el_ms"] == pytest.approx(550)
    assert summary["max_concurrent_requests"] == 2
    assert summary["max_output_tokens_per_s"] == 3
    assert summary["failures"] == {"http_429": 1}
    assert summary["errors"] == ["", "", "429: no"]
    assert set(summary["tenants"]) == {"a", "b"}
    assert summary["tenants"]["b"]["failed"] == 1
    assert summary["tenants"]["b"]["service"] == 17
    assert json.loads(json.dumps(summary)) == summary
    text = format_summary(summary)
    for part in ("1 x http_429", "time per output token", "goodput", "\na ", "\nb "):
        assert part in text


def test_nothing_was_sent() -> None:
    summary = summarize([], 0.0)
    assert summary["completed"] == summary["failed"] == 0
    assert summary["request_goodput"] is None
    assert "0 whole" in format_summary(summary)


def test_groups_and_classes_show_where_there_are_several() -> None:
    plain = [result(n, 0.0, [1.0]) for n in range(2)]
    assert "classes" not in summarize(plain, 1.0)
    plain[0].request_class, plain[0].group = "interactive", "high"
    summary = summarize(plain, 1.0)
    assert summary["classes"]["interactive"]["completed"] == 1
    assert summary["classes"]["standard"]["completed"] == 1


gaps = st.lists(st.floats(0, 10), min_size=0, max_size=6)
made = st.builds(
    result,
    st.integers(0, 9),
    st.floats(0, 100),
    gaps,
    tenant=st.sampled_from("abc"),
    failure=st.sampled_from(["", "", "timeout"]),
    prompt_tokens=st.integers(0, 99),
)


@given(st.lists(made, max_size=12), st.floats(0.1, 1000))
def test_parts_add_up(results: list[RequestResult], seconds: float) -> None:
    summary = summarize(results, seconds)
    for key in ("completed", "failed", "total_input_tokens", "total_output_tokens"):
        assert summary[key] == sum(part[key] for part in summary["tenants"].values())
    assert summary["completed"] + summary["failed"] == len(results)
    assert summary["max_concurrent_requests"] <= len(results)
    for name in ("ttft", "tpot", "itl", "e2el"):
        levels = [summary[f"p{level}_{name}_ms"] for level in (50, 90, 95, 99)]
        assert levels == sorted(levels)
        assert summary[f"median_{name}_ms"] == pytest.approx(levels[0])
    for one in results:
        assert len(one.itl) == max(0, len(one.arrivals) - 1)
        assert one.tpot is None or one.tpot * (one.output_tokens - 1) == pytest.approx(
            sum(one.itl), abs=1e-6
        )
