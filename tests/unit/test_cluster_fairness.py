"""Service follows weights across instances: the ledger's promises, on small random clusters.

The dispatcher's core and the instances' schedulers are the real ones.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatcher.fairness import FairnessLedger
from instance.config import SchedulerConfig
from instance.fairness import service
from instance.priority import PreemptionReason
from instance.request import Account, RequestClass
from tests.unit.fair_cluster import FairCluster, Faults

STANDARD = RequestClass.STANDARD
seeds = st.integers(0, 2**32)
examples = settings(max_examples=12)


def scheduler_config(rng: random.Random, **fixed: float) -> SchedulerConfig:
    chosen = {
        "max_num_seqs": rng.choice((2, 4, 8)),
        "max_num_batched_tokens": rng.choice((16, 32, 64)),
        "priority_interval": rng.randint(1, 3),
        "theta": rng.choice((None, 20.0, 100.0, 400.0)),
        **fixed,
    }
    return SchedulerConfig(max_model_len=400, enable_prefix_caching=False, **chosen)


def random_cluster(rng: random.Random, most: int = 5, **fixed: object) -> FairCluster:
    tenants = rng.randint(2, 4)
    chosen = {
        "weights": {f"t{n}": float(rng.choice((1, 1, 2, 3, 4))) for n in range(tenants)},
        "instances": rng.randint(1, most),
        "num_blocks": rng.choice((30, 60, 200)),
        "run_ahead": rng.randint(1, 4),
        "report_rounds": rng.randint(1, 8),
        "scheduler": scheduler_config(rng),
        **fixed,
    }
    return FairCluster(rng, **chosen)


def sizes(rng: random.Random, cluster: FairCluster) -> dict[str, tuple[int, int]]:
    """Longest prompt and output of each tenant."""
    return {name: (rng.choice((8, 40, 100)), rng.choice((8, 30, 80))) for name in cluster.weights}


def flood(cluster: FairCluster, tenant: str, prompt: int, output: int) -> None:
    """Let a tenant have more waiting than all instances could take up."""
    rng = cluster.rng
    wanted = 2 * len(cluster.nodes) * cluster.scheduler.max_num_seqs
    while cluster.backlog(tenant) < min(wanted, 24):
        cluster.submit(tenant, rng.randint(1, prompt), rng.randint(1, output))


def spread(cluster: FairCluster) -> float:
    """How far apart the tenants' service by weight is."""
    ledger = cluster.core.ledger
    by_weight = [ledger.accounts[name, STANDARD].service / w for name, w in cluster.weights.items()]
    return max(by_weight) - min(by_weight)


# ---- the bound


@examples
@given(seeds)
def test_waiting_tenants_stay_together_and_no_instance_idles(seed: int) -> None:
    """I3, I5, I7: equal demand, any weights, with random migrations."""
    rng = random.Random(seed)
    cluster = random_cluster(rng)
    longest = sizes(rng, cluster)
    chance = rng.choice((0.0, 0.05, 0.3))
    for _ in range(120):
        for tenant, size in longest.items():
            flood(cluster, tenant, *size)
        cluster.migrate_some(chance)
        cluster.advance()
    assert cluster.gap <= 1
    assert cluster.idle_nodes == 0
    assert sum(node.idle_with_waiting for node in cluster.nodes.values()) == 0
    cluster.settle()
    assert spread(cluster) <= 2 * cluster.core.ledger.bound(STANDARD)
    for node in cluster.nodes.values():
        node.scheduler.check_integrity()


@examples
@given(seeds)
def test_idle_time_gives_no_credit(seed: int) -> None:
    """I4: tenants come and go, and who comes back is not ahead of those who waited."""
    rng = random.Random(seed)
    cluster = random_cluster(rng, 4)
    longest = sizes(rng, cluster)
    on = dict.fromkeys(longest, True)
    for _ in range(200):
        for tenant, size in longest.items():
            on[tenant] ^= rng.random() < 0.02
            if on[tenant]:
                flood(cluster, tenant, *size)
        cluster.advance()
    assert cluster.gap <= 1


def behind_while_it_runs(rng: random.Random) -> FairCluster:
    """A tenant waits for nothing while its one long request runs, then waits again."""
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=16,
        max_model_len=900,
        enable_prefix_caching=False,
        priority_interval=1,
        theta=16.0,
    )
    weights = {"a": 1.0, "b": 1.0}
    cluster = FairCluster(rng, weights, instances=2, scheduler=config, report_rounds=1)
    cluster.submit("a", 2, 600)
    cluster.advance()
    for number in range(250):
        flood(cluster, "b", 8, 8)
        if number == 220:
            for _ in range(20):
                cluster.submit("a", 8, 8)
        cluster.advance()
    return cluster


def test_the_lift_does_not_ask_what_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is broken by a lift of those tenants only that run nothing."""
    right = behind_while_it_runs(random.Random(1))
    assert 0 < right.gap <= 1
    begin = FairnessLedger.begin_waiting

    def lift_only_who_runs_nothing(
        self: FairnessLedger, account: Account, request_id: str, now: float
    ) -> None:
        # Of this scenario's tenants "a" always runs something.
        if account[0] == "a":
            self._book(account, now).waiting.add(request_id)
        else:
            begin(self, account, request_id, now)

    monkeypatch.setattr(FairnessLedger, "begin_waiting", lift_only_who_runs_nothing)
    assert behind_while_it_runs(random.Random(1)).gap > 1.5


def test_service_does_not_depend_on_where_requests_were_placed() -> None:
    """I12: all of a tenant's work was sent to the one instance there was."""
    rng = random.Random(3)
    cluster = FairCluster(rng, {"a": 1.0, "b": 1.0}, instances=1, run_ahead=3)
    for _ in range(20):
        flood(cluster, "a", 30, 30)
        cluster.advance()
    for name in ("i1", "i2", "i3"):
        cluster.boot(name)
    for _ in range(200):
        flood(cluster, "a", 30, 30)
        flood(cluster, "b", 30, 30)
        cluster.advance()
    assert cluster.gap <= 1


@examples
@given(seeds)
def test_moving_requests_changes_nobodys_share(seed: int) -> None:
    """I8: with and without migrations the shares are those of the weights, within G."""
    moved = []
    for chance in (0.0, 0.5):
        rng = random.Random(seed)
        cluster = random_cluster(rng, 3, instances=3)
        longest = sizes(rng, cluster)
        for _ in range(80):
            for tenant, size in longest.items():
                flood(cluster, tenant, *size)
            cluster.migrate_some(chance)
            cluster.advance()
        moved.append(cluster.migrations)
        cluster.settle()
        assert spread(cluster) <= 2 * cluster.core.ledger.bound(STANDARD)
    assert moved[0] == 0 < moved[1]


# ---- accounting


@examples
@given(seeds)
def test_every_token_is_charged_once(seed: int) -> None:
    """I1, I2, I6, I9: preempted, moved, with reports lost, doubled, late: each request ends,
    and the ledger holds what they are worth, and lifts."""
    rng = random.Random(seed)
    faults = Faults(lost=rng.choice((0.0, 0.3)), doubled=0.2, late=rng.choice((0.0, 0.3)))
    cluster = random_cluster(rng, num_blocks=30, faults=faults)
    longest = sizes(rng, cluster)
    for _ in range(40):
        for tenant, (prompt, output) in longest.items():
            if rng.random() < 0.5:
                cluster.submit(tenant, rng.randint(1, prompt), rng.randint(1, output))
        cluster.migrate_some(0.2)
        cluster.advance()
    finish(cluster)
    ledger = cluster.core.ledger
    for tenant, weight in cluster.weights.items():
        worth = sum(
            service(len(job.request.prompt), job.request.params.max_tokens)
            for job in cluster.jobs.values()
            if job.request.tenant == tenant
        )
        assert cluster.served(tenant) == worth
        book = ledger.accounts.get((tenant, STANDARD))
        assert (0 if book is None else book.service) == worth
        if book is not None:
            assert math.isclose(book.counter, worth / weight + book.lifted, abs_tol=1e-6)
            assert not book.waiting
    assert len(cluster.core.placing.waiting) == 0


def finish(cluster: FairCluster) -> None:
    """Let everything end; a limit in rounds stands for "never"."""
    for _ in range(6000):
        if all(job.ended is not None for job in cluster.jobs.values()):
            break
        cluster.advance()
    assert all(job.ended is not None for job in cluster.jobs.values())
    assert not cluster.refused
    cluster.settle()


@examples
@given(seeds)
def test_a_death_costs_the_ledger_no_more_than_what_nobody_saw(seed: int) -> None:
    """I1: what a dead instance charged and had not reported comes from the homes' counts."""
    rng = random.Random(seed)
    cluster = random_cluster(rng, report_rounds=50)
    longest = sizes(rng, cluster)
    for _ in range(60):
        for tenant, (prompt, output) in longest.items():
            if rng.random() < 0.5:
                cluster.submit(tenant, rng.randint(1, prompt), rng.randint(1, output))
        if rng.random() < 0.05:
            cluster.crash(rng.choice(list(cluster.nodes)))
        cluster.advance()
    finish(cluster)
    for tenant in cluster.weights:
        jobs = [job for job in cluster.jobs.values() if job.request.tenant == tenant]
        worth = cluster.served(tenant)
        # A prompt on which a dead instance had worked without a token to show is paid again.
        again = sum(job.replays * len(job.request.prompt) for job in jobs)
        book = cluster.core.ledger.accounts.get((tenant, STANDARD))
        charged = 0.0 if book is None else book.service
        assert worth <= charged <= worth + again


@examples
@given(seeds)
def test_a_restarted_dispatcher_knows_what_instances_return(seed: int) -> None:
    """Its error is at most what the instances had not reported, and fairness goes on."""
    rng = random.Random(seed)
    cluster = random_cluster(rng)
    longest = sizes(rng, cluster)
    for number in range(120):
        for tenant, size in longest.items():
            flood(cluster, tenant, *size)
        if number == 60:
            accounts = list(cluster.core.ledger.accounts)
            before = {account: cluster.true_counter(account) for account in accounts}
            ledger = cluster.core.ledger
            error = len(cluster.nodes) * (ledger.lease() + ledger.bound(STANDARD))
            cluster.restart_dispatcher()
            for account in accounts:
                assert abs(cluster.true_counter(account) - before[account]) <= error
            cluster.gap = 0.0
        cluster.advance()
    assert cluster.gap <= 2


# ---- latency and preemption


def test_a_tenant_below_its_share_hardly_waits() -> None:
    """I10: one floods, the other asks now and then."""
    rng = random.Random(5)
    cluster = FairCluster(rng, {"flood": 1.0, "small": 1.0}, instances=2)
    for number in range(400):
        flood(cluster, "flood", 30, 30)
        if number % 10 == 0:
            cluster.submit("small", 8, 4)
        cluster.advance()
    waits: dict[str, list[int]] = {"flood": [], "small": []}
    for job in cluster.jobs.values():
        started = cluster.round if job.started is None else job.started
        waits[job.request.tenant].append(started - job.arrived)
    assert max(waits["small"]) * 2 < sum(waits["flood"]) / len(waits["flood"])


def test_preemptions_for_fairness_do_not_thrash() -> None:
    """I11: each needs a gap beyond theta, and a batch's worth of service to open it anew."""
    rng = random.Random(7)
    cluster = FairCluster(
        rng,
        {"a": 1.0, "b": 1.0},
        instances=2,
        scheduler=SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_model_len=400,
            enable_prefix_caching=False,
            priority_interval=1,
            theta=100.0,
        ),
    )
    for _ in range(300):
        flood(cluster, "a", 80, 4)
        flood(cluster, "b", 4, 80)
        cluster.advance()
    preempted = sum(
        node.scheduler.figures.preemptions[PreemptionReason.FAIRNESS]
        for node in cluster.nodes.values()
    )
    given_away = sum(cluster.core.ledger.counter((name, STANDARD)) for name in cluster.weights)
    batch = cluster.scheduler.max_num_seqs
    assert preempted <= batch * given_away / 100.0


def test_classes_go_first_and_are_fair_within() -> None:
    cluster = FairCluster(random.Random(9), {"a": 1.0, "b": 1.0}, instances=2)
    for _ in range(60):
        flood(cluster, "a", 20, 20)
        cluster.advance()
    urgent = [cluster.submit("b", 10, 5, RequestClass.INTERACTIVE) for _ in range(4)]
    for _ in range(40):
        flood(cluster, "a", 20, 20)
        cluster.advance()
    assert all(job.ended is not None for job in urgent)
    assert cluster.gap <= 1
