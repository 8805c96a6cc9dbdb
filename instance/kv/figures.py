"""What swapping has done so far, counted."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

RUN_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper bounds of the buckets of run lengths, in blocks; the last bucket has none."""
LOST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of time lost, in seconds; the last bucket has none."""


def _buckets(bounds: tuple[float, ...]) -> list[int]:
    return [0] * (len(bounds) + 1)


@dataclass(slots=True)
class SwapFigures:
    """Counts since the start of the instance, but for the last two.

    Attributes:
        out: Sequences whose KV began to leave.
        back: Sequences whose KV began to return; of their own or of an equal prefix.
        saved_blocks: Blocks copied before anybody had to wait for it: of the next victim, and
            of finished sequences.
        failed: Copies that went wrong.
        blocks_out: Blocks copied to the host.
        blocks_in: Blocks copied back.
        bytes_out: The same in bytes.
        bytes_in: The same in bytes.
        runs_out: Contiguous pieces they were copied in.
        runs_in: Contiguous pieces they were copied in.
        run_lengths: Pieces by length, in the buckets of ``RUN_BOUNDS``.
        seconds_out: Time that copies took, without the wait for their turn.
        seconds_in: The same.
        kept_blocks: Blocks of sequences that left which had a valid copy already.
        hit_blocks: Blocks that came back from copies other sequences or turns had left.
        dropped_blocks: Copies of running sequences given up for lack of room.
        stalls: Steps held back, or not possible, until a copy ended.
        stall_seconds: Time they were late.
        decisions: By what was chosen and why.
        lost: Returned sequences by time from preemption to the next step with them, in the
            buckets of ``LOST_BOUNDS``.
        lost_seconds: The sum of these times.
        host_blocks: Blocks of the host pool.
        host_used: Of them, those that hold a copy.
    """

    out: int = 0
    back: int = 0
    saved_blocks: int = 0
    failed: int = 0
    blocks_out: int = 0
    blocks_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    runs_out: int = 0
    runs_in: int = 0
    run_lengths: list[int] = field(default_factory=lambda: _buckets(RUN_BOUNDS))
    seconds_out: float = 0.0
    seconds_in: float = 0.0
    kept_blocks: int = 0
    hit_blocks: int = 0
    dropped_blocks: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=lambda: _buckets(LOST_BOUNDS))
    lost_seconds: float = 0.0
    host_blocks: int = 0
    host_used: int = 0

    def issued(self, outward: bool, lengths: list[int], block_bytes: int) -> None:
        """A copy of pieces of these lengths was issued."""
        blocks = sum(lengths)
        for length in lengths:
            self.run_lengths[bisect_left(RUN_BOUNDS, length)] += 1
        if outward:
            self.blocks_out += blocks
            self.bytes_out += blocks * block_bytes
            self.runs_out += len(lengths)
        else:
            self.blocks_in += blocks
            self.bytes_in += blocks * block_bytes
            self.runs_in += len(lengths)

    def ended(self, outward: bool, seconds: float) -> None:
        """A copy took so long."""
        if outward:
            self.seconds_out += seconds
        else:
            self.seconds_in += seconds

    def returned(self, seconds: float) -> None:
        """A preempted sequence is in a step again, ``seconds`` later."""
        self.lost[bisect_left(LOST_BOUNDS, seconds)] += 1
        self.lost_seconds += seconds

    def snapshot(self) -> SwapFigures:
        """A copy that later events do not change."""
        return copy.deepcopy(self)
