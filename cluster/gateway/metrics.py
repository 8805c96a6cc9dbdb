"""What ``/metrics`` says: the series that ``cluster/metrics.py`` declares, with their values.

Series of this gateway carry its id as label ``gateway``, so that those of several gateways
behind one port can be told apart and summed. Those of instances and of the dispatcher are the
same at every gateway; the label ``engine`` is an instance's id.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.dispatcher.messages import ClusterView
from cluster.metrics import CATALOGUE, SERIES, Series
from instance.load import Figure

# A second series per counter that says when it began; nothing reads it.
disable_created_metrics()

logger = logging.getLogger(__name__)

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_OUTCOMES = ("stop", "length", "abort", "error", "cancelled")
_STATES = ("ready", "suspect", "draining")
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "load",
    "drover_instance_free_blocks": "free_blocks",
    "drover_instance_freeness": "freeness",
    "drover_instance_step_seconds": "step_seconds",
}
"""Attribute of an instance's view by series."""


class Moves(Protocol):
    """How often a request changed its instance, and what that cost it.

    Attributes:
        pauses: Seconds without tokens at each migration; taken out once they are counted.
        stalls: The same at each replay.
    """

    migrations: int
    replays: int
    pauses: list[float]
    stalls: list[float]


def _gauge(name: str) -> GaugeMetricFamily:
    series = CATALOGUE[name]
    return GaugeMetricFamily(name, series.text, labels=series.labels)


def _histogram(
    series: Series, observed: Iterable[tuple[Sequence[str], Sequence[int], float]]
) -> HistogramMetricFamily:
    """A histogram's family from label values, observations by bucket, and their sum."""
    family = HistogramMetricFamily(series.name, series.text, labels=series.labels)
    bounds = [*map(floatToGoString, series.buckets), "+Inf"]
    for labels, counts, total in observed:
        sums = map(float, itertools.accumulate(counts))
        family.add_metric(labels, list(zip(bounds, sums, strict=True)), total)
    return family


class _ViewCollector(Collector):
    """Instances as the dispatcher sees them, read when scraped."""

    def __init__(self, view: Callable[[], ClusterView], model: str) -> None:
        self._view = view
        self._model = model

    def collect(self) -> Iterator[Family]:
        view = self._view()
        states = _gauge("drover_instances")
        for state in _STATES:
            states.add_metric(
                [state], sum(1 for instance in view.instances if instance.state == state)
            )
        yield states
        for name, attribute in _GAUGES.items():
            family = _gauge(name)
            for instance in view.instances:
                family.add_metric(
                    [self._model, instance.info.instance_id], getattr(instance, attribute)
                )
            yield family
        facts = _gauge("vllm:cache_config_info")
        for instance in view.instances:
            info = instance.info
            sizes = [str(info.model.block_size), str(info.total_blocks), info.model.dtype]
            facts.add_metric([self._model, info.instance_id, *sizes], 1)
        yield facts


class FigureCollector(Collector):
    """Figures of the dispatcher and of the instances, as they were told last.

    Args:
        model: Value of the label ``model_name``.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._values: dict[str, list[tuple[tuple[str, ...], Figure]]] = {}
        self._unknown: set[str] = set()

    def take(self, dispatcher: Iterable[Figure], instances: Mapping[str, Iterable[Figure]]) -> None:
        """Replace what is shown; figures that are not declared are left out, and logged once."""
        self._values = {}
        for figure in dispatcher:
            self._add(figure, "dispatcher", ())
        for instance_id, figures in instances.items():
            for figure in figures:
                self._add(figure, "instance", (self._model, instance_id))

    def _add(self, figure: Figure, source: str, prefix: tuple[str, ...]) -> None:
        series = CATALOGUE.get(figure.name)
        fits = (
            series is not None
            and series.source == source
            and len(series.labels) == len(prefix) + len(figure.labels)
            and len(figure.buckets) == (len(series.buckets) + 1 if series.buckets else 0)
        )
        if fits:
            labels = (*prefix, *figure.labels)
            self._values.setdefault(figure.name, []).append((labels, figure))
        elif figure.name not in self._unknown:
            # An instance of another version may know other figures.
            self._unknown.add(figure.name)
            logger.warning("figure %s is not as it is declared; it is not shown", figure.name)

    def collect(self) -> Iterator[Family]:
        for series in SERIES:
            if series.source not in ("dispatcher", "instance"):
                continue
            values = self._values.get(series.name, [])
            if series.kind == "histogram":
                yield _histogram(
                    series, ((labels, one.buckets, one.value) for labels, one in values)
                )
                continue
            kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
            family = kind(series.name, series.text, labels=series.labels)
            for labels, figure in values:
                family.add_metric(labels, figure.value)
            yield family


class _LoopHistogram(Collector):
    """A histogram that one thread observes and reads: no lock, no check, once per token.

    The library's own costs as much as turning the token into text.
    """

    def __init__(self, series: Series, labels: dict[str, str]) -> None:
        self._series = series
        self._labels = [labels[name] for name in series.labels]
        self._counts = [0] * (len(series.buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._series.buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Family]:
        yield _histogram(self._series, [(self._labels, self._counts, self._sum)])


class GatewayMetrics:
    """The series of one gateway, in a registry of its own.

    Attributes:
        figures: What the dispatcher and the instances count.
    """

    def __init__(
        self,
        gateway_id: str,
        model: str,
        view: Callable[[], ClusterView],
        active: Callable[[], int],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        known = {"gateway": gateway_id, "model_name": model}

        def labels(series: Series) -> dict[str, str]:
            return {name: known[name] for name in series.labels if name in known}

        def histogram(name: str) -> Histogram:
            series = CATALOGUE[name]
            metric = Histogram(
                name, series.text, series.labels, buckets=series.buckets, registry=registry
            )
            return metric.labels(**labels(series))

        def counters(name: str) -> Callable[..., Counter]:
            series = CATALOGUE[name]
            metric = Counter(name, series.text, series.labels, registry=registry)
            return lambda **more: metric.labels(**labels(series), **more)

        def gauge(name: str) -> Gauge:
            series = CATALOGUE[name]
            metric = Gauge(name, series.text, series.labels, registry=registry)
            return metric.labels(**labels(series))

        self.first_token = histogram("vllm:time_to_first_token_seconds")
        between = CATALOGUE["vllm:inter_token_latency_seconds"]
        self.between_tokens = _LoopHistogram(between, labels(between))
        registry.register(self.between_tokens)
        self.per_token = histogram("vllm:request_time_per_output_token_seconds")
        self.whole = histogram("vllm:e2e_request_latency_seconds")
        self.prompt_sizes = histogram("vllm:request_prompt_tokens")
        self.output_sizes = histogram("vllm:request_generation_tokens")
        self.prompt_tokens = counters("vllm:prompt_tokens_total")()
        self.output_tokens = counters("vllm:generation_tokens_total")()
        self.cache_queries = counters("vllm:prefix_cache_queries_total")()
        self.cache_hits = counters("vllm:prefix_cache_hits_total")()
        succeeded = counters("vllm:request_success_total")
        self.succeeded = {
            reason: succeeded(finished_reason=reason) for reason in ("stop", "length", "abort")
        }
        requests = counters("drover_requests_total")
        self.requests = {outcome: requests(outcome=outcome) for outcome in _OUTCOMES}
        self.migrations = counters("drover_request_migrations_total")()
        self.replays = counters("drover_request_replays_total")()
        self.pauses = histogram("drover_migration_pause_seconds")
        self.stalls = histogram("drover_replay_stall_seconds")
        self.disconnects = counters("drover_client_disconnects_total")()
        self._http = counters("drover_http_requests_total")
        self.dispatcher_up = gauge("drover_dispatcher_up")
        gauge("drover_requests_active").set_function(active)
        registry.register(_ViewCollector(view, model))
        self.figures = FigureCollector(model)
        registry.register(self.figures)

    def http(self, method: str, route: str, status: int) -> None:
        """Count an answered HTTP request; ``route`` is one of a fixed set."""
        self._http(method=method, route=route, status=str(status)).inc()

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

    def tokens(self, moves: Moves) -> None:
        """Tokens have come."""
        now = time.monotonic()
        if self._first:
            self._metrics.between_tokens.observe(now - self._last)
        else:
            self._first = now
            self._metrics.first_token.observe(now - self._arrival)
        self._last = now
        while moves.pauses:
            self._metrics.pauses.observe(moves.pauses.pop())
        while moves.stalls:
            self._metrics.stalls.observe(moves.stalls.pop())

    def finished(self, outcome: str, prompt: int, cached: int, output: int, moves: Moves) -> None:
        """The request ended.

        Args:
            outcome: "stop", "length", "abort", "error" or "cancelled".
            prompt: Prompt tokens.
            cached: Those of them whose KV was cached.
            output: Output tokens.
            moves: Its moves between instances.
        """
        metrics = self._metrics
        metrics.requests[outcome].inc()
        metrics.migrations.inc(moves.migrations)
        metrics.replays.inc(moves.replays)
        metrics.prompt_tokens.inc(prompt)
        metrics.cache_queries.inc(prompt)
        metrics.cache_hits.inc(cached)
        metrics.output_tokens.inc(output)
        if outcome not in metrics.succeeded:
            return
        metrics.succeeded[outcome].inc()
        metrics.whole.observe(time.monotonic() - self._arrival)
        metrics.prompt_sizes.observe(prompt)
        metrics.output_sizes.observe(output)
        if output > 1 and self._first:
            metrics.per_token.observe((self._last - self._first) / (output - 1))
