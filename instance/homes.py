"""The instance's side of its streams to gateways: frames, acknowledgements, holdings."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterable

from instance.request import FinishReason, Sequence, TokenLogprobs
from instance.wire import enum_value, logprobs_to_wire
from protos import generate_pb2 as pb


def tokens_message(
    sequence: Sequence,
    index: int,
    tokens: Iterable[int],
    finish_reason: FinishReason,
    message: str = "",
    logprobs: Iterable[TokenLogprobs] = (),
) -> pb.Tokens:
    """Output tokens of a sequence from output index ``index`` on."""
    return pb.Tokens(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        index=index,
        tokens=tokens,
        finish_reason=enum_value(finish_reason),
        message=message,
        cached_tokens=max(0, sequence.num_cached),
        logprobs=logprobs_to_wire(logprobs),
    )


class HomeLink:
    """What this instance has to say to one gateway, whether or not its stream is up.

    Frames that were queued when the stream broke are dropped: the home learns from the
    holdings what it lacks and asks for it. Ended sequences stay until the home has
    acknowledged their last token, so that it can.

    Attributes:
        gateway_id: The home.
        connected: Its stream is up.
        lost_at: Monotonic time at which the stream broke; None while it is up.
        submits: Submits read from the present stream.
        ended: Ended sequences whose end the home has not acknowledged, by request id.
    """

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.lost_at: float | None = None
        self.connected = False
        self.generation = 0
        self.submits = 0
        self.ended: dict[str, Sequence] = {}
        self._frame: pb.Frame | None = None
        self._number = 0
        self._outbox: list[pb.ToGateway] = []
        self._ready = asyncio.Event()
        # By frame: sequence, and first and last output index of what it carried.
        self._unacked: collections.deque[tuple[int, list[tuple[Sequence, int, int]]]] = (
            collections.deque()
        )

    def open(self) -> int:
        """A new stream replaces any older one; returns its generation."""
        self.generation += 1
        self.connected = True
        self.lost_at = None
        self.submits = 0
        self._frame = None
        self._outbox.clear()
        self._unacked.clear()
        self._ready.set()
        return self.generation

    def close(self, generation: int, now: float) -> bool:
        """The stream of this generation ended; true if it was the present one."""
        if generation != self.generation or not self.connected:
            return False
        self.connected = False
        self.lost_at = now
        self._ready.set()
        return True

    def send(self, message: pb.ToGateway) -> None:
        """Queue a message behind the tokens queued before it."""
        if not self.connected:
            return
        self._frame = None
        self._outbox.append(message)
        self._ready.set()

    def send_tokens(self, sequence: Sequence, tokens: pb.Tokens) -> None:
        """Queue tokens; those not written yet share one frame."""
        if sequence.finish_reason:
            self.ended[sequence.request_id] = sequence
        if not self.connected:
            return
        if self._frame is None:
            self._number += 1
            envelope = pb.ToGateway(frame=pb.Frame(number=self._number))
            self._frame = envelope.frame
            self._outbox.append(envelope)
            self._unacked.append((self._number, []))
            self._ready.set()
        self._frame.tokens.append(tokens)
        end = tokens.index + len(tokens.tokens)
        self._unacked[-1][1].append((sequence, tokens.index, end))

    def acknowledge(self, frame: int) -> None:
        """The home has every frame up to this one."""
        while self._unacked and self._unacked[0][0] <= frame:
            for sequence, start, end in self._unacked.popleft()[1]:
                # What a broken stream lost lies before: the home has not got past it.
                if start <= sequence.acked:
                    sequence.acknowledge(end)
                if sequence.finish_reason and sequence.acked >= sequence.num_output:
                    self.ended.pop(sequence.request_id, None)

    async def next_messages(self, generation: int) -> list[pb.ToGateway] | None:
        """What to write next; None when this stream is no longer the present one."""
        while True:
            if generation != self.generation or not self.connected:
                return None
            if self._outbox:
                messages, self._outbox = self._outbox, []
                self._frame = None
                return messages
            self._ready.clear()
            await self._ready.wait()
