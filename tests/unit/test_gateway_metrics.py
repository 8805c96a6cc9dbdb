"""The gateway's own histogram against the library's."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from cluster.dispatcher.messages import ClusterView
from cluster.gateway.metrics import GatewayMetrics

NAME = "vllm:inter_token_latency_seconds"


def exposed(metrics: GatewayMetrics) -> list[str]:
    text = metrics.expose("text/plain")[0].decode()
    return [line for line in text.splitlines() if NAME in line]


@pytest.mark.parametrize("count", [0, 1, 500])
def test_exposed_like_the_librarys_histogram(count: int) -> None:
    metrics = GatewayMetrics("g0", 'a "model"', lambda: ClusterView(0), lambda: 0)
    bounds = [
        float(line.split('le="')[1].split('"')[0]) for line in exposed(metrics) if 'le="' in line
    ]
    registry = CollectorRegistry()
    reference = Histogram(
        NAME,
        "Between one delivery of tokens and the next of the same request.",
        ["gateway", "model_name"],
        buckets=bounds,
        registry=registry,
    ).labels("g0", 'a "model"')
    # Values on the bounds themselves, too: a bucket includes its bound.
    draw = random.Random(3)
    for _ in range(count):
        value = draw.choice([draw.expovariate(10.0), draw.choice(bounds[:-1]), 1e4])
        metrics.between_tokens.observe(value)
        reference.observe(value)
    assert exposed(metrics) == generate_latest(registry).decode().splitlines()
