"""A copier without memory: copies take as long as a cost model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instance.clock import Clock, TimerHandle
from instance.executor import CopyDone, CopyRun


class ModelledCopier:
    """Answers each copy after the time it would take; a ``Copier`` without bytes.

    The copies of one direction run one after the other; out and in are independent, unless
    they share a stream. ``done`` is called on the clock's thread.

    Args:
        num_host_blocks: Host blocks to pretend to have, a null block included.
        block_bytes: Bytes that a block is said to have.
        clock: Real or virtual.
        cost: Seconds that a copy takes, given its bytes and its contiguous runs.
        cost_in: The same for copies from the host; None where they cost as much.
        one_stream: All copies run one after the other.
    """

    host: None = None

    def __init__(
        self,
        num_host_blocks: int,
        block_bytes: int,
        clock: Clock,
        cost: Callable[[int, int], float],
        cost_in: Callable[[int, int], float] | None = None,
        one_stream: bool = False,
    ) -> None:
        self.num_host_blocks = num_host_blocks
        self.block_bytes = block_bytes
        self._clock = clock
        self._costs = {True: cost, False: cost if cost_in is None else cost_in}
        # Of each stream; a direction is its own stream, or both are one.
        self._free_at = [clock.now()] * 2
        self._one_stream = one_stream
        self._timers: dict[int, TimerHandle] = {}
        self._issued = 0

    def copy_out(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Queue a copy to the host; see ``Copier``."""
        self._copy(True, runs, done)

    def copy_in(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Queue a copy from the host; see ``Copier``."""
        self._copy(False, runs, done)

    def close(self) -> None:
        """Abandon the copies under way."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _copy(self, outward: bool, runs: Sequence[CopyRun], done: CopyDone) -> None:
        num_bytes = self.block_bytes * sum(run.count for run in runs)
        seconds = self._costs[outward](num_bytes, len(runs))
        now = self._clock.now()
        stream = outward and not self._one_stream
        ends = self._free_at[stream] = max(now, self._free_at[stream]) + seconds
        number = self._issued
        self._issued += 1

        def end() -> None:
            self._timers.pop(number, None)
            done(seconds)

        self._timers[number] = self._clock.call_later(ends - now, end)
