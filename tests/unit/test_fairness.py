"""Counters of tenants' service: charges, lifts and who waits."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from instance.fairness import ServiceCounters, TenantCounters, service
from instance.request import RequestClass

STANDARD = RequestClass.STANDARD
A, B, C = (("a", STANDARD), ("b", STANDARD), ("c", STANDARD))


def test_service_is_divided_by_weight() -> None:
    counters: ServiceCounters = TenantCounters({"a": 2.0}, default_weight=0.5)
    counters.charge(A, 10, 5)
    counters.charge(B, 10, 5)
    assert counters.counter(A) == (10 + 2 * 5) / 2
    assert counters.counter(B) == (10 + 2 * 5) / 0.5
    assert counters.counter(("a", RequestClass.BATCH)) == 0


def test_a_changed_weight_counts_from_then_on() -> None:
    counters = TenantCounters()
    counters.charge(A, 10, 0)
    counters.set_weight("a", 5)
    counters.charge(A, 10, 0)
    assert counters.counter(A) == 12


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_a_finite_number_above_0(weight: float) -> None:
    with pytest.raises(ValueError, match="tenant 'a'"):
        TenantCounters({"a": weight})
    with pytest.raises(ValueError, match="weight"):
        TenantCounters(default_weight=weight)


def test_who_begins_to_wait_is_lifted_to_the_least_of_those_who_do() -> None:
    counters = TenantCounters()
    counters.charge(A, 100, 0)
    counters.charge(B, 70, 0)
    counters.waiting_begins(A, "a1")
    counters.waiting_begins(B, "b1")
    assert (counters.counter(A), counters.counter(B)) == (100, 100)
    counters.charge(B, 30, 0)
    counters.waiting_begins(C, "c1")
    assert counters.counter(C) == 100
    counters.waiting_begins(C, "c2")
    counters.charge(A, 50, 0)
    counters.waiting_ends(C, "c1")
    counters.waiting_begins(C, "c3")  # c2 waits all the time: no lift
    assert counters.counter(C) == 100
    assert counters.lifted == 130


def test_where_nobody_waits_the_last_that_did_is_the_level() -> None:
    counters = TenantCounters()
    counters.waiting_begins(A, "a1")
    counters.waiting_ends(A, "a1")
    counters.charge(A, 0, 40)
    counters.waiting_begins(B, "b1")
    assert counters.counter(B) == 80


def test_classes_are_apart() -> None:
    counters = TenantCounters()
    counters.charge(A, 100, 0)
    counters.waiting_begins(A, "a1")
    batch = ("b", RequestClass.BATCH)
    counters.waiting_begins(batch, "b1")
    assert counters.counter(batch) == 0
    assert counters.waiting(STANDARD) == {"a": 100}
    assert counters.waiting(RequestClass.INTERACTIVE) == {}


class Books(RuleBasedStateMachine):
    """Counters against what was charged, under any order of events."""

    weights = {"a": 1.0, "b": 4.0, "c": 0.5}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.counters = TenantCounters(self.weights)
        self.charged: Counter[str] = Counter()
        self.before = dict.fromkeys(self.weights, 0.0)
        self.ids: dict[str, set[str]] = {tenant: set() for tenant in self.weights}

    tenants = st.sampled_from(sorted(weights))

    @rule(tenant=tenants, prompt=st.integers(0, 500), output=st.integers(0, 9))
    def charge(self, tenant: str, prompt: int, output: int) -> None:
        self.counters.charge((tenant, STANDARD), prompt, output)
        self.charged[tenant] += int(service(prompt, output))

    @rule(tenant=tenants, number=st.integers(0, 3))
    def begin(self, tenant: str, number: int) -> None:
        waiting = self.counters.waiting(STANDARD)
        level = min(waiting.values(), default=0.0)
        self.counters.waiting_begins((tenant, STANDARD), f"{tenant}{number}")
        self.ids[tenant].add(f"{tenant}{number}")
        if tenant not in waiting:
            assert self.counters.counter((tenant, STANDARD)) >= level

    @precondition(lambda self: any(self.ids.values()))
    @rule(tenant=tenants, number=st.integers(0, 3), moved=st.booleans())
    def end(self, tenant: str, number: int, moved: bool) -> None:
        self.counters.waiting_ends((tenant, STANDARD), f"{tenant}{number}", moved)
        self.ids[tenant].discard(f"{tenant}{number}")

    @invariant()
    def the_books_balance(self) -> None:
        counters = {t: self.counters.counter((t, STANDARD)) for t in self.weights}
        charged = sum(self.charged[t] / self.weights[t] for t in self.weights)
        # Binary fractions throughout, so the sums are exact.
        assert sum(counters.values()) == charged + self.counters.lifted
        for tenant, counter in counters.items():
            assert counter >= self.charged[tenant] / self.weights[tenant]
            assert counter >= self.before[tenant]
        self.before = counters
        assert set(self.counters.waiting(STANDARD)) == {t for t, ids in self.ids.items() if ids}


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1))
def test_a_charge_is_the_sum_of_its_parts(parts: list[tuple[int, int]]) -> None:
    whole, split = TenantCounters(), TenantCounters()
    whole.charge(A, sum(p for p, _ in parts), sum(o for _, o in parts))
    for prompt, output in parts:
        split.charge(A, prompt, output)
    assert whole.counter(A) == split.counter(A)
