"""The simulator: determinism, nothing lost, and nothing seen before it is there."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.dispatcher.scaling import ScalingConfig
from cluster.simulation.answers import Answers
from cluster.simulation.device import device
from cluster.simulation.scatter import Scatter
from cluster.simulation.simulation import Death
from cluster.simulation.workloads.records import Span, WorkloadRequest
from instance.load import Role
from instance.request import Request, SamplingParams, Sequence
from tests.unit.simulating import Decisions, profile, scenario, simulate, summary, workload


def test_the_same_seed_gives_the_same_run() -> None:
    one, other = (simulate(scenario(placement="random"), workload())[1] for _ in range(2))
    assert summary(one) == summary(other)
    different = simulate(scenario(placement="random", seed=1), workload())[1]
    assert summary(different) != summary(one)


SCATTERS = (Scatter((0.4, 0.9, 1.2, 1.5), 0.3), Scatter((0.75, 1.0, 1.25), 0.004))


def test_steps_that_scatter_are_a_run_of_their_own_by_the_seed() -> None:
    asked = workload()
    scattered, again, other, even = (
        simulate(scenario(seed=seed, scatter=scatter), asked)[1]
        for seed, scatter in ((0, SCATTERS[0]), (0, SCATTERS[0]), (1, SCATTERS[0]), (0, None))
    )
    assert summary(scattered) == summary(again)
    assert len({repr(summary(one)) for one in (scattered, other, even)}) == 3
    assert all(len(one.times) == one.wanted for one in scattered.requests)
    one_speed = simulate(scenario(scatter=Scatter((1.0,), 1e6)), asked)[1]
    assert summary(one_speed) == summary(even)


# To shrink a failing cluster takes far longer than to look at it.
SEARCH = settings(max_examples=16, phases=(Phase.explicit, Phase.generate))


@SEARCH
@given(
    seed=st.integers(0, 1000),
    placement=st.sampled_from(("freeness", "round_robin")),
    blocks=st.sampled_from((48, 64, 200)),
    host_blocks=st.sampled_from((0, 40)),
    dies=st.booleans(),
    tenants=st.sampled_from((("one",), ("one", "two"))),
    theta=st.sampled_from((None, 60.0)),
    scatter=st.sampled_from((None, *SCATTERS)),
    contention=st.sampled_from((0.0, 0.2)),
    shared=st.sampled_from((0, 100)),
)
def test_jumping_equals_stepping(
    seed: int,
    placement: str,
    blocks: int,
    host_blocks: int,
    dies: bool,
    tenants: tuple[str, ...],
    theta: float | None,
    scatter: Scatter | None,
    contention: float,
    shared: int,
) -> None:
    deaths = (Death(2.345, 1, back_after=1.7),) if dies else ()
    runs = [
        simulate(
            scenario(
                blocks=blocks,
                host_blocks=host_blocks,
                placement=placement,
                jumps=jumps,
                deaths=deaths,
                theta=theta,
                scatter=scatter,
                contention=contention,
            ),
            workload(30, rate=8.0, seed=seed, tenants=tenants, shared=shared),
        )[1]
        for jumps in (True, False)
    ]
    assert summary(runs[0]) == summary(runs[1])
    assert runs[1].jumped == 0


def test_most_steps_of_an_easy_load_are_jumped_over() -> None:
    outcome = simulate(scenario(blocks=400), workload(30, rate=1.0))[1]
    assert outcome.jumped > 0.5 * outcome.steps


def test_steps_are_jumped_over_while_memory_is_short() -> None:
    given = scenario(1, blocks=64, host_blocks=200)
    outcome = simulate(given, workload(60, rate=20.0))[1]
    (instance,) = outcome.instances.values()
    assert sum(used > 56 for used in instance.used) > 0.3 * len(instance.used)
    assert outcome.jumped > 0.55 * outcome.steps


def test_prefixes_are_let_go_of_whatever_becomes_of_a_move() -> None:
    refused = 0
    for seed in range(6):
        # The run ends with a check that no block is held by nobody.
        asked = workload(60, rate=12.0, seed=seed, shared=120)
        outcome = simulate(scenario(placement="round_robin"), asked)[1]
        refused += sum("free blocks" in report.outcome for _, report in outcome.migrations)
    assert refused


@pytest.mark.parametrize("jumps", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_decision_knows_an_output_that_is_not_there(seed: int, jumps: bool) -> None:
    asked = workload(40, rate=8.0, seed=seed)
    rng = random.Random(seed)
    number = rng.randrange(5, 30)
    short, long = 40, 400
    seen = []
    for length in (short, long):
        changed = list(asked)
        changed[number] = dataclasses.replace(asked[number], output_tokens=length)
        decisions = Decisions()
        _, outcome = simulate(scenario(jumps=jumps), changed, decisions)
        record = outcome.requests[number]
        assert len(record.times) == length
        seen.append((decisions, record.times[short - 1]))
    (first, until), (second, same) = seen
    assert until == same
    for one, other in ((first.told, second.told), (first.all, second.all)):
        before = [[entry for entry in run if entry[0] < until] for run in (one, other)]
        assert before[0] == before[1]
        assert len(before[0]) > number
        assert one != other


@SEARCH
@given(
    seed=st.integers(0, 1000),
    deaths=st.lists(
        st.tuples(st.floats(0.1, 8.0), st.integers(0, 1), st.floats(0.5, 4.0)), max_size=3
    ),
)
def test_every_request_ends_once_with_all_its_tokens(
    seed: int, deaths: list[tuple[float, int, float]]
) -> None:
    asked = workload(40, rate=8.0, seed=seed)
    simulation, outcome = simulate(
        scenario(deaths=tuple(Death(at, number, back) for at, number, back in deaths)), asked
    )
    assert outcome.complete
    assert len(outcome.requests) == len(asked)
    by_name = {one.request_id: one for one in outcome.requests}
    for number, request in enumerate(asked):
        record = by_name[f"request-{number}"]
        assert record.status == "finished"
        assert len(record.times) == record.wanted == request.output_tokens
        assert list(record.times) == sorted(record.times)
        assert record.times[0] > record.arrival
    # Nothing is left behind; ``run`` has checked the pools already.
    for instance in simulation.instances.values():
        if instance.alive:
            assert not instance.engine.scheduler.has_work()


def test_a_death_is_survived_by_its_requests() -> None:
    asked = workload(40, rate=8.0)
    outcome = simulate(scenario(deaths=(Death(3.0, 0, back_after=2.0),)), asked)[1]
    replayed = [one for one in outcome.requests if one.replays]
    assert replayed
    assert all(one.status == "finished" for one in replayed)
    undisturbed = simulate(scenario(), asked)[1]
    assert not any(one.replays for one in undisturbed.requests)


def test_a_full_instance_preempts_and_loses_time_by_it() -> None:
    asked = [WorkloadRequest(0.01 * k, (Span(f"r{k}", 100),), 300) for k in range(6)]
    outcome = simulate(scenario(1, blocks=64, prefix_caching=False), asked)[1]
    hit = [one for one in outcome.requests if one.preemptions]
    assert hit
    assert all(one.preemption_loss > 0 for one in hit)
    assert not any(one.preemption_loss for one in outcome.requests if not one.preemptions)


def test_migrations_even_out_what_round_robin_does_not() -> None:
    # Every third request is long: they all meet on one instance.
    asked = [
        WorkloadRequest(0.05 * k, (Span(f"r{k}", 150),), 400 if k % 3 == 0 else 5)
        for k in range(18)
    ]
    moved = simulate(scenario(placement="round_robin"), asked)[1]
    stayed = simulate(scenario(placement="round_robin", rebalance=False), asked)[1]
    assert not stayed.migrations
    done = [report for _, report in moved.migrations if report.outcome == "moved"]
    assert done
    pauses = [pause for one in moved.requests for pause in one.pauses]
    # One that moved before its first token has nothing to pause.
    assert 0 < len(pauses) <= sum(len(one.instances) - 1 for one in moved.requests)
    assert sum(one.preemptions for one in moved.requests) < sum(
        one.preemptions for one in stayed.requests
    )


def test_a_session_goes_on_when_its_answer_is_there() -> None:
    said: list[Span] = []
    turns = []
    for turn in range(3):
        said.append(Span(f"s/{turn}", 50))
        turns.append(
            WorkloadRequest(
                1.0 + turn, tuple(said), 60, session="s", turn=turn, think=1.0 if turn else None
            )
        )
        said.append(Span("", 60, turn))
    outcome = simulate(scenario(1), turns)[1]
    first, second, third = outcome.requests
    assert second.arrival == pytest.approx(first.ended + 1.0, abs=0.01)
    assert third.arrival == pytest.approx(second.ended + 1.0, abs=0.01)
    # The prompt of a turn is what was said before: it is in the cache.
    assert second.cached >= 96
    assert third.cached >= second.cached + 96


def test_prompts_without_room_for_an_answer_are_refused() -> None:
    asked = [
        WorkloadRequest(0.0, (Span("long", 5000),), 3),
        WorkloadRequest(0.1, (Span("s", 5),), 3),
    ]
    outcome = simulate(scenario(1), asked)[1]
    assert [one.status for one in outcome.requests] == ["400", "finished"]


def test_answers_end_with_their_end_token() -> None:
    answers = Answers(range(10), 99)
    answers.prepare("a", 5)
    assert [answers.token("a", index) for index in range(5)] == list(answers.tokens("a", 0, 5))
    assert answers.token("a", 4) == 99
    assert 99 not in answers.tokens("a", 0, 4)
    request = Request("a", (1, 2, 3), SamplingParams())
    assert answers.ends_at(Sequence.start(request)) == 8


def test_a_faster_instance_gets_more_of_the_work() -> None:
    given_scenario = dataclasses.replace(
        scenario(),
        devices=(device(profile(speed=3.0), share=1e6), device(profile(), share=1e6)),
    )
    outcome = simulate(given_scenario, workload(40, rate=6.0))[1]
    steps = [record.steps[-1] for record in outcome.instances.values()]
    drawn = [
        sum(one.instances[0] == name for one in outcome.requests) for name in outcome.instances
    ]
    assert outcome.complete
    assert steps[0] > steps[1]
    assert drawn[0] > drawn[1]


def test_instances_come_and_go_with_the_load() -> None:
    base = scenario(1)
    scaling = ScalingConfig(
        min_instances=1, max_instances=3, low=20.0, high=40.0, period=0.5, cooldown=1.0
    )
    given_scenario = dataclasses.replace(
        base, dispatcher=dataclasses.replace(base.dispatcher, scaling=scaling), start_seconds=1.0
    )
    asked = [*workload(40, rate=10.0), WorkloadRequest(60.0, (Span("late", 30),), 20)]
    simulation, outcome = simulate(given_scenario, asked)
    assert outcome.complete
    assert len(outcome.instances) > 1
    assert sum(one.alive for one in simulation.instances.values()) < len(outcome.instances)
    assert not any(one.replays for one in outcome.requests)


def test_what_prefill_instances_begin_decode_instances_finish() -> None:
    base = scenario(2, blocks=200)
    roles = (("instance-0", Role.PREFILL), ("instance-1", Role.DECODE))
    given_scenario = dataclasses.replace(
        base, dispatcher=dataclasses.replace(base.dispatcher, roles=roles)
    )
    asked = [WorkloadRequest(1.0 + k, (Span(f"r{k}", 150),), 200) for k in range(8)]
    outcome = simulate(given_scenario, asked)[1]
    assert outcome.complete
    handed = [one for one in outcome.requests if one.instances == ["instance-0", "instance-1"]]
    assert len(handed) >= 6
    assert {report.reason for _, report in outcome.migrations} == {"handoff"}
