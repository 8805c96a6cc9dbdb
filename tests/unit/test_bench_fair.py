"""What the bench of fairness measures, and the admission that it compares with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fair_instance import targets
from bench.fair_runs import DROVER, FCFS, FCFS_RESERVED, VTC, Reservations, Run, System
from bench.service_record import ServiceRecord, Spread, WatchedCounters
from cluster.simulation.profile import CopyCost, CostProfile, LinkCost
from cluster.simulation.workloads.records import Span, WorkloadRequest
from instance.clock import VirtualClock
from instance.executor import ModelDescription
from instance.request import Request, RequestClass, SamplingParams, Sequence
from instance.step_cost import StepCost

STANDARD = RequestClass.STANDARD
PROFILE = CostProfile(
    name="toy",
    model=ModelDescription("toy", "float16", 16, 2, 2, 8, 512, 4096, (511,)),
    step=StepCost(base=0.02, prefill_token=2e-4, decode_sequence=5e-4, context_token=2e-6),
    copy_out=CopyCost(1e9, 1e-5),
    copy_in=CopyCost(1e9, 1e-5),
    link=LinkCost(1e6, 1e-5, 5e-4),
    num_blocks=40,
    num_host_blocks=200,
)


# ---- the record


def test_a_window_counts_what_could_have_been_received() -> None:
    record = ServiceRecord()
    record.asked("a", 100, 0, 0.0)
    record.asked("b", 300, 0, 0.0)
    record.served("a", 100, 0, 1.0)
    record.served("b", 40, 10, 2.0)
    # b got 60 of what it asked for; a got 40 more, so b lacks no more than those 40.
    assert record.differences(10.0, window=10.0) == [40 / 10]
    assert record.received(0.0, 1.5) == {"a": 100, "b": 0}
    assert record.asked_until(5.0) == {"a": 100, "b": 300}


def test_who_asks_for_little_lacks_nothing() -> None:
    record = ServiceRecord()
    record.asked("small", 10, 0, 0.5)
    record.asked("large", 1000, 0, 0.5)
    record.served("small", 10, 0, 1.0)
    record.served("large", 1000, 0, 1.0)
    assert record.differences(4.0, window=4.0) == [0.0]
    # Windows in which nothing is asked or served differ in nothing.
    assert record.differences(8.0, window=4.0, stride=2.0) == [0.0, 0.0, 0.0]


def test_a_record_goes_by_weight() -> None:
    record = ServiceRecord({"a": 2.0})
    for tenant in "ab":
        record.asked(tenant, 100, 0, 0.0)
        record.served(tenant, 50, 0, 1.0)
    assert record.received(0.0, 1.0) == {"a": 25, "b": 50}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9)), max_size=40),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_received_is_the_sum_of_what_was_served_meanwhile(
    served: list[tuple[str, int, int]], start: int, length: int
) -> None:
    record = ServiceRecord()
    for tenant in "abc":
        record.asked(tenant, 1, 0, 0.0)
    for second, (tenant, prompt, output) in enumerate(served):
        record.served(tenant, prompt, output, float(second // 2))
    end = start + length
    assert record.received(start, end) == {
        name: sum(
            prompt + 2 * output
            for second, (tenant, prompt, output) in enumerate(served)
            if tenant == name and start < second // 2 <= end
        )
        for name in "abc"
    }


def test_the_gap_is_that_of_tenants_who_wait() -> None:
    clock = VirtualClock()
    counters = WatchedCounters({"a": 1.0, "b": 2.0}, clock)
    counters.waiting_begins(("a", STANDARD), "a1")
    counters.charge(("a", STANDARD), 500, 0)
    counters.look()
    assert counters.gap == 0
    counters.waiting_begins(("b", STANDARD), "b1")  # lifted to a's level
    counters.charge(("b", STANDARD), 0, 30)
    counters.look()
    assert counters.gap == 30
    counters.waiting_ends(("a", STANDARD), "a1")
    counters.charge(("b", STANDARD), 0, 500)
    counters.look()
    assert counters.gap == 30


def test_the_spread_is_that_of_times_in_which_both_wait() -> None:
    spread = Spread()
    spread.look({"a": 100.0, "b": 0.0})
    assert spread.most == 0  # what was before does not count
    spread.look({"a": 100.0, "b": 30.0})
    spread.look({"a": 150.0, "b": 30.0})
    assert spread.most == 50
    spread.look({"b": 30.0, "c": 0.0})
    spread.look({"a": 900.0, "b": 30.0, "c": 10.0})
    assert spread.most == 50
    spread.look({"a": 900.0, "b": 91.0, "c": 10.0})
    assert spread.most == 61


def test_the_blind_see_no_difference_but_the_record_does() -> None:
    counters = WatchedCounters({"a": 1.0, "b": 4.0}, VirtualClock(), blind=True)
    for tenant in "ab":
        counters.waiting_begins((tenant, STANDARD), tenant)
        counters.charge((tenant, STANDARD), 100, 0)
        assert counters.counter((tenant, STANDARD)) == 0
        assert 1000 / counters.weight(tenant) == 0
    counters.look()
    # b was lifted to a's level, of 100, when it began to wait.
    assert counters.gap == 25


# ---- reservations


def sequence(name: str, tenant: str, prompt: int, output: int, arrival: float) -> Sequence:
    params = SamplingParams(max_tokens=output)
    return Sequence.start(Request(name, (1,) * prompt, params, tenant=tenant, arrival=arrival))


def test_a_request_enters_once_all_that_it_may_write_fits() -> None:
    entered: list[Sequence] = []
    counters = WatchedCounters({}, VirtualClock())
    gate = Reservations(8, 16, counters, entered.append, blind=False)
    first = sequence("a1", "a", 32, 32, 0.0)
    gate.submit(first)  # 4 blocks
    gate.submit(sequence("a2", "a", 48, 32, 1.0))  # 5: must wait
    gate.submit(sequence("b1", "b", 16, 16, 2.0))
    assert [one.request_id for one in entered] == ["a1", "b1"]
    # a's prompts count from entry on, so b is behind; its next one is too large, and nobody
    # passes it.
    gate.submit(sequence("b2", "b", 64, 64, 3.0))
    gate.submit(sequence("a3", "a", 1, 1, 4.0))
    assert len(entered) == 2
    counters.charge(first.account, 32, 32)
    gate.ended(first)
    gate.stepped()
    assert len(entered) == 2
    gate.ended(entered[1])
    gate.stepped()
    assert [one.request_id for one in entered] == ["a1", "b1", "b2"]


def test_the_blind_reserve_in_the_order_of_arrival() -> None:
    entered: list[Sequence] = []
    counters = WatchedCounters({}, VirtualClock(), blind=True)
    gate = Reservations(4, 16, counters, entered.append, blind=True)
    asked = [sequence(f"r{number}", "ab"[number > 2], 16, 48, number) for number in range(5)]
    for one in asked:
        gate.submit(one)
    for one in asked:
        assert entered[-1] is one
        gate.ended(one)
        gate.stepped()


# ---- runs


def overload(seconds: float) -> list[WorkloadRequest]:
    """Two tenants, one asking twice as much as the other, both for more than there is."""
    return [
        WorkloadRequest(0.1 * number, (Span(f"r{number}", 64),), 64, "a" if number % 3 else "b")
        for number in range(int(10 * seconds))
    ]


def test_requests_enter_every_so_many_steps_or_where_nobody_is_inside() -> None:
    entered: list[str] = []
    counters = WatchedCounters({}, VirtualClock())
    gate = Reservations(
        8, 16, counters, lambda one: entered.append(one.request_id), blind=False, every=3
    )
    asked = [sequence(f"r{number}", "a", 16, 16, number) for number in range(4)]
    gate.submit(asked[0])
    gate.submit(asked[1])
    assert entered == ["r0"]
    gate.stepped()
    gate.stepped()
    assert entered == ["r0"]
    gate.stepped()
    assert entered == ["r0", "r1"]
    gate.submit(asked[2])
    gate.ended(asked[0])
    gate.stepped()
    assert entered == ["r0", "r1"]
    gate.ended(asked[1])
    gate.stepped()
    gate.submit(asked[3])
    assert entered == ["r0", "r1", "r2"]


@pytest.mark.parametrize("system", [DROVER, FCFS, VTC, FCFS_RESERVED], ids=lambda one: one.name)
def test_a_run_serves_as_its_system_says(system: System) -> None:
    result = Run(system, PROFILE, overload(40.0), {}, 0).result(40.0)
    share = result["received"]["b"] / result["received"]["a"]
    assert result["service"] == pytest.approx(sum(result["received"].values()) / 40.0)
    if system.blind:
        assert share == pytest.approx(0.5, abs=0.1)
        assert result["gap"] > 2000
    else:
        assert share == pytest.approx(1.0, abs=0.1)
        assert result["gap"] < 1000
    if system.reserves:
        assert not result["preemptions"]


def test_weights_are_kept_under_equal_demand() -> None:
    asked = [
        WorkloadRequest(0.1 * number, (Span(f"r{number}", 64),), 64, "ab"[number % 2])
        for number in range(400)
    ]
    result = Run(DROVER, PROFILE, asked, {"b": 2.0}, 0).result(40.0)
    assert result["received"]["a"] == pytest.approx(result["received"]["b"], rel=0.15)


def test_the_verdict_is_on_the_largest_gap_and_the_median_rate() -> None:
    def rows(gaps: dict[str, list[float]], rate: float) -> list[dict[str, object]]:
        return [
            {
                "load": load,
                "system": name,
                "runs": [
                    {"gap": gap, "service": rate if name == "drover" else 100.0} for gap in values
                ],
            }
            for load in ("256/256", "64/1024")
            for name, values in gaps.items()
        ]

    good = targets(rows({"drover": [50, 100], "vtc": [1000, 10], "fcfs": [1, 1]}, 95.0))
    assert [target.holds for target in good] == [True] * 4
    bad = targets(rows({"drover": [50, 101], "vtc": [1000, 10], "fcfs": [1, 1]}, 94.0))
    assert [target.holds for target in bad] == [False, False, True, False]
