"""Migration messages to and from their wire format."""

from __future__ import annotations

from instance.migration import messages as m
from instance.wire import logprobs_from_wire, logprobs_to_wire
from protos import generate_pb2 as gen
from protos import migration_pb2 as pb


def control_to_source(message: object) -> pb.ToSource:
    """A destination's message; raises TypeError for anything else."""
    match message:
        case m.Accept(attempt, cached_blocks):
            return pb.ToSource(accept=pb.Accept(attempt=attempt, cached_blocks=cached_blocks))
        case m.Refuse(attempt, reason):
            return pb.ToSource(refuse=pb.Refuse(attempt=attempt, reason=reason))
        case m.Extended(attempt, num_blocks):
            return pb.ToSource(extended=pb.Extended(attempt=attempt, num_blocks=num_blocks))
        case m.Released(attempt):
            return pb.ToSource(released=pb.Released(attempt=attempt))
        case m.CancelMigration(attempt, reason):
            return pb.ToSource(cancel=pb.CancelMigration(attempt=attempt, reason=reason))
    raise TypeError(f"{type(message).__name__} is not for a source")


def control_from_destination(
    message: pb.ToSource,
) -> m.Accept | m.Refuse | m.Extended | m.Released | m.CancelMigration | None:
    """What a destination said; None for a greeting."""
    match message.WhichOneof("message"):
        case "accept":
            return m.Accept(message.accept.attempt, message.accept.cached_blocks)
        case "refuse":
            return m.Refuse(message.refuse.attempt, message.refuse.reason)
        case "extended":
            return m.Extended(message.extended.attempt, message.extended.num_blocks)
        case "released":
            return m.Released(message.released.attempt)
        case "cancel":
            return m.CancelMigration(message.cancel.attempt, message.cancel.reason)
    return None


def handover_from_wire(wire: pb.Handover) -> m.Handover:
    """The state machine's part of a handover."""
    return m.Handover(
        attempt=wire.attempt,
        request_id=wire.request_id,
        epoch=wire.epoch,
        num_blocks=wire.num_blocks,
        num_computed=wire.num_computed,
        num_stages=wire.num_stages,
        output=tuple(wire.output),
        acked=wire.acked,
        logprobs=logprobs_from_wire(wire.logprobs),
    )


def claim_to_wire(claim: m.Claim) -> gen.ToGateway:
    """A claim for the home."""
    return gen.ToGateway(
        claim=gen.Claim(
            request_id=claim.request_id,
            epoch=claim.epoch,
            attempt=claim.attempt,
            index=claim.index,
            tokens=claim.tokens,
            logprobs=logprobs_to_wire(claim.logprobs),
        )
    )


def claim_reply_from_wire(wire: gen.ClaimReply) -> m.ClaimReply:
    return m.ClaimReply(
        wire.request_id,
        wire.epoch,
        wire.attempt,
        m.ClaimOutcome(wire.outcome),
        wire.new_epoch,
        wire.next_index,
    )
