"""What the shells of a migration need of the instance they run in."""

from __future__ import annotations

from typing import Protocol

from instance.clock import Clock
from instance.engine import Engine
from instance.reporting import LoadReports
from instance.request import Sequence
from protos import generate_pb2 as pb


class MigrationHost(Protocol):
    """The instance, as its migrations see it."""

    instance_id: str
    incarnation: str
    engine: Engine
    reports: LoadReports

    @property
    def clock(self) -> Clock:
        """Monotonic time."""

    def home_reachable(self, gateway_id: str) -> bool:
        """A live stream to this gateway exists."""

    def send_home(self, gateway_id: str, message: pb.ToGateway) -> None:
        """Queue a message for a gateway; dropped if its stream is down."""

    def resend(self, sequence: Sequence, index: int, message: str = "") -> None:
        """Send the sequence's output from ``index`` on, and its end if it has ended."""

    def note_epoch(self, request_id: str, epoch: int) -> None:
        """Remember an epoch as seen here."""

    def offer_epoch(self, request_id: str, epoch: int) -> bool:
        """False if a newer epoch than this was seen here."""
