"""What ``/metrics`` says: Drover's own series, and the ``vllm:`` ones that dashboards expect.

Series of this gateway carry its id as label ``gateway``, so that those of several gateways
behind one port can be told apart and summed. Series of instances come from the dispatcher's
view and are the same at every gateway; their label ``engine`` is the instance's id.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.dispatcher.messages import ClusterView

# A second series per counter that says when it began; nothing reads it.
disable_created_metrics()

# The bucket bounds are vLLM's, so that its dashboards fit.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_WHOLE = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_SIZES = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

_OUTCOMES = ("stop", "length", "abort", "error", "cancelled")


class Moves(Protocol):
    """How often a request changed its instance."""

    migrations: int
    replays: int


class _InstanceCollector(Collector):
    """Instances as the dispatcher sees them, read when scraped."""

    def __init__(self, view: Callable[[], ClusterView], model: str) -> None:
        self._view = view
        self._model = model

    def collect(self) -> Iterator[GaugeMetricFamily]:
        view = self._view()
        states = GaugeMetricFamily("drover_instances", "Instances by state.", labels=["state"])
        for state in ("ready", "suspect", "draining"):
            states.add_metric(
                [state], sum(1 for instance in view.instances if instance.state == state)
            )
        yield states
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch.", "running"),
            ("vllm:num_requests_waiting", "Requests waiting for the batch.", "waiting"),
            ("vllm:kv_cache_usage_perc", "KV blocks used or promised; 1 is all.", "load"),
            ("drover_instance_free_blocks", "KV blocks free or cached.", "free_blocks"),
            ("drover_instance_freeness", "Free KV blocks per running request.", "freeness"),
            ("drover_instance_step_seconds", "Median duration of a step.", "step_seconds"),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
            for instance in view.instances:
                family.add_metric(
                    [self._model, instance.info.instance_id], getattr(instance, value)
                )
            yield family
        facts = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache of an instance.",
            labels=["model_name", "engine", "block_size", "num_gpu_blocks", "cache_dtype"],
        )
        for instance in view.instances:
            info = instance.info
            facts.add_metric(
                [
                    self._model,
                    info.instance_id,
                    str(info.model.block_size),
                    str(info.total_blocks),
                    info.model.dtype,
                ],
                1,
            )
        yield facts


class _LoopHistogram(Collector):
    """A histogram that one thread observes and reads: no lock, no check, once per token.

    The library's own costs as much as turning the token into text.
    """

    def __init__(
        self, name: str, text: str, labels: dict[str, str], buckets: tuple[float, ...]
    ) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        counts = itertools.accumulate(self._counts)
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(
            list(self._labels.values()),
            [(bound, float(count)) for bound, count in zip(bounds, counts, strict=True)],
            self._sum,
        )
        yield family


class GatewayMetrics:
    """The series of one gateway, in a registry of its own."""

    def __init__(
        self,
        gateway_id: str,
        model: str,
        view: Callable[[], ClusterView],
        active: Callable[[], int],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        own = {"gateway": gateway_id}
        both = {"gateway": gateway_id, "model_name": model}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, text, list(both), buckets=buckets, registry=registry)
            return metric.labels(**both)

        def counter(name: str, text: str, labels: dict[str, str]) -> Counter:
            return Counter(name, text, list(labels), registry=registry).labels(**labels)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            _FIRST_TOKEN,
        )
        self.between_tokens = _LoopHistogram(
            "vllm:inter_token_latency_seconds",
            "Between one delivery of tokens and the next of the same request.",
            both,
            _BETWEEN_TOKENS,
        )
        registry.register(self.between_tokens)
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per output token after the first, by request.",
            _BETWEEN_TOKENS,
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request to its end.",
            _WHOLE,
        )
        self.prompt_sizes = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _SIZES
        )
        self.output_sizes = histogram(
            "vllm:request_generation_tokens", "Output tokens of a request.", _SIZES
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of ended requests.", both)
        self.output_tokens = counter("vllm:generation_tokens", "Output tokens.", both)
        succeeded = Counter(
            "vllm:request_success",
            "Requests ended with a result, by why they ended.",
            [*both, "finished_reason"],
            registry=registry,
        )
        self.succeeded = {
            reason: succeeded.labels(**both, finished_reason=reason)
            for reason in ("stop", "length", "abort")
        }
        requests = Counter(
            "drover_requests",
            "Requests ended, by outcome; 'cancelled' is a client that went away.",
            [*own, "outcome"],
            registry=registry,
        )
        self.requests = {outcome: requests.labels(**own, outcome=outcome) for outcome in _OUTCOMES}
        self.migrations = counter(
            "drover_request_migrations", "Live migrations of this gateway's requests.", own
        )
        self.replays = counter(
            "drover_request_replays",
            "Requests of this gateway begun anew after an instance was lost.",
            own,
        )
        self.disconnects = counter(
            "drover_client_disconnects", "Clients gone before their answer was complete.", own
        )
        self._http = Counter(
            "drover_http_requests",
            "HTTP requests by route and status.",
            [*own, "method", "route", "status"],
            registry=registry,
        )
        self._gateway_id = gateway_id
        running = Gauge(
            "drover_requests_active",
            "Requests of this gateway placed, waiting or running.",
            list(own),
            registry=registry,
        )
        running.labels(**own).set_function(active)
        registry.register(_InstanceCollector(view, model))

    def http(self, method: str, route: str, status: int) -> None:
        """Count an answered HTTP request; ``route`` is one of a fixed set."""
        self._http.labels(
            gateway=self._gateway_id, method=method, route=route, status=str(status)
        ).inc()

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The exposition that an ``Accept`` header asks for, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class RequestTimer:
    """Times one request from its arrival, in monotonic seconds."""

    __slots__ = ("_arrival", "_first", "_last", "_metrics")

    def __init__(self, metrics: GatewayMetrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._first = 0.0
        self._last = 0.0

    @property
    def started(self) -> bool:
        """The first token has come."""
        return self._first > 0

    def tokens(self) -> None:
        """Tokens have come."""
        now = time.monotonic()
        if self._first:
            self._metrics.between_tokens.observe(now - self._last)
        else:
            self._first = now
            self._metrics.first_token.observe(now - self._arrival)
        self._last = now

    def finished(self, outcome: str, prompt: int, output: int, moves: Moves) -> None:
        """The request ended.

        Args:
            outcome: "stop", "length", "abort", "error" or "cancelled".
            prompt: Prompt tokens.
            output: Output tokens.
            moves: Its moves between instances.
        """
        metrics = self._metrics
        metrics.requests[outcome].inc()
        metrics.migrations.inc(moves.migrations)
        metrics.replays.inc(moves.replays)
        metrics.prompt_tokens.inc(prompt)
        metrics.output_tokens.inc(output)
        if outcome not in metrics.succeeded:
            return
        metrics.succeeded[outcome].inc()
        metrics.whole.observe(time.monotonic() - self._arrival)
        metrics.prompt_sizes.observe(prompt)
        metrics.output_sizes.observe(output)
        if output > 1 and self._first:
            metrics.per_token.observe((self._last - self._first) / (output - 1))
