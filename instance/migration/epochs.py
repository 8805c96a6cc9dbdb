"""What an instance remembers of epochs it has seen, so that old submits start nothing."""

from __future__ import annotations

import enum


class SubmitDecision(enum.Enum):
    """What to do with a submit.

    START: run it; a local sequence of an older epoch is cancelled first.
    IGNORE: it runs here already under this epoch.
    LOST: answer ``Lost(epoch)``; the home decides what is to be done.
    """

    START = "start"
    IGNORE = "ignore"
    LOST = "lost"


class EpochRegistry:
    """The highest epoch seen per request, kept as a tombstone after the request has left.

    A tombstone is dropped ``keep`` seconds after the last ``note``: a submit older than that
    may start a sequence again, which its home then cancels as stale.

    Args:
        keep: Seconds; at least the grace period of homes.
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        # Ordered by the time of the last note.
        self._seen: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def highest(self, request_id: str) -> int:
        """The highest epoch seen; 0 if none is remembered."""
        seen = self._seen.get(request_id)
        return 0 if seen is None else seen[0]

    def note(self, request_id: str, epoch: int, now: float) -> None:
        """Remember an epoch.

        Due when a sequence starts or gets a new epoch, again when it leaves (its tombstone
        may have expired while it ran), and for every cancel.
        """
        seen = self._seen.pop(request_id, None)
        self._seen[request_id] = (epoch if seen is None else max(epoch, seen[0]), now)

    def decide(
        self,
        request_id: str,
        epoch: int,
        live_epoch: int | None,
        same_incarnation: bool,
        now: float,
    ) -> SubmitDecision:
        """What to do with a submit; remembers its epoch.

        Args:
            live_epoch: Epoch under which the request is here: running, waiting, in
                handover, or coming in by a migration; None if it is not.
            same_incarnation: The submit names this incarnation of the instance.
        """
        highest = self.highest(request_id)
        self.note(request_id, epoch, now)
        if not same_incarnation:
            return SubmitDecision.LOST
        if live_epoch is not None and epoch == live_epoch:
            return SubmitDecision.IGNORE
        if epoch > max(highest, live_epoch or 0):
            return SubmitDecision.START
        return SubmitDecision.LOST

    def accepts_offer(self, request_id: str, epoch: int) -> bool:
        """False for the offer of a source that has been superseded to this instance's knowledge."""
        return epoch >= self.highest(request_id)

    def expire(self, now: float) -> None:
        """Drop tombstones whose time has passed."""
        limit = now - self._keep
        old = []
        for request_id, (_, noted) in self._seen.items():
            if noted > limit:
                break
            old.append(request_id)
        for request_id in old:
            del self._seen[request_id]
