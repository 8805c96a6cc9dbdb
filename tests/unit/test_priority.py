"""Ranks, theta, and the choice of victims."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from instance.fairness import TenantCounters, service
from instance.priority import PreemptionReason, Priorities, least_gap, rank_of
from instance.request import Request, RequestClass, SamplingParams, Sequence, SequenceStatus

STANDARD = RequestClass.STANDARD


def make(
    name: str,
    tenant: str = "a",
    request_class: RequestClass = STANDARD,
    arrival: float = 0.0,
    computed: int = 0,
    tokens: int = 1,
    blocks: tuple[int, ...] = (),
) -> Sequence:
    request = Request(
        name, (1,) * tokens, SamplingParams(), "", tenant, request_class, arrival=arrival
    )
    sequence = Sequence.start(request)
    sequence.num_computed = computed
    sequence.block_table = list(blocks)
    return sequence


def ranked(priorities: Priorities, *sequences: Sequence) -> list[str]:
    for sequence in sequences:
        priorities.rank(sequence)
    return [one.request_id for one in sorted(sequences, key=rank_of)]


def test_class_then_service_then_arrival_then_who_was_in_the_batch() -> None:
    counters = TenantCounters()
    counters.charge(("b", STANDARD), 10, 0)
    priorities = Priorities(counters)
    back = make("z", arrival=3)
    back.num_preemptions = 1
    order = ranked(
        priorities,
        make("batch", "c", RequestClass.BATCH),
        make("ahead", "b", arrival=0),
        make("late", arrival=9),
        make("y", arrival=3),
        back,
        make("urgent", "b", RequestClass.INTERACTIVE, arrival=99),
    )
    assert order == ["urgent", "z", "y", "late", "ahead", "batch"]


def test_ranks_change_with_a_reading_only() -> None:
    counters = TenantCounters()
    priorities = Priorities(counters, theta=5.0)
    one, other = make("one", "a"), make("other", "b", arrival=1)
    assert ranked(priorities, one, other) == ["one", "other"]
    counters.charge(("a", STANDARD), 6, 0)
    assert ranked(priorities, one, other) == ["one", "other"]
    assert priorities.entitled(other, one) is None
    priorities.read([one, other])
    assert priorities.entitled(other, one) is PreemptionReason.FAIRNESS
    assert priorities.entitled(one, other) is None
    assert sorted([one, other], key=rank_of) == [other, one]


def test_theta_is_twice_what_a_swap_of_the_longest_costs() -> None:
    counters = TenantCounters({"a": 0.5, "b": 4.0})
    priorities = Priorities(counters, None, lambda tokens: 3.0 * tokens, 8, 4)
    short, long = make("short", "a", computed=1), make("long", "b", computed=100)
    assert priorities.theta == least_gap(4, 8) == 64
    # Nothing runs: there is nobody to preempt, and nothing to tell a cluster either.
    priorities.read([short, long])
    assert priorities.theta == 64
    short.status = long.status = SequenceStatus.RUNNING
    priorities.read([short, long])
    assert priorities.theta == 2 * 300 / 0.5
    # Not below what the batch is given until the next reading, however small a swap is.
    priorities.read([short])
    assert priorities.theta == least_gap(1, 8) / 0.5
    short.num_computed = 0
    priorities.read([short])
    assert priorities.theta == least_gap(1, 8) / 0.5
    fixed = Priorities(counters, 7.0)
    fixed.read([short, long])
    assert fixed.theta == 7.0


def test_a_reading_counts_what_is_planned_as_done() -> None:
    counters = TenantCounters({"a": 2.0})
    counters.charge(("a", STANDARD), 20, 0)
    priorities = Priorities(counters, theta=0.0)
    prefill = make("prefill", "a", computed=0)
    other = make("other", "b")
    priorities.read([prefill, other])
    assert (prefill.rank[1], other.rank[1]) == (10, 0)
    prefill.num_computed = 1
    assert prefill.num_prompt >= 1
    priorities.read([prefill, other])
    assert prefill.rank[1] == 10 + 1 / 2
    prefill.num_in_flight = 3
    priorities.read([prefill, other])
    assert prefill.rank[1] == 10 + (1 + 2 * 3) / 2
    # What is charged already, was cached, or is not charged yet by rule, does not count twice.
    prefill.charged_prompt = 1
    priorities.read([prefill, other])
    assert prefill.rank[1] == 10 + 2 * 3 / 2
    prefill.charged_prompt, prefill.silent = 0, True
    priorities.read([prefill, other])
    assert prefill.rank[1] == 10


def test_a_class_displaces_lower_ones_whatever_their_service() -> None:
    priorities = Priorities(TenantCounters(), theta=0.0)
    high, low = make("high", request_class=RequestClass.INTERACTIVE), make("low", "b")
    ranked(priorities, high, low)
    assert priorities.entitled(high, low) is PreemptionReason.PRIORITY
    assert priorities.entitled(low, high) is None


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_victims_suffice_are_entitled_and_none_is_spared_in_vain(seed: int) -> None:
    rng = random.Random(seed)
    counters = TenantCounters({name: float(rng.choice((1, 2))) for name in "abc"})
    for name in "abc":
        for request_class in RequestClass:
            counters.charge((name, request_class), rng.randrange(60), 0)
    priorities = Priorities(counters, theta=float(rng.choice((0, 10, 30))))
    running = [
        make(
            f"r{number}",
            rng.choice("abc"),
            rng.choice(list(RequestClass)),
            computed=rng.choice((0, 9)),
            tokens=10,
            # Some blocks are shared.
            blocks=tuple({number * 10 + k for k in range(rng.randrange(4))} | {rng.randrange(3)}),
        )
        for number in range(rng.randrange(7))
    ]
    candidate = make("new", rng.choice("abc"), rng.choice(list(RequestClass)))
    ranked(priorities, candidate, *running)
    running.sort(key=rank_of)
    references = Counter(block for one in running for block in one.block_table)
    references.update({0: 1})  # held elsewhere too
    useless = {1}
    blocks, seats = rng.randrange(-2, 9), rng.randrange(-1, 3)
    if blocks <= 0 and seats <= 0:
        seats = 1
    chosen = priorities.choose_victims(
        candidate, running, blocks, seats, references.__getitem__, lambda _: 0, useless
    )

    def suffices(victims: list[Sequence]) -> bool:
        left = references.copy()
        left.subtract(block for one in victims for block in one.block_table)
        freed = sum(1 for block, count in left.items() if not count and block not in useless) - sum(
            1 for block, count in references.items() if not count
        )
        return freed + len(victims) >= blocks and len(victims) >= seats

    entitled = [one for one in running if priorities.entitled(candidate, one)]
    if chosen is None:
        # Decodes of a tenant that is not given more than the candidate's were left alone.
        spared = [one for one in entitled if one.num_computed == 9 and one.account[1] is STANDARD]
        fair = {one.account for one in entitled} & {(name, candidate.account[1]) for name in "abc"}
        assert not suffices(entitled) or spared or fair
        return
    victims = [victim for victim, _ in chosen]
    assert suffices(victims)
    assert all(priorities.entitled(candidate, victim) is reason for victim, reason in chosen)
    for victim in victims:
        assert not suffices([one for one in victims if one is not victim])
    for victim, reason in chosen:
        if reason is PreemptionReason.FAIRNESS:
            assert victim.rank[1] - candidate.rank[1] > priorities.theta


def test_a_tenant_given_no_more_than_the_candidates_keeps_its_decodes() -> None:
    counters = TenantCounters({"a": 1.0, "b": 2.0})
    counters.charge(("b", STANDARD), 100, 0)
    priorities = Priorities(counters, theta=10.0)
    new = make("new", "a")

    def choose(own: int, theirs: int, prefill: int = 0) -> int:
        """Victims among ``theirs`` decodes of b while a has ``own``, and one in prefill."""
        running = [make(f"a{n}", "a", computed=9, tokens=10) for n in range(own)]
        running += [make(f"b{n}", "b", computed=9, tokens=10) for n in range(theirs)]
        if prefill:
            running.append(make("ap", "a", tokens=50))
        ranked(priorities, new, *running)
        running.sort(key=rank_of)
        seats = 1
        while priorities.choose_victims(new, running, 0, seats, lambda _: 1, lambda _: prefill):
            seats += 1
        return seats - 1

    assert choose(own=0, theirs=4) == 4
    assert choose(own=1, theirs=4) == 2  # 2 of weight 2 are as much as 1 of weight 1
    assert choose(own=2, theirs=4) == 0
    assert choose(own=0, theirs=4, prefill=3) == 1  # 3 for a; each decode of b counts 2 / 2
    assert service(0, 1) == 2.0
