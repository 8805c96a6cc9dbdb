"""The clients' side of a simulation: arrivals, sessions, and the home of every request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.dispatcher.events import Served
from cluster.dispatcher.messages import Placement, PlaceRequest, Refusal
from cluster.gateway.dispatching import ASK_AGAIN
from cluster.gateway.home import Home
from cluster.gateway.home_actions import (
    Deliver,
    HomeAction,
    Peer,
    Place,
    SendAsk,
    SendCancel,
    SendClaimReply,
    SendSubmit,
)
from cluster.gateway.served import ServedService
from cluster.simulation.answers import Answers
from cluster.simulation.instance import SimulatedInstance
from cluster.simulation.network import NetworkConfig
from cluster.simulation.records import RequestRecord
from cluster.simulation.workloads.records import WorkloadRequest, prompt_ids
from instance.clock import Clock
from instance.kv.prefix_events import prompt_keys
from instance.migration import messages as m
from instance.request import FinishReason, Request, SamplingParams, Sequence

GATEWAY = "gateway-0"


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """What clients send beside the workload's lengths.

    Attributes:
        max_tokens: Output limit that every request states; never a hint at its own length.
        max_model_len: Prompt and output at most; a prompt that leaves no room is refused.
        vocab: Ids of ordinary tokens.
        seed: Of the contents.
        block_size: Tokens per KV block.
        salt: What roots the hashes of blocks; None where no prefix is ever cached.
    """

    max_tokens: int
    max_model_len: int
    vocab: range
    seed: int
    block_size: int
    salt: bytes | None


class Asked(Protocol):
    """The dispatcher, as a gateway calls it."""

    def place(self, request: PlaceRequest) -> None:
        """Where shall this request run?"""

    def finished(self, request_id: str, epoch: int) -> None:
        """A request has ended."""

    def served(self, event: Served) -> None:
        """A stream to an instance was lost."""


class SimulatedGateway:
    """Sends the workload, follows every request to its end, and replays what died.

    Args:
        dispatcher: Answers with ``placed`` or ``refused``.

    Attributes:
        requests: Records by request id, in the order of the workload.
        open: Requests of the workload that have not ended.
    """

    def __init__(
        self,
        clock: Clock,
        network: NetworkConfig,
        config: ClientConfig,
        answers: Answers,
        dispatcher: Asked,
    ) -> None:
        self.requests: dict[str, RequestRecord] = {}
        self.open = 0
        self._clock = clock
        self._network = network
        self._config = config
        self._answers = answers
        self._dispatcher = dispatcher
        self._served = ServedService()
        self._asked: dict[str, PlaceRequest] = {}
        self._home = Home()
        self._instances: dict[Peer, SimulatedInstance] = {}
        self._workload: dict[str, WorkloadRequest] = {}
        self._next_turn: dict[str, str] = {}
        self._sent: dict[str, Request] = {}
        self._said: dict[str, dict[int, list[int]]] = {}
        self._epochs: dict[str, int] = {}
        self._unanswered: list[RequestRecord] = []

    # ---- the workload

    def load(self, workload: SequenceOf[WorkloadRequest]) -> None:
        """Send these requests, each at its time or ``think`` after the end of the turn
        before."""
        turns: dict[tuple[str, int], str] = {}
        for number, request in enumerate(workload):
            name = f"request-{number}"
            self._workload[name] = request
            if request.session:
                turns[request.session, request.turn] = name
        self.open += len(workload)
        for name, request in self._workload.items():
            before = turns.get((request.session, request.turn - 1))
            if request.think is not None and before is not None:
                self._next_turn[before] = name
            else:
                delay = request.arrival - self._clock.now()
                self._clock.call_later(delay, functools.partial(self._send, name))

    def _send(self, name: str) -> None:
        asked, config = self._workload[name], self._config
        prompt = prompt_ids(asked, config.vocab, config.seed, self._said.get(asked.session))
        room = config.max_model_len - len(prompt)
        limit = min(config.max_tokens, room)
        record = self.requests[name] = RequestRecord(
            request_id=name,
            tenant=asked.tenant,
            request_class=asked.request_class,
            group=asked.group,
            arrival=self._clock.now(),
            prompt_tokens=len(prompt),
            wanted=min(asked.output_tokens, limit),
        )
        if room < 1:
            self._end(record, "400")
            return
        self._answers.prepare(name, asked.output_tokens)
        self._sent[name] = Request(
            request_id=name,
            prompt=tuple(prompt),
            params=SamplingParams(max_tokens=limit, seed=config.seed),
            home=GATEWAY,
            tenant=asked.tenant,
            request_class=asked.request_class,
            arrival=self._clock.now(),
        )
        delay = self._network.gateway
        if self._network.contention:
            delay += self._contention(record)
        self._clock.call_later(delay, lambda: self._execute(self._home.add(name)))

    def _contention(self, record: RequestRecord) -> float:
        """Seconds that a request takes longer for those that wait for their first token."""
        before = [one for one in self._unanswered if one.status == "open" and not one.times]
        self._unanswered = [*before, record]
        return self._network.contention if before else 0.0

    def _end(self, record: RequestRecord, status: str) -> None:
        record.status = status
        record.ended = record.times[-1] if status == "finished" else self._clock.now()
        self.open -= 1
        name = record.request_id
        asked = self._workload[name]
        request = self._sent.pop(name, None)
        follower = self._next_turn.get(name)
        if follower is not None:
            if status == "finished" and request is not None:
                said = self._said.setdefault(asked.session, {})
                said[asked.turn] = list(self._answers.tokens(name, 0, len(record.times)))
            think = self._workload[follower].think or 0.0
            self._clock.call_later(think, functools.partial(self._send, follower))
        else:
            self._said.pop(asked.session, None)
        self._answers.forget(name)

    # ---- instances

    def connect(self, instance: SimulatedInstance) -> None:
        """A stream to this instance is up."""
        peer = Peer(instance.instance_id, instance.incarnation)
        self._instances[peer] = instance
        self._home.connected(peer)

    def gone(self, instance: SimulatedInstance) -> None:
        """An instance has died: what it held is placed anew."""
        peer = Peer(instance.instance_id, instance.incarnation)
        self._execute(self._home.gone(peer))
        charged = tuple(self._served.of(peer))
        if charged:
            self._dispatcher.served(Served(GATEWAY, *peer, charged))

    def output(self, instance: SimulatedInstance, sequence: Sequence, reason: FinishReason) -> None:
        """Take the output of a sequence that was not sent before."""
        index, tokens = sequence.acked, sequence.output[sequence.acked :]
        sequence.acknowledge(sequence.num_output)
        peer, epoch = Peer(instance.instance_id, instance.incarnation), sequence.epoch
        if reason:
            self._epochs[sequence.request_id] = epoch
        cached = max(0, sequence.num_cached)

        def take() -> None:
            name, message = sequence.request_id, sequence.error
            self._execute(
                self._home.tokens(peer, name, epoch, index, tokens, reason, message, cached),
                producer=peer,
            )

        self._clock.call_later(self._network.message, take)

    def claim(self, instance: SimulatedInstance, claim: m.Claim) -> None:
        """A party of a migration asks for a request."""
        peer = Peer(instance.instance_id, instance.incarnation)
        self._clock.call_later(
            self._network.message,
            lambda: self._execute(
                self._home.claim(
                    peer, claim.request_id, claim.epoch, claim.attempt, claim.index, claim.tokens
                )
            ),
        )

    # ---- the dispatcher's answers

    def placed(self, placement: Placement) -> None:
        """The dispatcher chose an instance."""
        record = self.requests[placement.request_id]
        peer = Peer(placement.instance_id, placement.incarnation)
        instance = self._instances[peer]
        owned = self._home.requests.get(placement.request_id)
        if owned is not None and owned.epoch == placement.epoch and owned.holder is None:
            del self._asked[placement.request_id]
            if placement.epoch == 1:
                record.placed = self._clock.now()
            record.instances.append(placement.instance_id)
        self._execute(self._home.placed(placement.request_id, placement.epoch, peer))
        if not instance.alive:
            # The connection is refused; the dispatcher did not know yet.
            self._clock.call_later(self._network.detection, lambda: self.gone(instance))

    def refused(self, refusal: Refusal) -> None:
        """The dispatcher has no instance for a request."""
        owned = self._home.requests.get(refusal.request_id)
        if owned is not None and owned.epoch == refusal.epoch and owned.holder is None:
            del self._asked[refusal.request_id]
            self._home.close(refusal.request_id)
            self._dispatcher.finished(refusal.request_id, refusal.epoch)
            self._end(self.requests[refusal.request_id], str(refusal.status))

    # ---- what the home wants done

    def _execute(self, actions: list[HomeAction], producer: Peer | None = None) -> None:
        for action in actions:
            match action:
                case Place(request_id, epoch, avoid):
                    self._ask_for_place(request_id, epoch, avoid)
                case Deliver():
                    if producer is not None:
                        request = self._sent[action.request_id]
                        fresh = 0 if action.index else len(request.prompt) - action.cached_tokens
                        count = len(action.tokens)
                        self._served.note(producer, request.account, fresh, count)
                    if action.finish_reason:
                        self._finish(action)
                case SendSubmit(peer, request_id, epoch):
                    owned, submit = self._home.requests[request_id], self._instances[peer].submit
                    output, paid = tuple(owned.output), owned.charged_prompt
                    self._tell(peer, submit, self._sent[request_id], epoch, output, paid)
                case SendCancel(peer, request_id, epoch):
                    self._tell(peer, self._instances[peer].cancel, request_id, epoch)
                case SendClaimReply(peer, request_id, epoch, attempt, outcome, new, index):
                    reply = m.ClaimReply(request_id, epoch, attempt, outcome, new, index)
                    self._tell(peer, self._instances[peer].attempts.claim_reply, reply)
                case SendAsk():
                    raise AssertionError("no message is lost on a modelled way")

    def _finish(self, action: Deliver) -> None:
        record = self.requests[action.request_id]
        if action.index + len(action.tokens) != len(record.times):
            raise AssertionError(
                f"{action.request_id}: its home has {action.index + len(action.tokens)} tokens, "
                f"{len(record.times)} were drawn"
            )
        self._dispatcher.finished(action.request_id, self._epochs.pop(action.request_id))
        error = action.finish_reason is FinishReason.ERROR
        self._end(record, "500" if error else "finished")

    def _ask_for_place(self, request_id: str, epoch: int, avoid: tuple[str, ...]) -> None:
        request = self._sent[request_id]
        record = self.requests[request_id]
        if epoch > 1:
            record.replays += 1
        owned, config = self._home.requests[request_id], self._config
        self._ask(
            PlaceRequest(
                request_id=request_id,
                epoch=epoch,
                gateway_id=GATEWAY,
                tenant=request.tenant,
                request_class=request.request_class,
                num_tokens=len(request.prompt) + len(owned.output),
                max_tokens=request.params.max_tokens,
                arrival=request.arrival,
                avoid=avoid,
                prefix=b""
                if config.salt is None
                else prompt_keys(request.prompt, config.block_size, config.salt),
            )
        )

    def _ask(self, request: PlaceRequest) -> None:
        """Ask, and ask again now and then, as ``cluster.gateway.dispatching`` does."""
        self._asked[request.request_id] = request
        self._dispatcher.place(request)

        def again() -> None:
            if self._asked.get(request.request_id) is request:
                self._ask(request)

        self._clock.call_later(ASK_AGAIN, again)

    def _tell(self, peer: Peer, call: Callable[..., None], *arguments: Any) -> None:
        enter = functools.partial(self._instances[peer].enter, functools.partial(call, *arguments))
        self._clock.call_later(self._network.message, enter)
