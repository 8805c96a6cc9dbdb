"""Which requests wait, anywhere in the cluster, and when they begin and cease to.

A request waits from its arrival until an instance reports that it runs: held here, on its
way, queued there, or swapped out. Being placed or moved changes nothing about that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.dispatcher.fairness import FairnessLedger
from instance.load import SequenceLoad
from instance.request import Account

_NOWHERE = ""


@dataclass(slots=True)
class _Waiting:
    """A request that waits.

    Attributes:
        instance_id: Where; "" while it is held here, or is lost and will be replayed.
        confirmed: That instance has reported it.
        since: When it was held, sent, reported or lost last.
        held: It is held here.
    """

    account: Account
    epoch: int
    instance_id: str
    confirmed: bool
    since: float
    held: bool = False


class WaitingRequests:
    """Keeps the ledger's waiting sets by what gateways ask and instances report.

    Args:
        ledger: Told of every beginning and end.
    """

    def __init__(self, ledger: FairnessLedger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, _Waiting] = {}
        self._at: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request waits, anywhere."""
        return request_id in self._waiting

    def held(self, request_id: str, epoch: int, account: Account, now: float) -> None:
        """A request came and is held here."""
        self._set(request_id, _Waiting(account, epoch, _NOWHERE, False, now, held=True), now)

    def placed(
        self, request_id: str, epoch: int, account: Account, instance_id: str, now: float
    ) -> None:
        """A request was sent to an instance."""
        self._set(request_id, _Waiting(account, epoch, instance_id, False, now), now)

    def reported(
        self,
        instance_id: str,
        sequences: Iterable[SequenceLoad],
        moving: Callable[[str], bool],
        over: Callable[[SequenceLoad], bool],
        now: float,
    ) -> None:
        """An instance said what it holds.

        Args:
            moving: Whether a request is on its way between instances.
            over: Whether a sequence has ended or is void.
        """
        missing = set(self._at.get(instance_id, ()))
        for sequence in sequences:
            request_id = sequence.request_id
            missing.discard(request_id)
            known = self._waiting.get(request_id)
            if known is None and not sequence.waits:
                continue
            if known is not None and known.epoch > sequence.epoch:
                continue
            if sequence.migrating or moving(request_id) or over(sequence):
                continue
            if sequence.waits:
                account = sequence.tenant, sequence.request_class
                self._set(
                    request_id, _Waiting(account, sequence.epoch, instance_id, True, now), now
                )
            else:
                self.ended(request_id, sequence.epoch, now)
        for request_id in missing:
            if self._waiting[request_id].confirmed and not moving(request_id):
                self.ended(request_id, self._waiting[request_id].epoch, now)

    def ended(self, request_id: str, epoch: int, now: float) -> None:
        """A request runs, or has ended, under this epoch or a newer one than is known."""
        known = self._waiting.get(request_id)
        if known is None or known.epoch > epoch:
            return
        del self._waiting[request_id]
        self._leave(request_id, known)
        self._ledger.end_waiting(known.account, request_id, now)

    def lost(self, instance_id: str, now: float) -> None:
        """An instance is gone; gateways ask for its requests anew."""
        for request_id in self._at.pop(instance_id, ()):
            known = self._waiting[request_id]
            known.instance_id, known.confirmed, known.since = _NOWHERE, False, now

    def expire(self, oldest: float, now: float) -> None:
        """End what was sent or lost before ``oldest`` and was not heard of since."""
        for request_id, known in list(self._waiting.items()):
            if not known.held and not known.confirmed and known.since < oldest:
                self.ended(request_id, known.epoch, now)

    # ----

    def _set(self, request_id: str, new: _Waiting, now: float) -> None:
        known = self._waiting.get(request_id)
        if known is not None:
            self._leave(request_id, known)
            if known.account != new.account:
                self._ledger.end_waiting(known.account, request_id, now)
        self._waiting[request_id] = new
        if new.instance_id:
            self._at.setdefault(new.instance_id, set()).add(request_id)
        self._ledger.begin_waiting(new.account, request_id, now)

    def _leave(self, request_id: str, known: _Waiting) -> None:
        there = self._at.get(known.instance_id)
        if there is not None:
            there.discard(request_id)
            if not there:
                del self._at[known.instance_id]
