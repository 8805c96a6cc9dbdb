"""Live migration as pure state machines.

| stage    | source                                       | destination                        |
|----------|----------------------------------------------|------------------------------------|
| reserve  | ``Offer``                                    | ``Accept`` or ``Refuse``           |
| copy k   | ``CopyBlocks`` while decoding, ``Extend``    | ``Extended``, writes               |
| announce | ``Announce``, leaves the batch               | expects the handover               |
| handover | the tail, ``Handover``                       | waits for every stage              |
| claim    | in doubt, its own ``Claim`` to the home      | ``Claim`` to the home, computes    |
| release  | frees its blocks                             | granted: ``Released``, emits       |

The home (``cluster/gateway/home.py``) grants exactly one claim per epoch, so whoever is
granted owns the request, whatever was lost, doubled, late or dead. Before the handover
any trouble leaves the request where it is, under its epoch; after it nobody resumes at
that epoch again.

Contract of the shells:

* ``CopyBlocks`` pins its blocks until the transfer has ended, also after ``Ended``.
* A destination's blocks are reserved at a step boundary; a copy's start is told to the
  machine before its first byte is written, and its end after the last one.
* ``FreeSequence``, ``Resume``, ``DropSequence`` and ``Activate`` mean the very sequence of
  the attempt, not what now has its request id.
* Holdings name a source's sequence in handover and a destination's claimed one, both with
  state "handover" and the old epoch.
* A handover of an attempt that the destination does not know is answered with
  ``CancelMigration``.
"""

from __future__ import annotations

from instance.migration.destination import DestinationMigration, DestinationState
from instance.migration.epochs import EpochRegistry, SubmitDecision
from instance.migration.messages import (
    Accept,
    Activate,
    Announce,
    Cancelled,
    CancelMigration,
    Claim,
    ClaimOutcome,
    ClaimReply,
    CopyBlocks,
    CopyDone,
    CopyEnded,
    CopyProgress,
    CopyStarted,
    DestinationAction,
    DestinationEvent,
    Detach,
    Detached,
    DetachFailed,
    DropSequence,
    Ended,
    ExpectHandover,
    Extend,
    Extended,
    FreeReservation,
    FreeSequence,
    Handover,
    HomeConnected,
    HomeGone,
    Offer,
    PeerLost,
    Preempted,
    Refuse,
    RejectCopy,
    Released,
    Reserve,
    ReserveResult,
    Resume,
    SequenceEnded,
    SourceAction,
    SourceEvent,
    StartCompute,
    Tick,
    ToHome,
    ToPeer,
)
from instance.migration.source import MOVED, SourceMigration, SourceState

__all__ = [
    "MOVED",
    "Accept",
    "Activate",
    "Announce",
    "CancelMigration",
    "Cancelled",
    "Claim",
    "ClaimOutcome",
    "ClaimReply",
    "CopyBlocks",
    "CopyDone",
    "CopyEnded",
    "CopyProgress",
    "CopyStarted",
    "DestinationAction",
    "DestinationEvent",
    "DestinationMigration",
    "DestinationState",
    "Detach",
    "DetachFailed",
    "Detached",
    "DropSequence",
    "Ended",
    "EpochRegistry",
    "ExpectHandover",
    "Extend",
    "Extended",
    "FreeReservation",
    "FreeSequence",
    "Handover",
    "HomeConnected",
    "HomeGone",
    "Offer",
    "PeerLost",
    "Preempted",
    "Refuse",
    "RejectCopy",
    "Released",
    "Reserve",
    "ReserveResult",
    "Resume",
    "SequenceEnded",
    "SourceAction",
    "SourceEvent",
    "SourceMigration",
    "SourceState",
    "StartCompute",
    "SubmitDecision",
    "Tick",
    "ToHome",
    "ToPeer",
]
