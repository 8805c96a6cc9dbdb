"""The catalogue of series against what is exported and what the documents say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

import instance.figures
from cluster.dispatcher import core as dispatcher_core
from cluster.dispatcher.accounts import AccountBook
from cluster.dispatcher.events import Finished, MigrationRequested
from cluster.dispatcher.figures import (
    COUNTERS,
    LABELS,
    MAX_TENANTS,
    OTHER,
    figures,
    instance_figures,
)
from cluster.dispatcher.messages import ClusterView
from cluster.gateway.metrics import GatewayMetrics, RequestTimer
from cluster.metrics import CATALOGUE, INSTANCE, SERIES, Series
from instance.config import SchedulerConfig, SwapConfig
from instance.kv.blocks import BlockPool
from instance.kv.copies import HostSpace
from instance.load import Figure
from instance.request import RequestClass
from instance.scheduler import Scheduler
from tests.unit.dispatching import World, ask, dispatcher

ROOT = Path(__file__).resolve().parents[2]


def row(series: Series) -> str:
    labels = ", ".join(series.labels)
    return f"| `{series.name}` | {series.kind} | {labels} | {series.text} |"


def test_the_page_lists_the_catalogue() -> None:
    lines = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line.startswith("| `")]
    expected = [row(series) for series in SERIES]
    # A row that is missing can be pasted from here.
    assert [line for line in expected if line not in listed] == []
    assert sorted(listed) == sorted(expected)


def test_names_are_well_formed() -> None:
    assert len(CATALOGUE) == len(SERIES)
    for series in SERIES:
        assert series.name.startswith(("drover_", "vllm:"))
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert bool(series.buckets) == (series.kind == "histogram")
        assert list(series.buckets) == sorted(set(series.buckets))
        assert (series.source != "instance") or series.labels[:2] == INSTANCE


def values(series: Series) -> tuple[str, ...]:
    own = series.labels[2:] if series.source == "instance" else series.labels
    return tuple(f"a {label}" for label in own)


def of(source: str) -> list[Figure]:
    return [
        Figure(
            series.name,
            3.0,
            values(series),
            (1,) * (len(series.buckets) + 1) if series.buckets else (),
        )
        for series in SERIES
        if series.source == source
    ]


def exposed(metrics: GatewayMetrics) -> dict[str, tuple[str, str, frozenset[str]]]:
    """Kind, help and label names of each family that is shown."""
    text = metrics.expose("text/plain")[0].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, family.documentation, frozenset(labels))
    return found


class Moves:
    migrations = 1
    replays = 1

    def __init__(self) -> None:
        self.pauses = [0.02]
        self.stalls = [0.4]


def test_what_is_exposed_is_declared_and_the_other_way_round() -> None:
    world = busy()
    metrics = GatewayMetrics("g0", "m", lambda: world.core.view(world.now), lambda: 0)
    metrics.figures.take(of("dispatcher"), {"i0": of("instance")})
    metrics.http("GET", "/health", 200)
    assert exposed(metrics) == {
        series.name: (series.kind, series.text, frozenset(series.labels)) for series in SERIES
    }


def test_figures_that_are_not_declared_so_are_left_out() -> None:
    metrics = GatewayMetrics("g0", "m", lambda: ClusterView(0), lambda: 0)
    good = Figure("drover_held_requests", 2)
    for bad in (
        Figure("drover_unheard_of", 1),
        Figure("drover_held_requests", 1, ("more",)),
        Figure("drover_instance_steps_total", 1),
        Figure("drover_held_requests", 1, (), (1, 2)),
    ):
        metrics.figures.take([bad, good], {})
        text = metrics.expose("text/plain")[0].decode()
        assert "drover_held_requests 2.0" in text.splitlines()
        assert "drover_unheard_of" not in text


def test_pauses_and_stalls_are_observed_once() -> None:
    metrics = GatewayMetrics("g0", "m", lambda: ClusterView(0), lambda: 0)
    timer, moves = RequestTimer(metrics, 0.0), Moves()
    timer.tokens(moves)
    timer.tokens(moves)
    timer.finished("stop", 10, 4, 2, moves)
    lines = metrics.expose("text/plain")[0].decode().splitlines()
    for line in (
        'drover_migration_pause_seconds_count{gateway="g0"} 1.0',
        'drover_migration_pause_seconds_sum{gateway="g0"} 0.02',
        'drover_replay_stall_seconds_count{gateway="g0"} 1.0',
        'vllm:prefix_cache_queries_total{gateway="g0",model_name="m"} 10.0',
        'vllm:prefix_cache_hits_total{gateway="g0",model_name="m"} 4.0',
    ):
        assert line in lines


def busy() -> World:
    """A cluster that has seen most of what the dispatcher counts."""
    world = World(dispatcher(max_queued=0))
    world.place(ask("too early"))
    world.join("i0")
    world.join("i1")
    for number in range(6):
        world.place(ask(f"r{number}"))
    world.place(ask("r0"))
    world.run(1.0)
    world.take(world.core.handle(MigrationRequested("r0"), world.now))
    world.run(1.0)
    world.take(world.core.handle(Finished("r1", 1), world.now))
    return world


def test_the_dispatchers_figures_are_declared() -> None:
    found = figures(busy().core)
    assert found
    for one in found:
        series = CATALOGUE[one.name]
        assert series.source == "dispatcher"
        assert len(one.labels) == len(series.labels)
        assert one.value >= 0
    shown = {one.name for one in found}
    assert {"drover_placements_total", "drover_migrations_total", "drover_refusals_total"} <= shown
    assert Figure("drover_migrations_total", 1, ("admin", "moved")) in found


def test_all_of_the_dispatchers_series_come_from_somewhere() -> None:
    told = {figure.name for figure in figures(busy().core)} | set(COUNTERS.values())
    declared = {series.name for series in SERIES if series.source == "dispatcher"}
    of_the_actor = {name for name in declared if "_store_" in name or "start_time" in name}
    assert told | of_the_actor == declared


def test_tenants_beyond_the_most_served_are_one() -> None:
    core = dispatcher()
    for number in range(MAX_TENANTS + 5):
        book = AccountBook(service=1000.0 - number)
        core.ledger.accounts[f"t{number}", RequestClass.STANDARD] = book
    core.ledger.accounts["t0", RequestClass.BATCH] = AccountBook(service=5.0)
    shown = [one for one in figures(core) if one.name == "drover_tenant_service_total"]
    served = {one.labels[0]: one.value for one in shown}
    assert len(shown) == len(served) == MAX_TENANTS + 1
    assert served["t0"] == 1005.0
    assert served[OTHER] == sum(1000.0 - MAX_TENANTS - number for number in range(5))


def test_every_counter_of_the_core_has_its_series() -> None:
    sources = Path(dispatcher_core.__file__).parent.glob("*.py")
    texts = [source.read_text(encoding="utf-8") for source in sources]
    kinds = {kind for text in texts for kind in re.findall(r'_count\(\s*"(\w+)"', text)}
    assert kinds
    assert kinds <= set(COUNTERS)
    for name in COUNTERS.values():
        assert len(CATALOGUE[name].labels) == LABELS.get(name, 1)


@pytest.mark.parametrize("left", [False, True])
def test_the_figures_of_instances_are_their_last(left: bool) -> None:
    world = busy()
    world.core.members.loads["i0"].left = left
    assert set(instance_figures(world.core)) == ({"i1"} if left else {"i0", "i1"})


def instance_world(host: HostSpace | None) -> dict[str, list[Figure]]:
    """The figures of an engine that has made and preempted nothing, by name."""
    scheduler = Scheduler(SchedulerConfig(), BlockPool(64, 16), b"model", host)
    if scheduler.swap is not None:
        scheduler.swap.figures.decisions["recompute", "cheaper"] += 1
    found: dict[str, list[Figure]] = {}
    for one in instance.figures.figures(SimpleNamespace(scheduler=scheduler, steps=7)):
        found.setdefault(one.name, []).append(one)
    return found


def test_the_instances_figures_are_declared_and_the_other_way_round() -> None:
    found = instance_world(HostSpace(32, 1024, SwapConfig()))
    declared = {series.name: series for series in SERIES if series.source == "instance"}
    assert set(found) == set(declared)
    for name, figures_ in found.items():
        series = declared[name]
        for one in figures_:
            assert len(one.labels) == len(series.labels) - len(INSTANCE)
            assert len(one.buckets) == (len(series.buckets) + 1 if series.buckets else 0)
    # Without host memory there is nothing to say of swapping.
    assert {name for name in instance_world(None) if "swap" in name or "host" in name} == set()
