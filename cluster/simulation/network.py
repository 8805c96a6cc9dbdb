"""Modelled ways between processes: fixed delays for messages, bandwidth for KV."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cluster.simulation.profile import LinkCost


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Delays in seconds.

    Attributes:
        gateway: From a request's arrival until its gateway asks for a place: validation,
            chat template, tokenization.
        actor: One way between a gateway or an instance and the dispatcher.
        message: One way between a gateway and an instance; between two instances it is the
            link's latency.
        detection: From an instance's death until those connected to it know.
        contention: More at the gateway where another request waits for its first token.
    """

    gateway: float = 0.002
    actor: float = 0.001
    message: float = 0.0005
    detection: float = 0.1
    contention: float = 0.0

    def with_overhead(self, seconds: float, contention: float = 0.0) -> NetworkConfig:
        """The same, with a gateway by which a request takes so long beside its steps; 0: as is.

        Args:
            seconds: While it is alone.
            contention: More where others wait for their first token.
        """
        ways = 2 * self.actor + self.message
        gateway = max(0.0, seconds - ways) if seconds else self.gateway
        return dataclasses.replace(self, gateway=gateway, contention=contention)


class KvLink:
    """The way out of an instance for KV and what belongs to it.

    Stages that go on beside decoding are spaced out to the instance's bandwidth share, one
    after the other, as in ``instance.migration.transports``; a tail goes at full speed.

    Args:
        cost: What the way costs.
        share: Bytes per second for stages beside decoding; 0 is unlimited.
    """

    def __init__(self, cost: LinkCost, share: float) -> None:
        self.latency = cost.latency
        self._cost = cost
        self._share = share
        self._paced_at = 0.0
        self._free_at = 0.0

    def send(self, num_bytes: int, copies: int, paced: bool, now: float) -> float:
        """When the last byte leaves, if all are ready at ``now``."""
        seconds = self._cost.seconds(num_bytes, copies) - self.latency
        if paced and self._share:
            begins = max(now, self._paced_at)
            self._paced_at = begins + num_bytes / self._share
            return max(begins + seconds, self._paced_at)
        self._free_at = max(now, self._free_at) + seconds
        return self._free_at
