"""What the dispatcher's core is told, and what it wants done."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.dispatcher.messages import Placement, PlaceRequest, Refusal
from instance.leases import LedgerUpdate
from instance.load import InstanceInfo, LoadReport, MigrationReport, Role
from instance.request import Account

# ---- events


@dataclass(frozen=True, slots=True)
class Joined:
    """An instance started, or came back to a dispatcher that did not know it."""

    info: InstanceInfo


@dataclass(frozen=True, slots=True)
class Reported:
    """An instance said how it is."""

    report: LoadReport


@dataclass(frozen=True, slots=True)
class Left:
    """An instance stopped; its requests are replayed by their homes."""

    instance_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class PlaceRequested:
    """A gateway asks where a request shall run; may be repeated."""

    request: PlaceRequest


@dataclass(frozen=True, slots=True)
class Finished:
    """A request ended at its home; this epoch and all older ones are over."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class MigrationRequested:
    """An operator wants a request moved; ``destination`` None leaves the choice open."""

    request_id: str
    destination: str | None = None


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """A migration that was started has ended, well or not."""

    report: MigrationReport


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator wants an instance emptied."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    """An operator wants a draining instance to take requests again."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class RoleRequested:
    """An operator wants an instance to be for something else."""

    instance_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class LedgerCopied:
    """An instance returned its copy of the ledger, as FetchLedger asks."""

    instance_id: str
    incarnation: str
    copy: LedgerUpdate


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway lost its stream to an instance, and tells what service it got from it.

    Attributes:
        charged: By account, since the incarnation started.
    """

    gateway_id: str
    instance_id: str
    incarnation: str
    charged: tuple[tuple[Account, float], ...]


@dataclass(frozen=True, slots=True)
class ScalingEnded:
    """An order of ``Dispatcher.scaler`` was carried out, or could not be.

    Attributes:
        outcome: "started", "stopped", or why not.
    """

    instance_id: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Joined
    | Reported
    | Left
    | PlaceRequested
    | Finished
    | MigrationRequested
    | MigrationEnded
    | DrainRequested
    | ResumeRequested
    | RoleRequested
    | ScalingEnded
    | LedgerCopied
    | Served
    | Tick
)

# ---- actions


@dataclass(frozen=True, slots=True)
class Place:
    """Answer a gateway."""

    placement: Placement
    gateway_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a gateway that the request cannot run now."""

    refusal: Refusal
    gateway_id: str


@dataclass(frozen=True, slots=True)
class StartMigration:
    """Tell ``source`` to move a request to ``destination``; answer with MigrationEnded."""

    request_id: str
    source: str
    destination: InstanceInfo
    reason: str


@dataclass(frozen=True, slots=True)
class RejectMigration:
    """Answer an operator that a request cannot be moved.

    Attributes:
        code: "unknown_request", "unknown_instance" or "conflict".
    """

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class SetDraining:
    """Tell an instance whether it is draining, so that its reports say so."""

    instance_id: str
    on: bool


@dataclass(frozen=True, slots=True)
class SetRole:
    """Tell an instance what it is for, so that its reports say so."""

    instance_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class AskPrefixes:
    """Ask an instance to report all that its prefix cache holds."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class SendLedger:
    """Send an incarnation of an instance what is new in the ledger."""

    instance_id: str
    incarnation: str
    update: LedgerUpdate


@dataclass(frozen=True, slots=True)
class FetchLedger:
    """Ask an instance for its copy of the ledger; answer with LedgerCopied."""

    instance_id: str


Action = (
    Place
    | Refuse
    | StartMigration
    | RejectMigration
    | SetDraining
    | SetRole
    | AskPrefixes
    | SendLedger
    | FetchLedger
)
