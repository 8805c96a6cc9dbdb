"""Which instances compute prompts, as the mix of requests changes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ServeConfig
from cluster.dispatcher.events import Joined, PlaceRequested, Reported, RoleRequested, SetRole, Tick
from cluster.dispatcher.load import InstanceLoad, LoadConfig
from cluster.dispatcher.roles import (
    Demand,
    Roles,
    RolesConfig,
    first_token_seconds,
    output_token_seconds,
    worse_share,
)
from cluster.dispatcher.views import InstanceState, LoadView
from instance.budget import StepCosts
from instance.load import Role
from tests.unit.dispatching import ask, dispatcher, info, report, sequence

COSTS = StepCosts(base=0.02, prefill=0.0002, decode=0.001, decode_context=0.0)
CONFIG = RolesConfig(enabled=True, ttft=1.0, tpot=0.1, window=20.0, cooldown=4.0)
BLOCKS = 1000

demands = st.builds(
    Demand,
    rate=st.floats(0.0, 50.0),
    mean=st.floats(0.0, 2.0),
    square=st.floats(0.0, 4.0),
    long=st.floats(0.0, 5.0),
    backlog=st.floats(0.0, 100.0),
    step=st.floats(0.001, 0.1),
    rows=st.floats(0.0, 5.0),
    context=st.integers(0, 100_000),
    tokens=st.integers(1, 100_000),
)


def view(name: str, role: Role, rows: int = 0, backlog: int = 0) -> LoadView:
    load = InstanceLoad(info(name, blocks=BLOCKS), 0.0)
    held = tuple(sequence(f"{name}.{n}", 2) for n in range(rows))
    load.accept(report(name, 1, held, blocks=BLOCKS, costs=COSTS), 0.0)
    step = COSTS.base + rows * COSTS.decode
    return load.view(0.0, LoadConfig())._replace(role=role, backlog=backlog, step_seconds=step)


def cluster(prompts: int, others: int, rows: int = 0) -> list[LoadView]:
    """Instances for prompts, then others that decode ``rows`` sequences each."""
    roles = [Role.PREFILL] * prompts + [Role.DECODE] * others
    return [
        view(f"instance-{n}", role, rows if role is Role.DECODE else 0)
        for n, role in enumerate(roles)
    ]


def nobody(name: str) -> bool:
    return False


def following(views: list[LoadView], per_second: float, tokens: int, **more) -> Roles:
    """A policy that has seen a window of equal requests."""
    roles = Roles(replace(CONFIG, **more), lambda kind, reason, number: None)
    assert roles.update(views, 0, nobody, 0.0) is None
    placed = 0
    for tenth in range(1, 200):
        now = tenth / 10
        while placed < per_second * now:
            roles.placed(tokens)
            placed += 1
        roles._changed = now  # too early to change
        roles.update(views, 0, nobody, now)
    return roles


# ---- predicted times


@given(demands, st.integers(1, 20))
def test_more_instances_never_make_a_time_longer(demand: Demand, count: int) -> None:
    for seconds in (
        lambda n: first_token_seconds(demand, n, 20.0),
        lambda n: output_token_seconds(demand, n),
    ):
        assert seconds(count + 1) <= seconds(count) * (1 + 1e-12)


@given(demands, st.integers(2, 10))
def test_the_worse_share_is_one_of_the_two(demand: Demand, number: int) -> None:
    for prompts in range(1, number):
        share = worse_share(demand, prompts, number - prompts, CONFIG)
        first = first_token_seconds(demand, prompts, CONFIG.window) / CONFIG.ttft
        further = output_token_seconds(demand, number - prompts) / CONFIG.tpot
        assert share >= max(first, further)
        if 2 * demand.context <= (number - prompts) * demand.tokens:
            assert share == max(first, further)


def test_what_has_no_memory_elsewhere_is_decoded_beside_prompts() -> None:
    # Ten rows on an instance: 0.03 s a step. Twice as many as one has memory for.
    demand = Demand(4.0, 0.25, 0.0625, 0.25, 0.0, 0.02, 0.02, 20_000, 10_000)
    assert output_token_seconds(demand, 1) == output_token_seconds(demand, 2) == 0.03
    # With three for prompts each is busy for a third of the time, and steps take 0.1 s then.
    alone = worse_share(replace(demand, context=9_000, rows=0.01), 3, 1, CONFIG)
    assert alone == pytest.approx(first_token_seconds(demand, 3, CONFIG.window))
    assert worse_share(demand, 3, 1, CONFIG) == pytest.approx((1 + 2 * 0.3) / 3)
    # Where none has memory left, it takes longer.
    short = replace(demand, context=72_000, rows=0.072)
    assert worse_share(short, 3, 1, CONFIG) == pytest.approx(2.0 * (1 + 2 * 0.3) / 3)


def test_a_queue_of_one_server_is_predicted_as_in_the_books() -> None:
    # Prompts of 0.1 s that come 5 times a second: half of them wait, those 0.1 s on average.
    demand = Demand(5.0, 0.1, 0.01, 0.1, 0.0, 0.02, 0.0, 0, 1)
    tenth = 0.1 * math.log(0.5 / 0.1)
    assert first_token_seconds(demand, 1, 20.0) == pytest.approx(0.1 + tenth)
    # What has piled up is there whatever was expected.
    assert first_token_seconds(replace(demand, backlog=3.0), 2, 20.0) == pytest.approx(0.1 + 1.5)


# ---- changes


def test_long_prompts_bring_instances_for_prompts() -> None:
    views = cluster(1, 3, rows=2)
    # 4 prompts of 2,000 tokens, 0.4 s each: more than one instance can do.
    roles = following(views, 4.0, 2000)
    assert roles.update(views, 0, nobody, 30.0) == ("instance-1", Role.PREFILL)


def test_long_outputs_bring_instances_for_them() -> None:
    views = cluster(3, 1, rows=200)
    roles = following(views, 2.0, 100)
    found = roles.update(views, 0, nobody, 30.0)
    assert found is not None
    assert found[1] is Role.DECODE
    # Of those for prompts the one with least to do.
    busy = [one._replace(backlog=500 * (n != 2)) for n, one in enumerate(views)]
    roles = following(busy, 2.0, 100)
    assert roles.update(busy, 0, nobody, 30.0) == ("instance-2", Role.DECODE)


def test_what_waits_in_the_dispatcher_counts_if_it_stays() -> None:
    views = cluster(1, 3, rows=2)
    roles = following(views, 0.1, 100)
    assert roles.update(views, 0, nobody, 30.0) is None
    # What came at once may go at once.
    assert roles.update(views, 100_000, nobody, 31.0) is None
    assert roles.update(views, 100_000, nobody, 34.0) is None
    assert roles.update(views, 100_000, nobody, 34.5) == ("instance-1", Role.PREFILL)


def test_nothing_changes_while_both_times_are_well_within_what_is_wanted() -> None:
    # A quarter of a second of prompts each second: with one instance for them, better is easy.
    views = cluster(1, 3, rows=2)
    roles = following(views, 1.25, 1000)
    assert roles.update(views, 0, nobody, 24.0) is None
    slower = Roles(replace(CONFIG, ttft=0.4), lambda kind, reason, number: None)
    vars(slower).update({**vars(roles), "config": slower.config})
    assert slower.update(views, 0, nobody, 24.0) == ("instance-1", Role.PREFILL)


def test_nothing_changes_before_enough_was_seen() -> None:
    views = cluster(1, 3, rows=2)
    roles = Roles(CONFIG, lambda kind, reason, number: None)
    seen = []
    for tenth in range(150):
        seen.append(roles.update(views, 0, nobody, tenth / 10))
        roles.placed(2000)
    first = next(at for at, found in enumerate(seen) if found is not None)
    assert first / 10 == CONFIG.window / 2


def test_changes_come_one_at_a_time_and_not_for_little() -> None:
    views = cluster(1, 3, rows=2)
    roles = following(views, 4.0, 2000)
    assert roles.update(views, 0, nobody, 24.0) is not None
    assert roles.update(views, 0, nobody, 27.9) is None
    even = cluster(2, 2, rows=2)
    steady = following(even, 0.5, 100)
    assert steady.update(even, 0, nobody, 30.0) is None


def test_what_an_operator_set_stays_and_the_last_of_a_kind_too() -> None:
    views = cluster(1, 3, rows=2)
    roles = following(views, 4.0, 2000)
    pinned = {"instance-1", "instance-2"}.__contains__
    assert roles.update(views, 0, pinned, 30.0) == ("instance-3", Role.PREFILL)
    pair = cluster(1, 1, rows=2)
    assert following(pair, 9.0, 4000).update(pair, 0, nobody, 30.0) is None


@given(
    roles=st.lists(st.sampled_from(Role), min_size=1, max_size=6),
    states=st.lists(st.sampled_from(InstanceState), min_size=6, max_size=6),
    rows=st.integers(0, 100),
    tokens=st.integers(1, 8000),
    held=st.integers(0, 100_000),
)
def test_only_ready_instances_with_a_role_change_and_both_kinds_remain(
    roles, states, rows, tokens, held
) -> None:
    views = [
        view(f"instance-{n}", role, rows)._replace(state=states[n]) for n, role in enumerate(roles)
    ]
    policy = Roles(CONFIG, lambda kind, reason, number: None)
    policy.update(views, 0, nobody, 0.0)
    for _ in range(20):
        policy.placed(tokens)
    found = policy.update(views, held, nobody, 10.0)
    if found is None:
        return
    name, role = found
    before = {one.instance_id: one for one in views}[name]
    assert before.state is InstanceState.READY
    assert {before.role, role} == {Role.PREFILL, Role.DECODE}
    after = Counter(
        role if one.instance_id == name else one.role
        for one in views
        if one.state is InstanceState.READY
    )
    assert after[Role.PREFILL]
    assert after[Role.DECODE]


# ---- in the dispatcher


def test_the_dispatcher_changes_roles_but_not_those_that_an_operator_set() -> None:
    names = [f"instance-{n}" for n in range(4)]
    first = ((names[0], Role.PREFILL), *((name, Role.DECODE) for name in names[1:]))
    core = dispatcher(roles=first, role_changes=CONFIG)
    for name in names:
        core.handle(Joined(info(name)), 0.0)
        core.handle(Reported(report(name, 1, costs=COSTS)), 0.0)
    core.handle(RoleRequested(names[1], Role.DECODE), 0.0)
    core.handle(Tick(), 0.0)
    changed = []
    for step in range(1, 160):
        now = step / 10
        core.handle(PlaceRequested(ask(f"r{step}", tokens=2000)), now)
        core.handle(Reported(report(names[step % 4], step + 1, costs=COSTS)), now)
        changed += [one for one in core.handle(Tick(), now) if isinstance(one, SetRole)]
    assert changed
    assert {one.role for one in changed} == {Role.PREFILL}
    assert names[1] not in {one.instance_id for one in changed}
    assert core.counters["roles"]["to_prefill"] == len(changed)


def test_settings_reach_the_policy() -> None:
    config = ServeConfig(model="m", change_roles=True, role_ttft=1.5, role_tpot=0.05)
    found = config.dispatcher().role_changes
    assert (found.enabled, found.ttft, found.tpot) == (True, 1.5, 0.05)
    with pytest.raises(ValueError, match="above 0"):
        RolesConfig(ttft=0.0)
