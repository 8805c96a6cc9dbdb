"""What service a gateway's requests got from each instance.

When an instance dies, the gateways know what it did and can no longer report: the ledger of
tenants' service is made whole from their sums.
"""

from __future__ import annotations

from cluster.gateway.home_actions import Peer
from instance.fairness import service
from instance.request import Account


class ServedService:
    """Sums of service by instance and account, as far as tokens tell of it.

    A prompt counts for whoever sent the first token, each output token for its sender.
    """

    def __init__(self) -> None:
        self._sums: dict[Peer, dict[Account, float]] = {}

    def note(self, peer: Peer, account: Account, prompt: int, output: int) -> None:
        """New output tokens came, and with the first of them the prompt's worth."""
        sums = self._sums.setdefault(peer, {})
        sums[account] = sums.get(account, 0.0) + service(prompt, output)

    def of(self, peer: Peer) -> list[tuple[Account, float]]:
        """The sums of one incarnation of an instance."""
        return list(self._sums.get(peer, {}).items())

    def forget(self, peer: Peer) -> None:
        """That incarnation will not be heard of again."""
        self._sums.pop(peer, None)
