"""How fast KV moves between machines, learned from the migrations that ended."""

from __future__ import annotations

from instance.executor import ModelDescription
from instance.load import InstanceInfo, MigrationReport

DEFAULT_RATE = 256 * 2**20
"""Bytes per second assumed between machines of which nothing is known."""
_SHARE = 0.3
"""Weight of the newest observation."""
_LEAST_BYTES = 1 << 16
"""Transfers of less than this say more about latency than about the link."""
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def block_bytes(model: ModelDescription) -> int:
    """Bytes of one KV block, over all layers."""
    item = _ITEM_BYTES.get(model.dtype, 2)
    return model.num_layers * 2 * model.block_size * model.num_kv_heads * model.head_dim * item


class LinkRates:
    """Bytes per second by pair of machines, as an exponential average over transfers."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str], float] = {}

    def note(
        self, source: InstanceInfo, destination: InstanceInfo, report: MigrationReport
    ) -> None:
        """A migration between two instances ended."""
        if report.bytes_copied < _LEAST_BYTES or report.duration <= 0:
            return
        seen = report.bytes_copied / report.duration
        pair = source.node, destination.node
        self._rates[pair] = self.rate(source, destination) * (1 - _SHARE) + seen * _SHARE

    def rate(self, source: InstanceInfo, destination: InstanceInfo) -> float:
        """Bytes per second from one instance's machine to another's."""
        return self._rates.get((source.node, destination.node), DEFAULT_RATE)

    def seconds(self, source: InstanceInfo, destination: InstanceInfo, blocks: int) -> float:
        """Seconds in which so many KV blocks get from one instance to the other."""
        return blocks * block_bytes(source.model) / self.rate(source, destination)
