"""Ownership under random schedules: every fault at every stage of the protocol."""

from __future__ import annotations

import collections

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.unit.migration_explorer import FAULTS, PAIRS, STAGES, Explorer, explore_pair
from tests.unit.migration_model import Instance

HITS = 6
ANY = st.integers(0, 1 << 16)


@pytest.mark.parametrize("stage", STAGES)
def test_every_fault_at_every_stage(stage: str) -> None:
    hits = {
        fault: explore_pair((stage, fault), HITS)[0] for where, fault in PAIRS if where == stage
    }
    table = "\n".join(f"{stage:24} {fault:28} {count}" for fault, count in hits.items())
    assert all(count == HITS for count in hits.values()), f"not reached often enough:\n{table}"


def test_random_schedules_end_in_every_way() -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(1000):
        outcomes += Explorer(seed).run(300).outcomes
    assert set(outcomes) >= {
        "moved",
        "taken back",
        "superseded",
        "refused",
        "preempted",
        "copy failed",
        "sequence ended",
        "home gone",
        "admitted meanwhile",
        "cancelled by the home",
        "destination gave up",
        "link to the destination lost",
        "no answer from the destination",
    }


def test_a_schedule_depends_on_its_seed_alone() -> None:
    first, again = (Explorer("seed").run() for _ in range(2))
    assert first.now == again.now
    assert first.outcomes == again.outcomes
    assert [gateway.epochs for gateway in first.gateways] == [
        gateway.epochs for gateway in again.gateways
    ]


class Schedules(RuleBasedStateMachine):
    """The same world with the choices made, and shrunk, by Hypothesis."""

    @initialize(seed=ANY)
    def begin(self, seed: int) -> None:
        self.explorer = Explorer(seed)
        self.world = self.explorer.world
        self.explorer.open_client()

    @rule()
    def request(self) -> None:
        if len(self.world.gateways[0].clients) < 4:
            self.explorer.open_client()

    @rule(which=ANY)
    def message(self, which: int) -> None:
        ready = self.world.deliverable()
        if ready:
            self.explorer.deliver(ready[which % len(ready)])

    @rule(which=ANY)
    def step(self, which: int) -> None:
        self.explorer.step(self._running(which))

    @rule(which=ANY)
    def connect(self, which: int) -> None:
        self.explorer.connect(self._running(which))

    @rule(which=ANY)
    def migrate(self, which: int) -> None:
        self.explorer.migrate(self._running(which))

    @rule()
    def place(self) -> None:
        for gateway in self.world.gateways:
            if gateway.places:
                self.explorer.place(gateway)

    @precondition(lambda self: self.world.copies)
    @rule(which=ANY)
    def copy(self, which: int) -> None:
        self.world.advance_copy(self.world.copies[which % len(self.world.copies)])

    @rule()
    def time(self) -> None:
        self.explorer.pass_time()

    @rule(which=ANY, fault=st.sampled_from(sorted(FAULTS)))
    def fault(self, which: int, fault: str) -> None:
        attempts = list(self.explorer.attempts())
        if attempts:
            self.explorer.inject(attempts[which % len(attempts)], fault)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.quiesce()

    def _running(self, which: int) -> Instance:
        running = [one for one in self.world.instances.values() if not one.stopped]
        if not running:
            self.explorer.pass_time()
            running = list(self.world.instances.values())
            for instance in running:
                instance.stopped = False
        return running[which % len(running)]


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=60,
    stateful_step_count=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
