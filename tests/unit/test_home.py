"""The home of requests: exact streams and one owner per epoch."""

from __future__ import annotations

import pytest

from cluster.gateway.home import Home
from cluster.gateway.home_actions import (
    Deliver,
    Held,
    HomeAction,
    Peer,
    Place,
    SendAsk,
    SendCancel,
    SendClaimReply,
    SendSubmit,
)
from instance.migration.messages import ClaimOutcome
from instance.request import FinishReason

A, B = Peer("a", "a1"), Peer("b", "b1")


def connect(home: Home, *peers: Peer) -> None:
    for peer in peers:
        home.connected(peer)
        assert home.holdings(peer, 0, []) == []


def running(tokens: int = 0) -> Home:
    """A home with request "r" on A, and so many tokens of it."""
    home = Home()
    connect(home, A, B)
    assert home.add("r") == [Place("r", 1)]
    assert home.placed("r", 1, A) == [SendSubmit(A, "r", 1)]
    if tokens:
        home.tokens(A, "r", 1, 0, list(range(tokens)))
    return home


def granted(peer: Peer, epoch: int, index: int, attempt: str = "m") -> HomeAction:
    outcome = ClaimOutcome.GRANTED
    return SendClaimReply(peer, "r", epoch, attempt, outcome, epoch + 1, index)


def denied(peer: Peer, epoch: int, outcome: ClaimOutcome, attempt: str = "m") -> HomeAction:
    return SendClaimReply(peer, "r", epoch, attempt, outcome)


class TestTokens:
    def test_each_index_once_in_order(self) -> None:
        home = running()
        assert home.tokens(A, "r", 1, 0, [5, 6], cached_tokens=16) == [
            Deliver("r", 0, [5, 6], cached_tokens=16)
        ]
        assert home.tokens(A, "r", 1, 0, [5, 6]) == []
        assert home.tokens(A, "r", 1, 1, [6, 7]) == [Deliver("r", 2, [7])]
        assert home.tokens(A, "r", 1, 3, []) == []
        assert home.requests["r"].output == [5, 6, 7]

    def test_tokens_beyond_a_gap_wait(self) -> None:
        home = running(1)
        assert home.tokens(A, "r", 1, 3, [13]) == [SendAsk(A, "r", 1, 1)]
        assert home.tokens(A, "r", 1, 4, [14], FinishReason.LENGTH) == []
        assert home.tokens(A, "r", 1, 1, [11, 12]) == [
            Deliver("r", 1, [11, 12]),
            Deliver("r", 3, [13]),
            Deliver("r", 4, [14], FinishReason.LENGTH),
        ]
        assert not home.requests

    def test_tokens_that_waited_do_not_outlive_their_epoch(self) -> None:
        home = running(1)
        home.tokens(A, "r", 1, 3, [13])
        home.claim(B, "r", 1, "m", 1, [21])
        assert home.tokens(B, "r", 2, 2, [22]) == [Deliver("r", 2, [22])]

    def test_stale_and_foreign_tokens_are_cancelled(self) -> None:
        home = running(2)
        home.claim(B, "r", 1, "m", 2, [])
        assert home.tokens(A, "r", 1, 2, [9]) == [SendCancel(A, "r", 1)]
        assert home.tokens(A, "r", 2, 2, [9]) == [SendCancel(A, "r", 2)]
        assert home.tokens(B, "r", 3, 2, [9]) == [SendCancel(B, "r", 3)]
        assert home.tokens(A, "unknown", 1, 0, [9]) == [SendCancel(A, "unknown", 1)]
        later = Peer("b", "b2")
        assert home.tokens(later, "r", 2, 2, [9]) == [SendCancel(later, "r", 2)]
        assert home.requests["r"].output == [0, 1]

    def test_the_end_closes(self) -> None:
        home = running(2)
        end = home.tokens(A, "r", 1, 2, [], FinishReason.ERROR, "no room")
        assert end == [Deliver("r", 2, [], FinishReason.ERROR, "no room")]
        assert not home.requests
        assert home.tokens(A, "r", 1, 2, [], FinishReason.ERROR) == [SendCancel(A, "r", 1)]

    def test_an_end_that_comes_again_with_its_tokens(self) -> None:
        home = running(3)
        assert home.tokens(A, "r", 1, 2, [2], FinishReason.STOP) == [
            Deliver("r", 3, [], FinishReason.STOP)
        ]


class TestClaims:
    def test_tokens_first_then_the_grant(self) -> None:
        home = running(2)
        assert home.claim(B, "r", 1, "m", 1, [1, 2, 3]) == [
            Deliver("r", 2, [2, 3]),
            granted(B, 1, 4),
        ]
        request = home.requests["r"]
        assert (request.epoch, request.holder, request.moves) == (2, B, 1)

    def test_the_present_holder_is_granted_again(self) -> None:
        home = running(2)
        home.claim(B, "r", 1, "m", 2, [])
        assert home.claim(B, "r", 1, "m", 2, []) == [granted(B, 1, 2)]
        assert home.requests["r"].moves == 1

    def test_one_grant_per_epoch(self) -> None:
        home = running(2)
        home.claim(B, "r", 1, "m", 2, [])
        superseded = ClaimOutcome.SUPERSEDED
        assert home.claim(A, "r", 1, "m", 2, []) == [denied(A, 1, superseded)]
        assert home.claim(B, "r", 1, "n", 2, []) == [denied(B, 1, superseded, "n")]
        assert home.claim(A, "r", 3, "m", 2, []) == [denied(A, 3, superseded)]

    def test_the_source_may_take_it_back(self) -> None:
        home = running(2)
        assert home.claim(A, "r", 1, "m", 2, []) == [granted(A, 1, 2)]
        assert home.claim(B, "r", 1, "m", 2, []) == [denied(B, 1, ClaimOutcome.SUPERSEDED)]

    def test_a_closed_request_is_gone(self) -> None:
        home = running(2)
        assert home.close("r") == [SendCancel(A, "r", 1)]
        assert home.close("r") == []
        assert home.claim(B, "r", 1, "m", 2, []) == [denied(B, 1, ClaimOutcome.GONE)]

    def test_a_replay_leaves_every_claim_behind(self) -> None:
        home = running(2)
        home.gone(A)
        assert home.claim(B, "r", 1, "m", 2, []) == [denied(B, 1, ClaimOutcome.SUPERSEDED)]
        assert home.claim(B, "r", 2, "m", 2, []) == [denied(B, 2, ClaimOutcome.SUPERSEDED)]

    def test_the_dead_are_granted_nothing(self) -> None:
        home = running(2)
        home.gone(B)
        assert home.claim(B, "r", 1, "m", 2, []) == [denied(B, 1, ClaimOutcome.SUPERSEDED)]

    def test_a_claim_with_a_gap_loses_nothing(self) -> None:
        assert running(1).claim(B, "r", 1, "m", 2, [2]) == [granted(B, 1, 1)]


class TestHoldings:
    def test_a_lost_submit_is_sent_again(self) -> None:
        home = running()
        assert home.holdings(A, 0, []) == []  # taken before the submit was read
        assert home.holdings(A, 1, []) == [SendSubmit(A, "r", 1)]
        assert home.holdings(A, 1, []) == []
        home.connected(A)
        assert home.holdings(A, 0, []) == [SendSubmit(A, "r", 1)]

    def test_a_submit_waits_for_a_stream(self) -> None:
        home = Home()
        home.add("r")
        assert home.placed("r", 1, A) == []
        home.connected(A)
        assert home.holdings(A, 0, []) == [SendSubmit(A, "r", 1)]
        assert home.holdings(B, 0, [Held("r", 1, "running", 0)]) == []  # no stream, no word

    @pytest.mark.parametrize("seen", ["tokens", "holding", "claim"])
    def test_what_an_instance_had_and_lost_is_replayed(self, seen: str) -> None:
        home, peer, epoch = running(), A, 1
        if seen == "tokens":
            home.tokens(A, "r", 1, 0, [5])
        elif seen == "holding":
            home.holdings(A, 1, [Held("r", 1, "waiting", 0)])
        else:
            home.claim(B, "r", 1, "m", 0, [])
            peer, epoch = B, 2
        assert home.holdings(peer, 1, []) == [Place("r", epoch + 1)]
        assert home.requests["r"].holder is None

    def test_what_is_stale_is_cancelled(self) -> None:
        home = running(2)
        home.claim(B, "r", 1, "m", 2, [])
        stale = [Held("r", 1, "running", 2), Held("unknown", 3, "waiting", 0)]
        assert home.holdings(A, 1, stale) == [
            SendCancel(A, "r", 1),
            SendCancel(A, "unknown", 3),
        ]

    def test_missing_tokens_are_asked_for(self) -> None:
        home = running(2)
        ahead = [Held("r", 1, "running", 4)]
        assert home.holdings(A, 1, ahead) == [SendAsk(A, "r", 1, 2)]
        assert home.holdings(A, 1, ahead) == [SendAsk(A, "r", 1, 2)]
        assert home.holdings(A, 1, [Held("r", 1, "running", 2)]) == []

    def test_a_new_stream_is_told_what_has_arrived(self) -> None:
        home = running(2)
        home.connected(A)
        held = [Held("r", 1, "running", 2)]
        assert home.holdings(A, 0, held) == [SendAsk(A, "r", 1, 2)]
        assert home.holdings(A, 0, held) == []

    def test_parties_of_a_handover_are_left_alone(self) -> None:
        home = running(2)
        handover = [Held("r", 1, "handover", 2)]
        assert home.holdings(B, 0, handover) == []
        assert home.holdings(A, 1, handover) == []
        home.claim(B, "r", 1, "m", 2, [])
        assert home.holdings(B, 0, handover) == []  # has not read its grant
        assert home.holdings(A, 1, handover) == [SendCancel(A, "r", 1)]


class TestReplays:
    def test_a_death_replays_what_was_held(self) -> None:
        home = running(2)
        assert home.gone(A) == [Place("r", 2, ("a",))]
        assert home.gone(A) == []
        assert home.placed("r", 1, B) == []
        assert home.placed("r", 2, B) == [SendSubmit(B, "r", 2)]
        assert home.placed("r", 2, A) == []
        assert home.requests["r"].output == [0, 1]
        assert home.tokens(B, "r", 2, 2, [2]) == [Deliver("r", 2, [2])]

    def test_the_death_of_a_former_holder_changes_nothing(self) -> None:
        home = running(2)
        home.claim(B, "r", 1, "m", 2, [])
        assert home.gone(A) == []
        assert home.gone(Peer("b", "b0")) == []
        assert home.requests["r"].holder == B

    def test_lost_replays_only_the_present_epoch(self) -> None:
        home = running(2)
        assert home.lost(B, "r", 1) == []
        assert home.lost(A, "unknown", 1) == []
        assert home.lost(A, "r", 1) == [Place("r", 2)]
        assert home.lost(A, "r", 1) == []

    def test_closing_while_a_placement_is_sought(self) -> None:
        home = running(2)
        home.gone(A)
        assert home.close("r") == []
        assert home.placed("r", 2, B) == []

    def test_an_id_is_used_once(self) -> None:
        home = running()
        with pytest.raises(ValueError, match="in use"):
            home.add("r")
