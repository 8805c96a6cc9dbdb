"""What instances tell of their prefix caches, and what the dispatcher makes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatcher.events import AskPrefixes, Finished, Joined, PlaceRequested, Reported
from cluster.dispatcher.prefix_index import PrefixIndex
from instance.kv.blocks import BlockPool
from instance.kv.prefix import extend_hashes
from instance.kv.prefix_events import (
    DELTA_KEYS,
    KEY_BYTES,
    PROMPT_KEYS,
    PrefixDelta,
    PrefixEvents,
    keys_of,
    merge,
    prompt_keys,
)
from tests.unit.dispatching import ask, dispatcher, info, placed, report, sequence


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def pack(numbers) -> bytes:
    return b"".join(map(key, numbers))


# ---- one instance's side


def test_keys_of_a_prompt_are_those_that_its_blocks_are_sealed_with() -> None:
    tokens = list(range(40))
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, 8, b"salt")
    assert keys_of(prompt_keys(tokens, 8, b"salt")) == [h[:KEY_BYTES] for h in hashes[:4]]
    assert prompt_keys(tokens, 8, b"other") != prompt_keys(tokens, 8, b"salt")


def test_the_block_with_the_last_token_is_no_possible_hit() -> None:
    assert len(keys_of(prompt_keys(range(16), 8, b""))) == 1
    assert len(keys_of(prompt_keys(range(17), 8, b""))) == 2
    assert prompt_keys([], 8, b"") == b""


def test_long_prompts_are_compared_by_their_beginning() -> None:
    assert len(keys_of(prompt_keys(range(2 * PROMPT_KEYS), 1, b""))) == PROMPT_KEYS


def test_a_pool_tells_what_can_be_hit_and_what_no_longer() -> None:
    pool = BlockPool(4, 2)
    events = PrefixEvents()
    pool.prefix.watcher = events
    first = events.take()
    assert first is not None
    assert first.after == 0
    hashes: list[bytes] = []
    extend_hashes(hashes, [1, 2, 3, 4], 2, b"")
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.seal(blocks[0], None, hashes[0], (1, 2))
    pool.seal(blocks[1], blocks[0], hashes[1], (3, 4))
    told = events.take()
    assert told is not None
    assert told.after == first.number
    assert set(keys_of(told.stored)) == {h[:KEY_BYTES] for h in hashes}
    assert not told.removed
    pool.release(blocks)
    assert events.take() is None
    taken = pool.allocate(3)
    assert taken is not None
    gone = events.take()
    assert gone is not None
    assert set(keys_of(gone.removed)) == {h[:KEY_BYTES] for h in hashes}


def test_what_came_and_went_between_two_reports_is_said_once() -> None:
    events = PrefixEvents()
    events.take()
    for _ in range(100):
        events.stored(key(1))
        events.removed(key(1))
    delta = events.take()
    assert delta == PrefixDelta(1, 2, b"", key(1))


def test_a_delta_is_bounded_and_the_rest_follows() -> None:
    events = PrefixEvents()
    events.restart(map(key, range(DELTA_KEYS + 5)))
    sizes = []
    while events.pending:
        delta = events.take()
        assert delta is not None
        sizes.append(len(delta.stored) // KEY_BYTES)
    assert sizes == [DELTA_KEYS, 5]


def test_deltas_that_do_not_follow_each_other_are_not_merged() -> None:
    one, other = PrefixDelta(0, 1, key(1), b""), PrefixDelta(2, 3, key(2), b"")
    assert merge(one, other) is other
    assert merge(None, other) is other
    assert merge(one, None) is one


# ---- the index against a plain model


@dataclass
class Told:
    """One instance: what it can serve, and its unsent and sent deltas."""

    events: PrefixEvents = field(default_factory=PrefixEvents)
    holds: set[int] = field(default_factory=set)
    unsent: PrefixDelta | None = None
    sent: list[PrefixDelta] = field(default_factory=list)


changes = st.tuples(st.just("store"), st.integers(0, 3), st.integers(0, 12))
removals = st.tuples(st.just("remove"), st.integers(0, 3), st.integers(0, 12))
others = st.tuples(
    st.sampled_from(["make", "send", "lose", "double", "ask", "drop"]),
    st.integers(0, 3),
    st.just(0),
)


def naive(held: set[int], prompt: list[int]) -> int:
    depth = 0
    while depth < len(prompt) and prompt[depth] in held:
        depth += 1
    return depth


@settings(deadline=None)
@given(
    st.lists(st.one_of(changes, removals, others), max_size=80),
    st.lists(st.lists(st.integers(0, 12), unique=True, max_size=8), min_size=1, max_size=4),
)
def test_the_index_is_right_after_losses_doubles_and_restarts(steps, prompts) -> None:
    index = PrefixIndex(capacity=10_000)
    told = [Told() for _ in range(4)]

    def send(row: int, delta: PrefixDelta) -> None:
        if not index.apply(row, delta):
            told[row].events.restart(map(key, told[row].holds))
        told[row].sent.append(delta)

    def make(one: Told) -> None:
        one.unsent = merge(one.unsent, one.events.take())

    for what, row, number in steps:
        one = told[row]
        if what == "store" and number not in one.holds:
            one.holds.add(number)
            one.events.stored(key(number))
        elif what == "remove" and number in one.holds:
            one.holds.remove(number)
            one.events.removed(key(number))
        elif what == "make":
            make(one)
        elif what == "send" and one.unsent is not None:
            send(row, one.unsent)
            one.unsent = None
        elif what == "lose":
            one.unsent = None
        elif what == "double" and one.sent:
            index.apply(row, one.sent[-1])
        elif what == "drop":
            index.drop(row)
    # Each has two reports more: one shows what is missing, the other mends it.
    for _ in range(2):
        for row, one in enumerate(told):
            one.events.stored(key(100))
            one.holds.add(100)
            make(one)
            if one.unsent is not None:
                send(row, one.unsent)
                one.unsent = None
    for prompt in prompts:
        depths = index.match(pack(prompt), 4)
        assert depths.tolist() == [naive(one.holds, prompt) for one in told]
    assert len(index) == sum(len(one.holds) for one in told)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 30), max_size=20)), max_size=30),
    st.lists(st.integers(0, 30), unique=True, max_size=12),
    st.integers(1, 60),
)
def test_a_bounded_index_forgets_but_never_invents(tellings, prompt, capacity) -> None:
    index = PrefixIndex(capacity)
    truth: dict[int, set[int]] = {}
    for number, (row, keys) in enumerate(tellings):
        truth.setdefault(row, set()).update(keys)
        fresh = index._last.get(row, 0)
        assert index.apply(row, PrefixDelta(fresh, number + 1, pack(keys), b""))
        assert len(index) <= capacity
    depths = index.match(pack(prompt), 41)
    for row in range(41):
        assert depths[row] <= naive(truth.get(row, set()), prompt)
    for row in truth:
        index.drop(row)
    assert len(index) == 0
    assert not index.match(pack(prompt), 41).any()


def test_many_instances_are_told_apart() -> None:
    index = PrefixIndex(1 << 20)
    for row in range(1024):
        index.apply(row, PrefixDelta(0, 1, pack(range(row % 7)), b""))
    assert index.match(pack(range(7)), 1024).tolist() == [row % 7 for row in range(1024)]


# ---- in the dispatcher


def many_keys(count: int) -> bytes:
    return pack(range(count))


def told_report(name: str, number: int, delta: PrefixDelta | None, incarnation: str = "a"):
    return dataclasses.replace(report(name, number, incarnation=incarnation), prefix=delta)


def test_a_request_goes_where_its_prefix_is() -> None:
    core = dispatcher()
    for name in ("i0", "i1", "i2"):
        core.handle(Joined(info(name)), 0.0)
        delta = PrefixDelta(0, 1, pack(range(5)) if name == "i1" else b"", b"")
        core.handle(Reported(told_report(name, 1, delta)), 0.0)
    unknown = ask("other", prefix=pack([9]))
    assert placed(core.handle(PlaceRequested(unknown), 0.1)) == ["i0"]
    core.handle(Finished("other", 1), 0.1)
    asked = ask("r0", prefix=pack(range(6)))
    assert placed(core.handle(PlaceRequested(asked), 0.1)) == ["i1"]


def test_a_prefix_is_not_worth_more_than_the_work_it_saves() -> None:
    core = dispatcher()
    for name, held in (("i0", many_keys(20)), ("i1", b"")):
        core.handle(Joined(info(name)), 0.0)
        core.handle(Reported(told_report(name, 1, PrefixDelta(0, 1, held, b""))), 0.0)
    chosen = [
        placed(core.handle(PlaceRequested(ask(f"r{n}", prefix=many_keys(20))), 0.1))[0]
        for n in range(8)
    ]
    assert chosen[0] == "i0"
    assert "i1" in chosen
    follow = dispatcher(placement="prefix")
    for name, held in (("i0", many_keys(20)), ("i1", b"")):
        follow.handle(Joined(info(name)), 0.0)
        follow.handle(Reported(told_report(name, 1, PrefixDelta(0, 1, held, b""))), 0.0)
    for n in range(4):
        asked = PlaceRequested(ask(f"r{n}", prefix=many_keys(20)))
        assert placed(follow.handle(asked, 0.1)) == ["i0"]


def test_a_prefix_is_followed_until_the_queue_costs_more_than_it_saves() -> None:
    def goes(ahead: int) -> str:
        core = dispatcher(placement="prefix")
        for name in ("i0", "i1"):
            core.handle(Joined(info(name)), 0.0)
            delta = PrefixDelta(0, 1, many_keys(40) if name == "i0" else b"", b"")
            told = told_report(name, 1, delta)
            if name == "i0":
                first = sequence("first")._replace(uncomputed=ahead)
                told = dataclasses.replace(told, sequences=(first,))
            core.handle(Reported(told), 0.0)
        # 640 of 800 tokens are there.
        asked = ask("r0", tokens=800, prefix=many_keys(40))
        return placed(core.handle(PlaceRequested(asked), 0.1))[0]

    # Computing all of it elsewhere would delay it and what follows by 640 tokens each.
    assert goes(1200) == "i0"
    assert goes(1900) == "i1"


def test_a_missing_delta_is_asked_for_once_in_a_while() -> None:
    core = dispatcher()
    core.handle(Joined(info("i0")), 0.0)
    core.handle(Reported(told_report("i0", 1, PrefixDelta(0, 1, pack([1]), b""))), 0.0)
    lost = Reported(told_report("i0", 2, PrefixDelta(2, 3, pack([2]), b"")))
    assert core.handle(lost, 0.1) == [AskPrefixes("i0")]
    again = Reported(told_report("i0", 3, PrefixDelta(3, 4, pack([3]), b"")))
    assert core.handle(again, 0.2) == []
    mended = Reported(told_report("i0", 4, PrefixDelta(0, 5, pack([1, 2, 3]), b"")))
    assert core.handle(mended, 0.3) == []
    assert core.handle(Reported(told_report("i0", 5, None)), 9.0) == []
    assert core.members.prefixes.match(pack([1, 2, 3]), 16)[0] == 3


def test_a_restarted_instance_holds_nothing() -> None:
    core = dispatcher()
    core.handle(Joined(info("i0")), 0.0)
    core.handle(Reported(told_report("i0", 1, PrefixDelta(0, 1, pack([1]), b""))), 0.0)
    core.handle(Joined(info("i0", "b")), 0.1)
    assert len(core.members.prefixes) == 0


def test_a_report_that_was_not_sent_leaves_its_news_to_the_next() -> None:
    first = told_report("i0", 1, PrefixDelta(0, 1, pack([1, 2]), b""))
    second = told_report("i0", 2, PrefixDelta(1, 2, pack([3]), pack([1])))
    merged = second.after(first)
    assert merged.number == 2
    assert merged.prefix is not None
    assert merged.prefix.after == 0
    assert set(keys_of(merged.prefix.stored)) == {key(2), key(3)}
    fresh = told_report("i0", 1, PrefixDelta(0, 1, b"", b""), incarnation="b")
    assert fresh.after(first) is fresh
