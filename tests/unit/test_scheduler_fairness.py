"""What tenants are promised by one instance, in random schedules."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.fairness import service
from instance.priority import PreemptionReason
from instance.request import Account, FinishReason, RequestClass, Sequence, SequenceStatus
from tests.unit.tenant_driver import STANDARD, Recording, Tenants

FAIRNESS = PreemptionReason.FAIRNESS


class LiftsOnlyTheIdle(Recording):
    """The tempting mistake: whoever still runs something is not lifted."""

    tenants: Tenants

    def waiting_begins(self, account: Account, request_id: str) -> None:
        if any(one.account == account for one in self.tenants.scheduler.running):
            self._entry(account).waiting.add(request_id)
        else:
            super().waiting_begins(account, request_id)


def contest(seed: int, steps: int) -> Tenants:
    """Tenants of random weight and demand, who come and go, on a random instance."""
    rng = random.Random(seed)
    names = "abcd"[: rng.randint(2, 4)]
    weights = {name: float(rng.choice((1, 1, 2, 4))) for name in names}
    seats = rng.choice((1, 2, 4, 8, 16))
    theta = rng.choice((0.0, 20.0, 100.0, 500.0, None))
    tenants = Tenants(
        weights,
        rng.choice((3000, 40 * seats + 60)),
        max_num_seqs=seats,
        max_num_batched_tokens=max(seats, rng.choice((8, 32, 64))),
        theta=theta,
        priority_interval=rng.choice((1, 1, 4, 8)),
        # Without it a victim's work is done twice, which only a theta of twice that allows.
        enable_prefix_caching=theta is not None,
    )
    sizes = {name: (rng.choice((1, 30, 150)), rng.choice((2, 30, 150))) for name in names}
    active = set(names)
    for _ in range(steps):
        for name in names:
            if rng.random() < 0.01:
                active ^= {name}
        tenants.keep_waiting(rng, {name: sizes[name] for name in names if name in active})
        tenants.step()
    return tenants


# ---- promises


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_waiting_tenants_stay_close_and_nothing_idles(seed: int) -> None:
    tenants = contest(seed, 250)
    assert tenants.gap <= tenants.bound
    assert tenants.spread <= 2 * tenants.bound
    assert tenants.idle == 0
    tenants.run()


@pytest.mark.parametrize("wrong", [False, True])
def test_the_bound_tells_a_wrong_lift(wrong: bool) -> None:
    """One long request of a runs all the time while only b has some that wait."""
    weights = {"a": 1.0, "b": 1.0}
    counters = LiftsOnlyTheIdle(weights) if wrong else Recording(weights)
    tenants = Tenants(
        weights,
        counters=counters,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        theta=100.0,
        priority_interval=1,
    )
    if isinstance(counters, LiftsOnlyTheIdle):
        counters.tenants = tenants
    rng = random.Random(0)
    tenants.submit("a", 1, 390)
    for _ in range(250):
        tenants.keep_waiting(rng, {"b": (1, 20)})
        tenants.step()
    assert tenants.gap <= tenants.bound
    for _ in range(50):
        tenants.keep_waiting(rng, {"a": (1, 20), "b": (1, 20)})
        tenants.step()
    assert (tenants.gap > 2 * tenants.bound) if wrong else (tenants.gap <= tenants.bound)


def test_service_follows_weights_under_equal_demand() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    tenants = Tenants(weights, max_num_seqs=8, max_num_batched_tokens=64, theta=200.0)
    rng = random.Random(1)
    for _ in range(3000):
        tenants.keep_waiting(rng, dict.fromkeys(weights, (40, 40)))
        tenants.step()
    charged = {name: tenants.counters.charged[name, STANDARD] for name in weights}
    assert min(charged.values()) > 10 * tenants.bound
    shares = [charged[name] / weight for name, weight in weights.items()]
    assert max(shares) - min(shares) <= 2 * tenants.bound
    assert tenants.idle == 0


def test_who_was_away_gains_nothing_by_it() -> None:
    tenants = Tenants({"a": 1.0, "b": 1.0}, max_num_seqs=4, max_num_batched_tokens=32, theta=50.0)
    rng = random.Random(2)
    for _ in range(800):
        tenants.keep_waiting(rng, {"b": (20, 20)})
        tenants.step()
    before = dict(tenants.counters.charged)
    for _ in range(400):
        tenants.keep_waiting(rng, {"a": (20, 20), "b": (20, 20)})
        tenants.step()
    gained = {
        name: tenants.counters.charged[name, STANDARD] - before.get((name, STANDARD), 0)
        for name in "ab"
    }
    assert gained["a"] - gained["b"] <= 2 * tenants.bound
    assert gained["b"] > 0


@pytest.mark.parametrize("theta", [0.0, 40.0, 400.0])
def test_taking_turns_costs_theta_each_time(theta: float) -> None:
    tenants = Tenants({"a": 1.0, "b": 1.0}, max_num_seqs=1, theta=theta, priority_interval=1)
    tenants.submit("a", 4, 300)
    tenants.submit("b", 4, 300)
    tenants.run()
    switches = tenants.count(FAIRNESS)
    total = tenants.counters.charged.total()
    # Before each change of turns one tenant got further ahead by more than theta.
    assert switches * max(theta, 2.0) <= total
    assert switches > 0
    assert tenants.preempted.count(tenants.preempted[0]) <= switches


# ---- charges


class Rough(Tenants):
    """Sequences are aborted, taken out, put back, and moved on to other blocks."""

    def __init__(self, seed: int, *args: object, aborts: bool, **config: object) -> None:
        super().__init__(*args, **config)  # type: ignore[arg-type]
        self.rng = random.Random(seed)
        self.aborts = aborts
        self.away: list[Sequence] = []
        self.silent: list[Sequence] = []
        self.moved = 0

    def at_boundary(self) -> None:
        rng, core = self.rng, self.scheduler
        self.away = [one for one in self.away if one.status is SequenceStatus.HANDOVER]
        if self.away and rng.random() < 0.5:
            self._come_back(self.away.pop())
        queue = rng.choice((core.running, core.waiting))
        if queue and rng.random() < 0.15:
            sequence = rng.choice(queue)
            if sequence.silent:
                return
            if self.aborts and rng.random() < 0.3:
                core.abort(sequence.request_id)
            else:
                # A row of the plan is dropped, so it has nothing in flight.
                self.take_out(sequence)
                self.away.append(sequence)

    def _come_back(self, sequence: Sequence) -> None:
        core = self.scheduler
        if self.rng.random() < 0.5:
            core.put_back(sequence)
            return
        arrived = Sequence.start(
            sequence.request, epoch=sequence.epoch + 1, emitted=tuple(sequence.output)
        )
        arrived.charged_prompt = sequence.charged_prompt
        arrived.charged_output = sequence.charged_output
        arrived.num_cached = sequence.num_cached
        blocks = None
        if sequence.num_written:
            blocks = self.pool.allocate(len(sequence.block_table))
            if blocks is None:
                core.put_back(sequence)
                return
            arrived.block_table = blocks
            arrived.num_computed = arrived.num_written = sequence.num_written
        core.finish(sequence, FinishReason.NOT_FINISHED)
        (core.insert if blocks else core.add)(arrived)
        arrived.silent = bool(blocks) and self.rng.random() < 0.5
        if arrived.silent:
            self.silent.append(arrived)
        self.moved += 1

    def step(self) -> None:
        super().step()
        if self.silent and self.rng.random() < 0.4:
            self.scheduler.grant(self.silent.pop())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from((22, 30, 60)),
    seats=st.sampled_from((2, 5)),
)
def test_a_request_costs_the_same_whatever_happens_to_it(
    seed: int, num_blocks: int, seats: int
) -> None:
    """Each request has a tenant of its own, so the accounts show what each one paid."""
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 40), rng.randint(1, 30)) for _ in range(16)]
    weights = {f"t{number}": rng.choice((0.5, 1.0, 2.0)) for number in range(len(sizes))}
    rough = Rough(
        seed,
        weights,
        num_blocks,
        aborts=False,
        max_num_seqs=seats,
        max_num_batched_tokens=12,
        theta=rng.choice((0.0, 10.0, 60.0)),
        priority_interval=rng.choice((1, 5)),
    )
    for number, (prompt, output) in enumerate(sizes):
        rough.submit(f"t{number}", prompt, output, rng.choice(list(RequestClass)))
    while rough.scheduler.sequences or rough.silent:
        assert rough.steps < 20_000, "sequences starve"
        rough.step()
    rough.run()
    paid = {account[0]: units for account, units in rough.counters.charged.items()}
    assert paid == {
        f"t{number}": int(service(prompt, output)) for number, (prompt, output) in enumerate(sizes)
    }
    books = sum(rough.counters.counter((t, c)) for t in weights for c in RequestClass)
    assert books == sum(paid[t] / weights[t] for t in weights) + rough.counters.lifted
    assert not any(rough.counters.waiting(one) for one in RequestClass)


def test_a_long_rough_run_meets_every_case() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    rough = Rough(
        4,
        weights,
        70,
        aborts=True,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        theta=30.0,
        priority_interval=2,
    )
    rng = random.Random(3)
    for _ in range(3000):
        for tenant in weights:
            if len(rough.scheduler.waiting) < 9 and rng.random() < 0.2:
                request_class = rng.choice((STANDARD, STANDARD, *RequestClass))
                rough.submit(tenant, rng.randint(1, 60), rng.randint(1, 40), request_class)
        rough.step()
    counted = rough.scheduler.figures
    assert all(counted.preemptions[reason] > 5 for reason in PreemptionReason)
    assert counted.pauses > 5
    assert rough.moved > 50
    assert rough.counters.system > 0
    books = sum(rough.counters.counter((t, c)) for t in weights for c in RequestClass)
    charged = sum(units / weights[t] for (t, _), units in rough.counters.charged.items())
    assert books == charged + rough.counters.lifted
    while rough.scheduler.sequences or rough.silent:
        assert rough.steps < 30_000, "sequences starve"
        rough.step()
    rough.run()


def test_tenants_take_turns_at_prefill_between_two_readings() -> None:
    """Who was just given a prompt is ahead, however long ago the counters were due."""
    world = Tenants(
        {"a": 1.0, "b": 1.0}, max_num_batched_tokens=8, priority_interval=1000, theta=math.inf
    )
    for tenant in "aab":
        world.submit(tenant, 8, 1)
    for _ in range(3):
        world.submit("a", 8, 1)
        world.submit("b", 8, 1)
    order = []
    while world.scheduler.has_work():
        before = set(world.scheduler.sequences)
        world.step()
        order += sorted(before - set(world.scheduler.sequences))
    tenants = [name[0] for name in order]
    assert len(tenants) == 9
    for end in range(2, 9):
        assert abs(tenants[:end].count("a") - tenants[:end].count("b")) <= 1


def test_tenants_take_turns_at_entering_within_a_step() -> None:
    world = Tenants({"a": 1.0, "b": 2.0}, max_num_batched_tokens=100, theta=math.inf)
    for tenant in "aaaabbbb":
        world.submit(tenant, 15, 5)
    entered = [row.sequence.request.tenant for row in world.scheduler.schedule().rows]
    assert entered == list("abbabba")
