"""The ledger of tenants' service, and the leases that instances hold on it."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import FetchLedger, Joined, LedgerCopied, Reported, SendLedger, Tick
from cluster.dispatcher.fairness import LEAST_LEASE, FairnessLedger, Source
from cluster.dispatcher.tenants import TenantPolicy, policy_from_json, policy_to_json
from cluster.flags import ConfigError
from cluster.gateway.home_actions import Peer
from cluster.gateway.served import ServedService
from cluster.tenant_file import load_tenants
from instance.fairness import service
from instance.leases import AccountState, LeasedCounters, LedgerUpdate, ServiceReport
from instance.request import RequestClass
from tests.unit.dispatching import dispatcher, info, report

STANDARD = RequestClass.STANDARD
A, B, C = (("a", STANDARD), ("b", STANDARD), ("c", STANDARD))
ONE, TWO = Source("i0", "x"), Source("i1", "y")


def said(*charged: tuple[tuple[str, RequestClass], float], **more: object) -> ServiceReport:
    return ServiceReport(tuple(charged), **{"theta": 100.0, "increment": 10.0, **more})


# ---- charges


@given(
    st.lists(st.tuples(st.sampled_from((ONE, TWO)), st.integers(1, 50)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_reports_count_once_in_any_order(charges, rng: random.Random) -> None:
    ledger = FairnessLedger(tenants={"a": TenantPolicy(2.0)})
    sums = {ONE: 0, TWO: 0}
    reports = []
    for source, units in charges:
        sums[source] += units
        reports.append((source, said((A, float(sums[source])))))
    heard = reports + rng.sample(reports, len(reports) // 2)
    rng.shuffle(heard)
    for source, one in heard:
        ledger.report(source, one, 0.0)
    assert ledger.counter(A) == sum(sums.values()) / 2
    if heard:
        assert ledger.accounts[A].service == sum(sums.values())


def test_a_lost_report_is_made_up_for_by_the_next() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said((A, 10.0)), 0.0)
    ledger.report(ONE, said((A, 35.0), (B, 5.0)), 0.0)
    assert (ledger.counter(A), ledger.counter(B)) == (35.0, 5.0)


def test_homes_stand_in_for_what_a_dead_instance_did_not_report() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said((A, 100.0)), 0.0)
    for _ in range(2):
        ledger.homes_report("g0", ONE, [(A, 80.0)], 0.0)
        ledger.homes_report("g1", ONE, [(A, 50.0)], 0.0)
    assert ledger.counter(A) == 130.0
    ledger.report(ONE, said((A, 140.0)), 0.0)  # its last report was only late
    assert ledger.counter(A) == 140.0
    ledger.homes_report("g0", Source("never", "heard"), [(A, 7.0)], 0.0)
    assert ledger.counter(A) == 140.0


def test_a_weight_divides_what_is_charged_from_then_on() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said((A, 10.0)), 0.0)
    ledger.set_tenant("a", TenantPolicy(4.0))
    ledger.report(ONE, said((A, 50.0)), 0.0)
    assert ledger.counter(A) == 20.0


def test_system_work_is_no_tenants() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said(system=7), 0.0)
    ledger.report(ONE, said(system=7), 0.0)
    ledger.report(TWO, said(system=5), 0.0)
    assert (ledger.system, ledger.counter(A)) == (12, 0.0)


# ---- lifts


def test_who_begins_to_wait_is_lifted_to_the_least_who_do() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said((A, 30.0), (B, 70.0)), 0.0)
    ledger.begin_waiting(B, "b1", 0.0)
    ledger.begin_waiting(A, "a1", 0.0)
    assert ledger.counter(A) == 70.0
    ledger.report(ONE, said((A, 40.0), (B, 170.0)), 0.0)
    ledger.begin_waiting(A, "a2", 0.0)  # it waits already
    assert ledger.counter(A) == 80.0
    ledger.begin_waiting(C, "c1", 0.0)
    assert ledger.counter(C) == 80.0
    assert ledger.accounts[C].lifted == 80.0


def test_where_nobody_waits_the_last_that_did_is_the_measure() -> None:
    ledger = FairnessLedger()
    ledger.begin_waiting(B, "b1", 0.0)
    ledger.end_waiting(B, "b1", 0.0)
    ledger.report(ONE, said((B, 50.0)), 0.0)
    ledger.begin_waiting(A, "a1", 0.0)
    assert ledger.counter(A) == 50.0


def test_classes_have_counters_of_their_own() -> None:
    ledger = FairnessLedger()
    batch = "a", RequestClass.BATCH
    ledger.report(ONE, said((A, 50.0)), 0.0)
    ledger.begin_waiting(A, "a1", 0.0)
    ledger.begin_waiting(batch, "a2", 0.0)
    assert ledger.counter(batch) == 0.0


def test_the_gap_and_its_bound_are_made_of_what_instances_say() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said((A, 50.0)), 0.0)
    ledger.begin_waiting(B, "b1", 0.0)
    ledger.begin_waiting(A, "a1", 0.0)
    gap = ledger.gap(STANDARD)
    assert (gap.gap, gap.tenants) == (50.0, 2)
    alone = gap.bound
    assert alone == 100 + (100 + 10) + 10  # theta, the run-ahead, a step
    for number in range(1, 4):
        ledger.report(Source(f"i{number}", "x"), said(), 0.0)
    assert ledger.lease() == 100 / 3
    assert ledger.bound(STANDARD) == pytest.approx(
        100 + (100 / 3 + 10) + 3 * (100 / 3 + 10) + 4 * 10
    )
    ledger.ended(Source("i3", "x"), 0.0)
    assert ledger.lease() == 50


@pytest.mark.parametrize(("theta", "instances"), [(0.0, 1), (16.0, 2), (1024.0, 100)])
def test_no_lease_is_so_small_that_every_step_is_reported(theta: float, instances: int) -> None:
    ledger = FairnessLedger()
    for number in range(instances):
        report = ServiceReport(theta=theta, increment=640.0)
        ledger.report(Source(f"i{number}", "x"), report, 0.0)
    assert ledger.lease() == LEAST_LEASE * 640 == 40
    # What is hidden by it is in the bound, and little of it.
    bound = theta + (40 + 640) + (instances - 1) * (40 + 640) + instances * 640
    assert ledger.bound(STANDARD) == bound
    assert instances * 40 < 0.04 * bound


def test_the_least_lease_is_that_of_the_instance_that_gives_most() -> None:
    ledger = FairnessLedger()
    for number, increment in enumerate((16.0, 1600.0, 160.0)):
        report = ServiceReport(theta=0.0, increment=increment)
        ledger.report(Source(f"i{number}", "x"), report, 0.0)
    assert ledger.lease() == 100
    ledger.ended(Source("i1", "x"), 0.0)
    assert ledger.lease() == 10


@given(
    st.lists(
        st.tuples(
            st.sampled_from((ONE, TWO, Source("i2", "z"))),
            st.sampled_from(("report", "end", "resume", "expire")),
            st.sampled_from((0.0, 50.0, 100.0, 900.0)),
        ),
        max_size=20,
    )
)
def test_the_lease_follows_who_lives_and_what_they_say(events) -> None:
    ledger = FairnessLedger()
    thetas: dict[Source, float] = {}
    gone: set[Source] = set()
    for at, (source, what, theta) in enumerate(events):
        if what == "report":
            ledger.report(source, said((A, at), theta=theta), at)
            thetas[source] = theta
        elif what == "end":
            ledger.ended(source, at)
            gone |= {source} & thetas.keys()
        elif what == "resume":
            ledger.resumed(source)
            gone.discard(source)
        else:
            ledger.expire(at + 1.0, 0.0)
            thetas = {one: theta for one, theta in thetas.items() if one not in gone}
            gone.clear()
        live = [theta for one, theta in thetas.items() if one not in gone]
        most = max(live, default=0.0) / max(1, len(live) - 1)
        assert ledger.lease() == (max(LEAST_LEASE * 10, most) if live else math.inf)


def test_idle_accounts_and_old_sources_are_forgotten() -> None:
    ledger = FairnessLedger()
    ledger.report(ONE, said((A, 50.0), (B, 60.0)), 0.0)
    ledger.begin_waiting(B, "b", 1.0)
    ledger.ended(ONE, 1.0)
    ledger.expire(100.0, 600.0)
    assert len(ledger.accounts) == 2
    ledger.expire(1000.0, 600.0)
    assert list(ledger.accounts) == [B]
    assert not ledger.knows(ONE)


# ---- leases


def wire(ledger: FairnessLedger, source: Source, counters: LeasedCounters) -> bool:
    """A report, and what it is answered with."""
    ledger.report(source, counters.report(100.0, 10.0), 0.0)
    update = ledger.update_for(source)
    return update is not None and counters.take(update)


def test_a_view_is_the_ledger_and_what_was_charged_since() -> None:
    ledger = FairnessLedger(tenants={"a": TenantPolicy(2.0)})
    one, two = LeasedCounters(), LeasedCounters()
    one.charge(A, 10, 5)
    assert wire(ledger, ONE, one)
    two.charge(A, 8, 0)
    assert wire(ledger, TWO, two)
    assert two.counter(A) == 14.0
    assert one.counter(A) == 10.0
    one.charge(A, 4, 0)
    assert one.counter(A) == 12.0
    assert wire(ledger, ONE, one)
    assert one.counter(A) == ledger.counter(A) == 16.0
    assert not wire(ledger, ONE, one)  # nothing is new


def test_updates_hold_what_changed_and_fit_in_order_only() -> None:
    ledger = FairnessLedger()
    one = LeasedCounters()
    one.charge(A, 1, 0)
    one.charge(B, 1, 0)
    wire(ledger, ONE, one)
    one.charge(B, 1, 0)
    ledger.report(ONE, one.report(), 0.0)
    update = ledger.update_for(ONE)
    assert update is not None
    assert [state.account for state in update.accounts] == [B]
    stranger = LeasedCounters()
    assert not stranger.take(update)
    assert one.take(update)
    assert not one.take(update)


def test_a_used_up_lease_asks_for_a_report_once() -> None:
    counters = LeasedCounters()
    counters.take(LedgerUpdate(1, 0, 20.0, ()))
    counters.charge(A, 19, 0)
    assert not counters.due
    counters.charge(A, 0, 1)
    assert counters.due
    assert counters.report().leased
    assert not counters.due
    counters.charge(A, 19, 0)
    assert not counters.due
    assert not counters.report().leased


def sent(version: int, lease: float, counters: tuple[float, float], weight: float) -> LedgerUpdate:
    states = (AccountState(A, counters[0], False, weight), AccountState(B, counters[1], True, 1.0))
    return LedgerUpdate(version, 0, lease, states)


numbers = st.integers(0, 100).map(float)


@given(
    st.tuples(numbers, numbers), st.lists(st.tuples(st.sampled_from((A, B)), st.integers(0, 30)))
)
def test_charges_may_come_late_where_a_ledger_changes_no_lease(now, charges) -> None:
    early, late = LeasedCounters(), LeasedCounters()
    news = sent(2, 40.0, now, 2.0)
    for counters in (early, late):
        assert counters.take(sent(1, 40.0, (0.0, 0.0), 2.0))
        assert not counters.changes_leases(news)
    for account, output in charges:
        early.charge(account, 0, output)
    early.take(news)
    late.take(news)
    for account, output in charges:
        late.charge(account, 0, output)
    for account in (A, B):
        assert early.counter(account) == late.counter(account)
        assert early.left(account) == late.left(account)
    assert early.report() == late.report()


def test_another_lease_or_weight_changes_what_may_be_charged() -> None:
    counters = LeasedCounters()
    counters.take(sent(1, 40.0, (0.0, 0.0), 2.0))
    assert counters.changes_leases(sent(2, 30.0, (0.0, 0.0), 2.0))
    assert counters.changes_leases(sent(2, 40.0, (0.0, 0.0), 1.0))


def test_a_tenant_unknown_to_the_ledger_is_lifted_where_it_waits() -> None:
    ledger = FairnessLedger()
    counters = LeasedCounters()
    ledger.begin_waiting(B, "b", 0.0)
    counters.charge(B, 500, 0)
    wire(ledger, ONE, counters)
    counters.waiting_begins(A, "a")
    assert counters.counter(A) == 500.0
    ledger.begin_waiting(A, "a", 0.0)
    counters.charge(A, 5, 0)
    assert wire(ledger, ONE, counters)
    assert counters.counter(A) == ledger.counter(A) == 505.0


def test_without_a_ledger_an_instance_lifts_as_it_does_alone() -> None:
    counters = LeasedCounters()
    counters.charge(A, 100, 0)
    counters.waiting_begins(A, "a")
    counters.waiting_ends(A, "a")
    counters.waiting_begins(B, "b")
    assert counters.counter(B) == 100.0


# ---- restarts


def used(version: int) -> tuple[FairnessLedger, dict[Source, LeasedCounters]]:
    ledger = FairnessLedger(version)
    nodes = {ONE: LeasedCounters(), TWO: LeasedCounters()}
    for source, counters in nodes.items():
        counters.charge(A, 100, 0)
        counters.charge(B, 40, 0)
        wire(ledger, source, counters)
    for source, counters in nodes.items():
        wire(ledger, source, counters)
    return ledger, nodes


@pytest.mark.parametrize("order", list(itertools.permutations((ONE, TWO))))
def test_a_new_ledger_is_based_on_the_newest_copy(order: tuple[Source, Source]) -> None:
    old, nodes = used(1_000)
    nodes[ONE].charge(A, 7, 0)
    wire(old, ONE, nodes[ONE])
    nodes[TWO].charge(A, 3, 0)  # not reported to the old one
    new = FairnessLedger(1_000_000)
    for source in order:
        counters = nodes[source]
        assert new.report(source, counters.report(), 0.0)  # its copy is wanted
        assert new.update_for(source) is None
        new.take_copy(counters.copy(), source, 0.0)
    for source, counters in nodes.items():
        new.report(source, counters.report(), 0.0)
    assert new.counter(A) == old.counter(A) + 3 == 210.0
    assert new.counter(B) == 80.0
    for source, counters in nodes.items():
        assert wire(new, source, counters)
        assert counters.counter(A) == 210.0


def test_who_came_up_before_the_copies_is_not_left_far_behind() -> None:
    _, nodes = used(1_000)
    new = FairnessLedger(1_000_000)
    new.begin_waiting(C, "c", 0.0)
    nodes[ONE].waiting_begins(B, "b")
    new.begin_waiting(B, "b", 0.0)
    new.take_copy(nodes[ONE].copy(), ONE, 0.0)
    assert new.counter(B) == 80.0
    assert new.counter(C) == 80.0


def test_the_state_outlives_the_ledger() -> None:
    old, nodes = used(1_000)
    state = json.loads(json.dumps(old.export_state()))
    new = FairnessLedger(1_000_000)
    new.restore_state(state, 0.0)
    assert {account: new.counter(account) for account in (A, B)} == {A: 200.0, B: 80.0}
    for source, counters in nodes.items():
        counters.charge(B, 1, 0)
        new.report(source, counters.report(), 0.0)
        new.take_copy(counters.copy(), source, 0.0)
    assert new.counter(B) == 82.0
    new.restore_state({**state, "version": 999}, 0.0)  # an older one changes nothing
    assert new.counter(B) == 82.0
    with pytest.raises((KeyError, TypeError, ValueError)):
        new.restore_state({"version": 1}, 0.0)


def ledgers(actions: list) -> list[str]:
    return [one.instance_id for one in actions if isinstance(one, SendLedger)]


def with_service(name: str, number: int, said: ServiceReport):
    return replace(report(name, number), service=said)


def test_a_used_up_lease_is_told_to_every_instance() -> None:
    core = dispatcher()
    for at, name in enumerate(("i0", "i1", "i2")):
        core.handle(Joined(info(name)), 0.0)
        found = core.handle(Reported(with_service(name, 1, said((A, 5.0)))), 0.1 * at)
        assert ledgers(found) == [name]
    used_up = said((A, 50.0), leased=True, ledger=core.ledger.version)
    assert ledgers(core.handle(Reported(with_service("i0", 2, used_up)), 1.0)) == ["i0", "i1", "i2"]
    assert core.ledger.lease_reports == 1
    assert ledgers(core.handle(Tick(), 2.0)) == []


def test_a_ledger_that_is_due_too_early_is_sent_later() -> None:
    core = dispatcher()
    core.handle(Joined(info("i0")), 0.0)
    core.handle(Joined(info("i1")), 0.0)
    assert ledgers(core.handle(Reported(with_service("i0", 1, said((A, 5.0)))), 1.0)) == ["i0"]
    assert ledgers(core.handle(Reported(with_service("i1", 1, said((A, 5.0)))), 1.03)) == ["i1"]
    assert ledgers(core.handle(Reported(with_service("i0", 2, said((A, 9.0)))), 1.035)) == []
    assert ledgers(core.handle(Reported(with_service("i1", 2, said((A, 9.0)))), 1.04)) == []
    assert ledgers(core.handle(Tick(), 1.045)) == []
    assert ledgers(core.handle(Tick(), 1.06)) == ["i0"]
    assert ledgers(core.handle(Tick(), 1.07)) == []
    assert ledgers(core.handle(Tick(), 1.09)) == ["i1"]


def test_a_restarted_dispatcher_asks_for_copies() -> None:
    _, nodes = used(1_000)
    core = Dispatcher(DispatcherConfig(), random.Random(0), 1_000_000)
    core.handle(Joined(info("i0", "x")), 0.0)
    told = with_service("i0", 1, nodes[ONE].report())
    told = replace(told, incarnation="x")
    actions = core.handle(Reported(told), 0.1)
    assert [one for one in actions if isinstance(one, FetchLedger)] == [FetchLedger("i0")]
    assert ledgers(actions) == []
    actions = core.handle(LedgerCopied("i0", "x", nodes[ONE].copy()), 0.2)
    assert ledgers(actions) == ["i0"]
    assert core.ledger.counter(A) == 200.0


def test_tenants_that_operators_changed_outlive_the_dispatcher() -> None:
    core = dispatcher()
    core.set_tenant("a", {"weight": 3, "max_queued": 5})
    later = Dispatcher(DispatcherConfig(), random.Random(0), 1_000_000)
    later.restore_state(core.export_state(0.0), 0.0)
    assert later.ledger.policy("a") == TenantPolicy(3.0, 5)
    with pytest.raises(ValueError, match="weight"):
        core.set_tenant("a", {"weight": 0})


# ---- what gateways saw


def test_gateways_count_the_prompt_with_the_first_token() -> None:
    served = ServedService()
    peer = Peer("i0", "x")
    served.note(peer, A, 10, 1)
    served.note(peer, A, 0, 4)
    served.note(peer, B, 0, 1)
    assert served.of(peer) == [(A, service(10, 5)), (B, 2.0)]
    served.forget(peer)
    assert served.of(peer) == []


# ---- the file of tenants


def test_a_file_of_tenants(tmp_path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(
        "default: {weight: 2, max_queued: 9}\n"
        "tenants:\n  a: {weight: 4}\n  b: {classes: [batch, standard]}\n  c:\n"
    )
    found = load_tenants(str(path))
    assert found.default == TenantPolicy(2.0, 9)
    assert found.tenants == {
        "a": TenantPolicy(4.0, 9),
        "b": TenantPolicy(2.0, 9, (RequestClass.STANDARD, RequestClass.BATCH)),
        "c": TenantPolicy(2.0, 9),
    }
    for policy in found.tenants.values():
        assert policy_from_json(policy_to_json(policy), TenantPolicy()) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected the keys"),
        ("weights: {}\n", "expected the keys"),
        ("tenants: [a]\n", "expected a map from names"),
        ("tenants: {a: 3}\n", "a: expected a map"),
        ("tenants: {a: {wieght: 3}}\n", "a: unknown field 'wieght'"),
        ("tenants: {a: {weight: x}}\n", "a: weight 'x' is not a number"),
        ("tenants: {a: {weight: 0}}\n", "a: weight 0.0 is not"),
        ("tenants: {a: {max_queued: -1}}\n", "a: max_queued -1"),
        ("default: {max_queued: 1.5}\n", "default: max_queued 1.5 is not a whole number"),
        ("default: {classes: [urgent]}\n", "default: classes"),
        ("default: {classes: []}\n", "at least one class"),
        ("a: [\n", "not YAML"),
    ],
)
def test_errors_in_the_file_of_tenants_say_where(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"tenants\.yaml") as caught:
        load_tenants(str(path))
    assert message in str(caught.value)


def test_a_missing_file_of_tenants() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tenants("no/such/file.yaml")
