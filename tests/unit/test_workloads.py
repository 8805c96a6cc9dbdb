"""Workloads: records, generators and what is made of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulation.workloads import generators, jsonl, lengths, transform
from cluster.simulation.workloads.arrivals import ramp, renewal, renewal_until, switched
from cluster.simulation.workloads.generators import Demand, ThinkTime
from cluster.simulation.workloads.records import (
    Span,
    WorkloadError,
    WorkloadRequest,
    by_arrival,
    prompt_ids,
    token_ids,
)
from instance.request import RequestClass

VOCAB = range(10, 1000)
few = settings(max_examples=40, deadline=None)
NAMES = st.sampled_from(["a", "b", "system", "ü"])


@st.composite
def dialogues(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    turn = st.tuples(st.integers(1, 300), st.integers(1, 300))
    return draw(st.lists(st.lists(turn, min_size=1, max_size=4), min_size=1, max_size=3))


@st.composite
def workloads(draw: st.DrawFn) -> list[WorkloadRequest]:
    """Single requests of shared pieces, and sessions."""
    spans = st.lists(
        st.builds(Span, NAMES, st.integers(1, 400), st.just(-1)), min_size=1, max_size=4
    )
    singles = st.builds(
        WorkloadRequest,
        st.floats(0.0, 1e4),
        spans.map(tuple),
        st.integers(1, 400),
        NAMES,
        st.sampled_from(RequestClass),
        NAMES,
    )
    seed = draw(st.integers(0, 2**32))
    talk = generators.sessions(seed, draw(dialogues()), 0.5, 2.0, ThinkTime(), 7)
    return by_arrival([*draw(st.lists(singles, max_size=5)), *talk])


def check(requests: list[WorkloadRequest]) -> None:
    """In order, not empty anywhere, and no turn before the one it follows."""
    ends: dict[tuple[str, int], WorkloadRequest] = {}
    for one, two in itertools.pairwise(requests):
        assert one.arrival <= two.arrival
    for request in requests:
        assert request.output_tokens >= 1
        assert all(span.length >= 1 for span in request.prompt)
        assert request.prompt
        if request.think is not None:
            before = ends[request.session, request.turn - 1]
            assert request.arrival == pytest.approx(before.arrival + request.think)
        for span in request.prompt:
            if span.turn >= 0:
                assert span.length == ends[request.session, span.turn].output_tokens
        if request.session:
            ends[request.session, request.turn] = request


@few
@given(st.text(max_size=20), st.integers(1, 200), st.integers(0, 200), st.integers(0, 9))
def test_a_longer_piece_begins_with_a_shorter(
    stream: str, short: int, more: int, seed: int
) -> None:
    ids = token_ids(stream, short + more, VOCAB, seed)
    assert ids[:short] == token_ids(stream, short, VOCAB, seed)
    assert set(ids) <= set(VOCAB)
    assert ids == token_ids(stream, short + more, list(VOCAB), seed)


def test_streams_and_seeds_have_contents_of_their_own() -> None:
    pieces = {tuple(token_ids(f"{n}", 32, VOCAB, seed)) for n in range(50) for seed in range(3)}
    assert len(pieces) == 150


@few
@given(dialogues(), st.integers(0, 5))
def test_a_turn_repeats_what_was_said(talk: list[list[tuple[int, int]]], system: int) -> None:
    made = generators.sessions(1, talk, 1.0, 1.0, ThinkTime(1.0, 3.0), system)
    check(made)
    said: dict[str, list[int]] = {}
    answers: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for request in made:
        answered = answers[request.session]
        ids = prompt_ids(request, VOCAB, 3, answered)
        before = said.get(request.session, token_ids("system", system, VOCAB, 3))
        assert ids[: len(before)] == before
        message, answer = talk[int(request.session[1:])][request.turn]
        assert len(ids) == len(before) + message == request.prompt_tokens
        assert request.output_tokens == answer
        # A real answer stands in the next prompt, and one not told has a stand-in.
        answered[request.turn] = list(range(2000, 2000 + answer))
        said[request.session] = ids + answered[request.turn]
        assert len(prompt_ids(request, VOCAB)) == request.prompt_tokens
    assert Counter(one.session for one in made) == {
        f"s{number}": len(turns) for number, turns in enumerate(talk)
    }


def test_an_answer_of_another_length_is_put_in_whole() -> None:
    request = WorkloadRequest(0.0, (Span("a", 3), Span("", 5, 0), Span("b", 2)), 1, session="s")
    ids = prompt_ids(request, VOCAB, outputs={0: [7, 8]})
    assert ids == [*token_ids("a", 3, VOCAB), 7, 8, *token_ids("b", 2, VOCAB)]
    assert len(prompt_ids(request, VOCAB)) == 10


# ---- transforms


@few
@given(workloads(), st.floats(0.01, 3.0), st.floats(0.01, 3.0))
def test_scaling_keeps_what_is_shared(
    requests: list[WorkloadRequest], prompt: float, output: float
) -> None:
    scaled = transform.scale_lengths(requests, prompt, output)
    check(scaled)
    for before, after in zip(requests, scaled, strict=True):
        assert after.output_tokens == max(1, round(before.output_tokens * output))
        assert [(s.stream, s.turn) for s in after.prompt] == [
            (s.stream, s.turn) for s in before.prompt
        ]
    sizes = {
        (old.stream, old.length): new.length
        for a, b in zip(requests, scaled, strict=True)
        for old, new in zip(a.prompt, b.prompt, strict=True)
        if old.turn < 0
    }
    assert all(new == max(1, round(old[1] * prompt)) for old, new in sizes.items())


@few
@given(workloads(), st.integers(20, 1500), st.sampled_from(["scale", "drop", "cut"]))
def test_fitting(requests: list[WorkloadRequest], limit: int, how: str) -> None:
    fitted = transform.fit(requests, limit, how)
    check(fitted)
    assert transform.longest(fitted) <= limit
    fits = [one for one in requests if one.prompt_tokens + one.output_tokens <= limit]
    if len(fits) == len(requests):
        assert fitted == requests
    if how == "scale":
        assert len(fitted) == len(requests)
    else:
        assert {one for one in fits if not one.session} <= set(fitted)
    with pytest.raises(WorkloadError, match="squeeze"):
        transform.fit(requests, limit, "squeeze")


def test_an_answer_that_is_quoted_is_not_cut() -> None:
    asked = (Span("system", 7), Span("s/0", 1))
    first = WorkloadRequest(0.0, asked, 2, session="s")
    second = WorkloadRequest(
        1.0, (*asked, Span("", 2, 0), Span("s/1", 1)), 258, session="s", turn=1, think=1.0
    )
    check(fitted := transform.fit([first, second], 267, "cut"))
    assert [one.prompt for one in fitted] == [asked, asked]
    assert transform.fit([first, second], 268, "cut")[1].prompt == second.prompt[:3]


def test_what_cannot_shrink_is_refused() -> None:
    request = WorkloadRequest(0.0, tuple(Span(f"{n}", 2) for n in range(9)), 5)
    with pytest.raises(WorkloadError, match="9 pieces"):
        transform.fit([request], 9, "scale")
    assert transform.longest(transform.fit([request], 10, "scale")) == 10


@few
@given(workloads(), st.floats(0.1, 50.0))
def test_rates(requests: list[WorkloadRequest], rate: float) -> None:
    own = {one.arrival for one in requests if one.think is None}
    if len(own) < 2 or max(own) - min(own) < 1.0:
        return
    faster = transform.at_rate(requests, rate)
    check(faster)
    assert transform.mean_rate(faster) == pytest.approx(rate)
    thinks = sorted(one.think for one in faster if one.think is not None)
    assert thinks == sorted(one.think for one in requests if one.think is not None)


@few
@given(workloads(), st.floats(0.1, 10.0), st.floats(0.3, 3.0))
def test_times_drawn_anew(requests: list[WorkloadRequest], rate: float, cv: float) -> None:
    drawn = transform.drawn_anew(requests, rate, cv, 1)
    check(drawn)
    assert [one.think for one in drawn].count(None) == [one.think for one in requests].count(None)
    at_once = transform.at_rate(requests, math.inf)
    check(at_once)
    assert all(one.arrival == 0.0 for one in at_once if one.think is None)


def test_a_rate_needs_time() -> None:
    one = WorkloadRequest(1.0, (Span("a", 1),), 1)
    for requests in ([], [one], [one, one]):
        with pytest.raises(WorkloadError, match="rate"):
            transform.mean_rate(requests)


@few
@given(workloads(), st.floats(0, 1e4), st.none() | st.floats(0, 1e4), st.none() | st.integers(0, 9))
def test_windows(
    requests: list[WorkloadRequest], start: float, duration: float | None, limit: int | None
) -> None:
    part = transform.window(requests, start, duration, limit)
    check(part)
    assert limit is None or len(part) <= limit
    assert all(one.arrival >= 0 for one in part)
    if duration is None and limit is None:
        later = [one for one in requests if one.arrival >= start and one.think is None]
        assert sum(1 for one in part if one.think is None) == len(later)


@few
@given(workloads(), st.integers(1, 8), st.floats(0, 3), st.integers(0, 9))
def test_tenants_and_classes(
    requests: list[WorkloadRequest], count: int, skew: float, seed: int
) -> None:
    dealt = transform.with_tenants(requests, count, skew, seed)
    assert {one.tenant for one in dealt} <= {f"tenant-{n + 1}" for n in range(count)}
    marked = transform.with_class(dealt, 0.5, RequestClass.BATCH, "low", seed)
    check(marked)
    for one in (dealt, marked):
        of_session: dict[str, set[tuple[str, RequestClass]]] = defaultdict(set)
        for request in one:
            of_session[request.session].add((request.tenant, request.request_class))
        assert all(len(found) == 1 for name, found in of_session.items() if name)
    for before, after in zip(dealt, marked, strict=True):
        changed = dataclasses.replace(before, request_class=RequestClass.BATCH, group="low")
        assert after in (before, changed)


def test_shares_of_tenants_and_classes() -> None:
    requests = generators.single_requests([0.0] * 4000, [1] * 4000, [1] * 4000)
    dealt = Counter(one.tenant for one in transform.with_tenants(requests, 3, 1.0, 5))
    total = 1 + 1 / 2 + 1 / 3
    for number in (1, 2, 3):
        assert dealt[f"tenant-{number}"] / 4000 == pytest.approx(1 / number / total, abs=0.03)
    high = transform.with_class(requests, 0.1, RequestClass.INTERACTIVE, "high", 5)
    assert sum(one.group == "high" for one in high) / 4000 == pytest.approx(0.1, abs=0.02)


# ---- arrivals and lengths


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_renewal(cv: float) -> None:
    times = renewal(np.random.default_rng(1), 5.0, cv, 60_000)
    gaps = np.diff(times, prepend=0.0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


@few
@given(st.floats(0, 20), st.floats(0.2, 4), st.floats(0, 100), st.integers(0, 99))
def test_renewal_until(rate: float, cv: float, duration: float, seed: int) -> None:
    times = renewal_until(np.random.default_rng(seed), rate, cv, duration)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < duration)).all()


def test_ramp_and_pauses() -> None:
    times = ramp(np.random.default_rng(2), 2.0, 8.0, 1.0, 3000.0)
    halves = np.histogram(times, [0, 1500, 3000])[0]
    assert halves[0] / 1500 == pytest.approx(3.5, rel=0.06)
    assert halves[1] / 1500 == pytest.approx(6.5, rel=0.06)
    steady = ramp(np.random.default_rng(2), 4.0, 4.0, 1.0, 3000.0)
    assert len(steady) / 3000 == pytest.approx(4.0, rel=0.06)
    paused = switched(steady, 10.0, 5.0)
    assert len(paused) == len(steady)
    assert (paused % 15.0 < 10.0 + 1e-9).all()


PUBLISHED = {
    # Mean, then P50, P80, P95 and P99, as the Llumnix paper's table has them.
    "s": (128, (38, 113, 413, 1464)),
    "m": (256, (32, 173, 1288, 4208)),
    "l": (512, (55, 582, 3113, 5166)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_power_laws_are_the_published_ones(name: str) -> None:
    mean, wanted = PUBLISHED[name]
    draw = lengths.power_law(*lengths.POWER_LAWS[name])
    drawn = draw(np.random.default_rng(3), 40_000)
    assert drawn.min() >= 1
    assert drawn.max() <= 6144
    assert drawn.mean() == pytest.approx(mean, rel=0.03)
    assert np.percentile(drawn, (50, 80, 95, 99)) == pytest.approx(wanted, rel=0.18)


@pytest.mark.parametrize(
    ("name", "side", "mean", "wanted"),
    [
        ("sharegpt", 0, 306, (74, 348, 1484, 3388)),
        ("sharegpt", 1, 500, (487, 781, 988, 1234)),
        ("burstgpt", 0, 830, (582, 1427, 2345, 3549)),
        ("burstgpt", 1, 271, (243, 434, 669, 964)),
    ],
)
def test_data_sets_have_the_published_quantiles(
    name: str, side: int, mean: float, wanted: tuple[float, ...]
) -> None:
    drawn = lengths.DATASETS[name][side](np.random.default_rng(4), 60_000)
    assert drawn.min() >= 1
    assert drawn.mean() == pytest.approx(mean, rel=0.03)
    assert np.percentile(drawn, (50, 80, 95, 99)) == pytest.approx(wanted, rel=0.05)


def test_other_lengths() -> None:
    rng = np.random.default_rng(5)
    assert set(lengths.fixed(7)(rng, 9)) == {7}
    assert set(lengths.uniform(2, 4)(rng, 200)) == {2, 3, 4}
    drawn = Counter(lengths.weighted([0, 5, 9], [1, 2, 1])(rng, 4000).tolist())
    assert set(drawn) == {1, 5, 9}
    assert drawn[5] / 4000 == pytest.approx(0.5, abs=0.04)
    assert len(lengths.power_law(128, 2.0)(rng, 0)) == 0


def test_conversations() -> None:
    made = generators.conversations(
        6, 2000, 5.5, lengths.fixed(50), lengths.fixed(9), lengths.uniform(1, 3)
    )
    turns = [len(one) for one in made]
    assert np.mean(turns) == pytest.approx(5.5, rel=0.1)
    assert {one[0][0] for one in made} == {50}
    assert {message for one in made for message, _ in one[1:]} == {9}


def test_think_times() -> None:
    drawn = ThinkTime(20.0, 80.0).draw(np.random.default_rng(7), 20_000)
    assert np.percentile(drawn, (50, 90)) == pytest.approx((20.0, 80.0), rel=0.06)


def test_tenants_demand_each_its_own() -> None:
    some = lengths.uniform(1, 100)
    steady = Demand("a", 2.0, some, some, request_class=RequestClass.BATCH)
    gone = Demand("b", 3.0, some, some, on=10.0, off=20.0, start=5.0)
    made = generators.tenants(8, [steady, gone], 300.0)
    check(made)
    alone = generators.tenants(8, [steady], 300.0)
    assert [one for one in made if one.tenant == "a"] == alone
    assert {one.request_class for one in alone} == {RequestClass.BATCH}
    assert len(alone) == pytest.approx(600, rel=0.15)
    bursts = [one.arrival for one in made if one.tenant == "b"]
    assert all((arrival - 5.0) % 30.0 < 10.0 + 1e-9 for arrival in bursts)
    assert len(bursts) == pytest.approx(300, rel=0.2)
    assert len({one.prompt[0].stream for one in made}) == len(made)


# ---- Drover's own form


@few
@given(workloads())
def test_written_and_read_again(requests: list[WorkloadRequest]) -> None:
    assert jsonl.read(jsonl.write(requests), "x") == requests


def test_written_by_hand() -> None:
    lines = [
        '{"arrival": 1, "prompt_tokens": 5, "output_tokens": 2, "session": "s", "class": "batch"}',
        "",
        '{"arrival": 2.5, "prompt": [["hello", 3], {"turn": 0, "length": 2}], "output_tokens": 4,'
        ' "session": "s", "turn": 1, "think": 1.5}',
    ]
    first, second = jsonl.read(lines, "x")
    assert (first.prompt_tokens, first.request_class) == (5, RequestClass.BATCH)
    assert (second.prompt_tokens, second.turn, second.think) == (5, 1, 1.5)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"arrival": 0, "output_tokens": 1}', "either prompt or prompt_tokens"),
        ('{"arrival": -1, "prompt_tokens": 1, "output_tokens": 1}', "arrival"),
        ('{"arrival": NaN, "prompt_tokens": 1, "output_tokens": 1}', "arrival"),
        ('{"arrival": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens"),
        ('{"arrival": 0, "prompt_tokens": 1.5, "output_tokens": 1}', "whole"),
        ('{"arrival": 0, "prompt_tokens": true, "output_tokens": 1}', "prompt_tokens"),
        ('{"arrival": 0, "prompt": [], "output_tokens": 1}', "prompt"),
        ('{"arrival": 0, "prompt": [["a"]], "output_tokens": 1}', r"prompt\[0\]"),
        ('{"arrival": 0, "prompt": [["a", 0]], "output_tokens": 1}', "length"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "class": "x"}', "class"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "tenant": 4}', "tenant"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "typo": 4}', "typo"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "think": 4}', "session"),
        (
            '{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "think": 4, "session": "a"}',
            "the turn before",
        ),
    ],
)
def test_errors_name_line_and_fault(line: str, wrong: str) -> None:
    good = '{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1}'
    with pytest.raises(WorkloadError, match=f"file:2: .*{wrong}"):
        jsonl.read([good, line], "file")
