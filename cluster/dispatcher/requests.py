"""The way of requests through the dispatcher: asked for, held, placed, ended.

Late binding: an instance is given what it has room for (``binding.py``), and the rest waits
here, so that the order of tenants is decided as late as it can be.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from cluster.dispatcher.binding import Binding
from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.events import Action, Place, Refuse
from cluster.dispatcher.fairness import FairnessLedger, Source
from cluster.dispatcher.load import blocks_for
from cluster.dispatcher.members import Members
from cluster.dispatcher.messages import Placement, PlaceRequest, Refusal
from cluster.dispatcher.queues import Held, RequestQueues
from cluster.dispatcher.tenants import TenantPolicy
from cluster.dispatcher.views import InstanceState, LoadView
from cluster.dispatcher.waiting import WaitingRequests
from instance.load import LoadReport, SequenceLoad

Choose = Callable[[PlaceRequest, Candidates], LoadView]

_LOOK_BEHIND = 32
"""Requests of a queue that are looked at behind the first that must wait, it included; and of
all queues, those who are looked at for room that can be made."""


@dataclass(frozen=True, slots=True)
class RequestConfig:
    """How requests are held, refused and remembered.

    Attributes:
        run_ahead: Requests that may wait at an instance; None sends every request on at once.
        instances_per_wait: Of so many instances one has a request sent to it that waits for
            memory; one of all in smaller clusters.
        max_queued: Requests of a class, and of the higher ones, that wait here at most; more
            are refused.
        hold_timeout: Seconds that a new request waits for an instance to be ready at all.
        replay_hold_timeout: The same for a replay, whose client already has tokens.
        home_timeout: Seconds after which a gateway that asks no more has given a request up.
        memory: Requests remembered, to answer repeated calls as before.
        tenants: What tenants may have, by name.
        default_tenant: The same for those not named.
    """

    run_ahead: int | None = 1
    instances_per_wait: int = 16
    max_queued: int = 4096
    hold_timeout: float = 5.0
    replay_hold_timeout: float = 20.0
    home_timeout: float = 10.0
    memory: int = 65536
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)
    default_tenant: TenantPolicy = field(default_factory=TenantPolicy)


@dataclass(slots=True)
class _Known:
    """The newest thing known of a request: where it was placed, or that it ended."""

    epoch: int
    placement: Placement | None


class Requests:
    """Answers gateways, and keeps those waiting for whom no instance has room.

    Args:
        config: Limits.
        members: Instances and loads; placements are charged there.
        ledger: Orders tenants, and is told who waits.
        choose: The placement policy.
        count: Counts an event of a kind under a reason.

    Attributes:
        late_binding: Requests wait here; else each is sent on at once.
    """

    def __init__(
        self,
        config: RequestConfig,
        members: Members,
        ledger: FairnessLedger,
        choose: Choose,
        count: Callable[[str, str, int], None],
    ) -> None:
        self.config = config
        self.late_binding = True
        self.queues = RequestQueues()
        self.waiting = WaitingRequests(ledger)
        self._members = members
        self._ledger = ledger
        self._choose = choose
        self._count = count
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unplaceable: dict[str, float] = {}
        self._sent_ahead: set[str] = set()
        self._turn = 0

    # ---- what gateways say

    def asked(self, request: PlaceRequest, now: float) -> list[Action]:
        """A gateway asks where a request shall run; no answer means that it is held.

        Asking again, under the same epoch, has the same answer, or keeps a held one alive.
        """
        known = self._known.get(request.request_id)
        if known is not None and known.epoch > request.epoch:
            return [self._refuse(request, 404, "a newer epoch of this request is known")]
        if known is not None and known.epoch == request.epoch:
            placement = known.placement
            if placement is None:
                return [self._refuse(request, 404, "this request has ended")]
            if placement.instance_id not in request.avoid and self._stands(placement, now):
                self._count("placements", "repeated", 1)
                return [Place(placement, request.gateway_id)]
        held = self.queues.get(request.request_id)
        if held is not None and held.request.epoch > request.epoch:
            return [self._refuse(request, 404, "a newer epoch of this request is known")]
        if held is not None and held.request.epoch == request.epoch:
            held.heard = now
            held.deadline = min(held.deadline, now + request.time_left)
            return []
        actions: list[Action] = []
        if held is not None:
            self._drop(held)
            actions.append(
                self._refuse(held.request, 404, "a newer epoch of this request is known")
            )
        return actions + self._admit(request, now)

    def finished(self, request_id: str, epoch: int, now: float) -> list[Action]:
        """A request ended at its home; this epoch and all older ones are over."""
        actions: list[Action] = []
        held = self.queues.get(request_id)
        if held is not None and held.request.epoch <= epoch:
            self._drop(held)
            actions.append(self._refuse(held.request, 404, "this request has ended"))
        known = self._known.get(request_id)
        if known is None or known.epoch <= epoch:
            self._remember(request_id, _Known(epoch, None))
        self._members.finished(request_id, epoch)
        self.waiting.ended(request_id, epoch, now)
        return actions

    def _admit(self, request: PlaceRequest, now: float) -> list[Action]:
        """Place a request now, or hold it, or refuse it."""
        request_id, account = request.request_id, request.account
        policy = self._ledger.policy(request.tenant)
        if request.request_class not in policy.classes:
            name = request.request_class.name.lower()
            reason = f"tenant {request.tenant!r} may not use the class {name!r}"
            return [self._refuse(request, 403, reason, "class_not_allowed")]
        if request.time_left <= 0.0:
            return [self._refuse(request, 408, "its deadline has passed", "deadline_exceeded")]
        held = Held(request, now, now, now + request.time_left)
        self._sent_ahead.discard(request_id)  # what was sent ahead was an older epoch
        self.queues.add(held)
        self.waiting.held(request_id, request.epoch, account, now)
        actions = self._serve(self.queues.queue_of(held), self._binding(now), now)
        if self.queues.get(request_id) is not held:
            return actions
        refusal = None if request.epoch > 1 else self._over_limit(request, policy, now)
        if refusal is not None:
            self._drop(held)
            self.waiting.ended(request_id, request.epoch, now)
            self._count("refusals", str(refusal.status), 1)
            return [*actions, Refuse(refusal, request.gateway_id)]
        self._count("placements", "held", 1)
        if self._members.candidates(request, now, now) is None:
            self._unplaceable[request_id] = now
        return actions

    def _over_limit(
        self, request: PlaceRequest, policy: TenantPolicy, now: float
    ) -> Refusal | None:
        """Why a request may not wait here, which it is counted in already."""
        most, own = policy.max_queued, self.queues.of_tenant(request.tenant)
        if most is not None and own > most:
            status, code = 429, "tenant_queue_full"
            reason = f"tenant {request.tenant!r} has {own - 1} requests waiting, its limit"
            retry_after = self.queues.tenant_wait(request.tenant, now)
        elif self.queues.up_to_class(request.request_class) > self.config.max_queued:
            status, code = 503, "overloaded"
            reason = "too many requests wait for an instance"
            retry_after = self.queues.wait(now)
        else:
            return None
        return Refusal(request.request_id, request.epoch, status, reason, retry_after, code)

    # ---- binding

    def release(self, now: float) -> list[Action]:
        """Place held requests for which there is room now, in order."""
        actions: list[Action] = []
        if self.queues:
            binding = self._binding(now)
            for queue in self.queues.in_order(self._ledger.counter):
                actions.extend(self._serve(queue, binding, now))
        return actions

    @property
    def reservations(self) -> int | None:
        """Instances at which a request is sent to wait for memory; None for all."""
        if self._run_ahead is None:
            return None
        return max(1, len(self._members.loads) // self.config.instances_per_wait)

    @property
    def _run_ahead(self) -> int | None:
        return self.config.run_ahead if self.late_binding else None

    def in_front(self) -> Iterator[Held]:
        """The first of those held, in the order in which they are served."""
        queues = self.queues.in_order(self._ledger.counter)
        return itertools.islice(itertools.chain.from_iterable(queues), _LOOK_BEHIND)

    def _binding(self, now: float) -> Binding:
        if self._sent_ahead:
            # Whoever has begun to run does not wait; if it is preempted, others went before it.
            self._sent_ahead = {one for one in self._sent_ahead if one in self.waiting}
        run_ahead = self._run_ahead
        return Binding(
            self._members.table,
            run_ahead,
            (self.reservations or 0) * (run_ahead or 0) - len(self._sent_ahead),
            self._ledger.counter,
            lambda info: self._ledger.theta(Source(info.instance_id, info.incarnation)),
            now,
        )

    def _serve(self, queue: list[Held], binding: Binding, now: float) -> list[Action]:
        """Place from a queue, in order, as far as there is room.

        Behind one for which there is none, those that run at once elsewhere pass.
        """
        actions: list[Action] = []
        left, waits = _LOOK_BEHIND, False
        for held in list(queue):
            if not left:
                break
            request = held.request
            account, tokens = request.account, request.num_tokens
            found, ahead = None, False
            if binding.may_run(tokens) if waits else not binding.hopeless(account, tokens):
                candidates = self._members.candidates(request, now, held.since)
                if candidates is None:
                    continue  # it avoids the instances there are
                found = binding.to_run(candidates, account, tokens)
                if found is None and not waits:
                    found = binding.to_wait(candidates, account, tokens)
                    ahead = found is not None
                    if found is None:
                        found = binding.to_preempt(candidates, account, tokens)
            if found is None:
                waits = True
                left -= 1
                continue
            self._drop(held)
            view = self._choose(request, found)
            missing = found.missing_on(view.instance_id, tokens)
            actions.append(self._assign(request, view, missing, now))
            binding.placed(ahead)
            if ahead:
                self._sent_ahead.add(request.request_id)
        return actions

    def _assign(self, request: PlaceRequest, view: LoadView, missing: int, now: float) -> Place:
        load = self._members.loads[view.instance_id]
        placement = Placement(
            request.request_id, request.epoch, view.instance_id, load.info.incarnation
        )
        self._members.release(request.request_id, request.epoch)
        load.charge(
            SequenceLoad(
                request_id=request.request_id,
                epoch=request.epoch,
                tenant=request.tenant,
                request_class=request.request_class,
                home=request.gateway_id,
                running=False,
                blocks=blocks_for(request.num_tokens + 1, load.info.model.block_size),
                num_tokens=request.num_tokens,
                uncomputed=missing,
            ),
            now,
        )
        self._turn += 1
        self._members.placed(view.instance_id, self._turn)
        self._remember(request.request_id, _Known(request.epoch, placement))
        self.waiting.placed(
            request.request_id, request.epoch, request.account, view.instance_id, now
        )
        self.queues.served(request.tenant, now)
        self._count("placements", "new" if request.epoch <= 1 else "replayed", 1)
        return Place(placement, request.gateway_id)

    def _refuse(self, request: PlaceRequest, status: int, reason: str, code: str = "") -> Refuse:
        self._count("refusals", str(status), 1)
        refusal = Refusal(request.request_id, request.epoch, status, reason, code=code)
        return Refuse(refusal, request.gateway_id)

    def _drop(self, held: Held) -> None:
        self.queues.remove(held)
        self._unplaceable.pop(held.request.request_id, None)

    # ---- what instances say, and time

    def reported(self, report: LoadReport, now: float) -> None:
        """An instance's report was accepted."""
        transfers = self._members.transfers
        self.waiting.reported(
            report.instance_id, report.sequences, transfers.__contains__, self.is_over, now
        )

    def expire(self, now: float, charge_lifetime: float) -> list[Action]:
        """Give up held requests that nobody waits for or that no instance can take."""
        actions: list[Action] = []
        usable = self._members.table.any_usable(now)
        for held in self.queues:
            request = held.request
            refusal: Refuse | None = None
            if now >= held.deadline:
                refusal = self._refuse(request, 408, "its deadline passed", "deadline_exceeded")
            elif now - held.heard > self.config.home_timeout:
                self._count("refusals", "abandoned", 1)
            elif self._no_instance(held, usable, now):
                refusal = self._refuse(request, 503, "no instance is ready", "no_instance")
            else:
                continue
            self._drop(held)
            self.waiting.ended(request.request_id, request.epoch, now)
            if refusal is not None:
                actions.append(refusal)
        self.waiting.expire(now - charge_lifetime, now)
        self.queues.forget_rates(now)
        return actions

    def _no_instance(self, held: Held, usable: bool, now: float) -> bool:
        """Whether for too long there was none that could take the request, room or not."""
        request = held.request
        if usable and (
            not request.avoid or self._members.candidates(request, now, held.since) is not None
        ):
            self._unplaceable.pop(request.request_id, None)
            return False
        since = self._unplaceable.setdefault(request.request_id, now)
        replay = request.epoch > 1
        patience = self.config.replay_hold_timeout if replay else self.config.hold_timeout
        return now - since >= patience

    # ---- what is known

    def is_over(self, sequence: SequenceLoad) -> bool:
        """Whether a sequence has ended, or is void because of a newer epoch."""
        known = self._known.get(sequence.request_id)
        if known is None:
            return False
        return known.epoch > sequence.epoch or (
            known.epoch == sequence.epoch and known.placement is None
        )

    def _stands(self, placement: Placement, now: float) -> bool:
        """Whether an earlier answer may be given again."""
        name = placement.instance_id
        return (
            self._members.knows(name, placement.incarnation)
            and self._members.state(name, now) is not InstanceState.GONE
        )

    def _remember(self, request_id: str, known: _Known) -> None:
        self._known[request_id] = known
        self._known.move_to_end(request_id)
        while len(self._known) > self.config.memory:
            self._known.popitem(last=False)
