"""Log-probabilities stay with their tokens: sequence, wire, claim, home."""

from __future__ import annotations

from cluster.gateway.home import Deliver, Home, HomeAction, Peer
from instance import wire
from instance.config import SchedulerConfig
from instance.homes import HomeLink, tokens_message
from instance.kv.blocks import BlockPool
from instance.migration import messages as m
from instance.migration.codec import claim_to_wire
from instance.request import (
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    TokenLogprobs,
)
from instance.scheduler import Scheduler
from protos import generate_pb2 as pb

A, B = Peer("a", "1"), Peer("b", "1")


def figures(*values: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(-value / 4, (value, 3), (-value / 4, -2.0)) for value in values]


def test_wire_round_trips() -> None:
    for params in (
        SamplingParams(),
        SamplingParams(
            0.5, 0.9, 7, 0.1, 3, 9, 2, True, (5, 6), 1.2, -0.5, 2.0, ((3, 1.5), (9, -100.0)), 0
        ),
    ):
        sent = pb.Sampling.FromString(wire.params_to_wire(params).SerializeToString())
        assert wire.params_from_wire(sent) == params
    claim = m.Claim("r", 2, "x", 5, (7, 8), tuple(figures(1, 2)))
    sent_claim = pb.ToGateway.FromString(claim_to_wire(claim).SerializeToString()).claim
    assert wire.logprobs_from_wire(sent_claim.logprobs) == claim.logprobs


def test_a_sequence_keeps_what_is_not_acknowledged() -> None:
    """Through steps, acknowledgements and a replay that begins in the middle."""
    scheduler = Scheduler(SchedulerConfig(), BlockPool(10, 16), b"")
    params = SamplingParams(max_tokens=20, logprobs=1)
    sequence = Sequence.start(Request("r", (1, 2), params), emitted=(50, 51))
    scheduler.add(sequence)
    link = HomeLink("home")
    link.open()
    for token in (60, 61, 62, 63):
        plan = scheduler.schedule()
        scheduler.patch(plan)
        [emission] = scheduler.complete(plan, [token], dict(enumerate(figures(token))))
        assert emission.logprobs == tuple(figures(token))
        link.send(pb.ToGateway(lost=pb.Lost()))  # so that each has a frame of its own
        link.send_tokens(
            sequence,
            tokens_message(
                sequence, emission.index, emission.tokens, FinishReason.NOT_FINISHED,
                logprobs=emission.logprobs,
            ),
        )  # fmt: skip
    assert sequence.logprobs_since(2) == tuple(figures(60, 61, 62, 63))
    link.acknowledge(3)
    assert sequence.acked == 5
    assert sequence.logprobs == figures(63)
    assert sequence.logprobs_since(5) == tuple(figures(63))
    assert sequence.logprobs_since(6) == ()
    link.acknowledge(1)  # late
    assert sequence.acked == 5
    sequence.acknowledge(6)
    assert sequence.logprobs == []


def test_sequences_that_do_not_ask_have_none() -> None:
    scheduler = Scheduler(SchedulerConfig(), BlockPool(20, 16), b"")
    for name in "ab":
        params = SamplingParams(logprobs=None if name == "a" else 0)
        scheduler.add(Sequence.start(Request(name, (1, 2), params)))
    plan = scheduler.schedule()
    scheduler.patch(plan)
    first, second = scheduler.complete(plan, [5, 6], {1: figures(6)[0]})
    assert (first.tokens, first.logprobs) == ((5,), ())
    assert (second.tokens, second.logprobs) == ((6,), tuple(figures(6)))
    assert first.sequence.logprobs == []


def owned(home: Home) -> None:
    home.add("r")
    for peer in (A, B):
        home.connected(peer)
    home.placed("r", 1, A)


def delivered(actions: list[HomeAction]) -> list[tuple[int, list[TokenLogprobs]]]:
    found = [one for one in actions if isinstance(one, Deliver)]
    assert all(len(one.logprobs) == len(one.tokens) for one in found)
    return [(one.index, list(one.logprobs)) for one in found]


def test_the_home_cuts_them_as_it_cuts_the_tokens() -> None:
    home = Home()
    owned(home)
    assert delivered(home.tokens(A, "r", 1, 0, [1, 2], logprobs=figures(1, 2))) == [
        (0, figures(1, 2))
    ]
    again = home.tokens(A, "r", 1, 1, [2, 3], logprobs=figures(2, 3))
    assert delivered(again) == [(2, figures(3))]
    # Beyond a gap, which the next message fills.
    assert delivered(home.tokens(A, "r", 1, 4, [5], logprobs=figures(5))) == []
    filled = home.tokens(A, "r", 1, 3, [4], logprobs=figures(4))
    assert delivered(filled) == [(3, figures(4)), (4, figures(5))]


def test_a_claim_brings_them() -> None:
    home = Home()
    owned(home)
    home.tokens(A, "r", 1, 0, [1, 2], logprobs=figures(1, 2))
    actions = home.claim(B, "r", 1, "x", 1, [2, 3, 4], figures(2, 3, 4))
    assert delivered(actions) == [(2, figures(3, 4))]
