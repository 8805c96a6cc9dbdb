"""Copies made before anybody has to wait for them."""

from __future__ import annotations

from collections import deque

from instance.kv.blocks import IntegrityError
from instance.kv.copies import Copies, CopyJob
from instance.kv.runs import runs
from instance.request import Sequence

# They are made while they cost at most this share of computing their content anew, in jobs of
# so many blocks; many are never asked for.
_MOST_COST = 0.1
_JOB_BLOCKS = 64
_SEQUENCES = 256
# The next victim is copied ahead while less than this share of the pool is free.
_AHEAD_BELOW = 8


class Saver:
    """Keeps an idle copier busy with what will be of use.

    When memory is short, with what the likely victim has written so far: if it is preempted,
    its blocks but the last are free at once. Else with what the oldest finished sequence left,
    before that is displaced, for the next turn of its conversation. Either way the copy would
    be made later, so it costs nothing but for sequences that nobody ever asks for again.

    Args:
        copies: Copies under way.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._finished: deque[Sequence] = deque(maxlen=_SEQUENCES)
        self._done: tuple[Sequence, int] | None = None

    def note_finished(self, sequence: Sequence) -> None:
        """A sequence has all its tokens, and its blocks still."""
        if sequence.sealed:
            self._finished.append(sequence)

    @property
    def idle(self) -> bool:
        """There is nothing to copy while memory is not short."""
        return not self._finished

    @property
    def short_below(self) -> int:
        """Free blocks of the device below which the next victim is copied ahead."""
        return -(-self._copies.pool.num_usable // _AHEAD_BELOW)

    def saved_for(self, likely: Sequence) -> int:
        """Steps that each write a position of the next victim, and after which there is still
        nothing of it to copy."""
        if self._done != (likely, likely.sealed):
            return 0
        return self._copies.pool.block_size * (likely.sealed + 1) - 1 - likely.num_written

    def save(self, likely: Sequence | None) -> None:
        """Begin at most one copy, while none is under way.

        Args:
            likely: The running sequence that would be the next victim.
        """
        if self._copies:
            return
        pool = self._copies.pool
        if likely is not None and pool.num_free * _AHEAD_BELOW < pool.num_usable:
            state = likely, likely.sealed
            if state != self._done:
                if self._save_blocks(likely, likely.block_table[: likely.sealed]):
                    return
                self._done = state
        while self._finished:
            sequence = self._finished[0]
            self._copies.tables.hash(sequence)
            if self._save_blocks(sequence, pool.match(sequence.tokens, sequence.block_hashes)):
                return
            self._finished.popleft()

    def _save_blocks(self, sequence: Sequence, here: list[int]) -> bool:
        """Copy some of a sequence's leading sealed blocks that the host lacks; false if it
        lacks none, or a copy does not pay."""
        copies, host = self._copies, self._copies.host
        size = host.block_size
        there = host.match(sequence.tokens, sequence.block_hashes[: len(here)])
        room = host.num_free - host.num_idle(there)
        first = len(there)
        last = first + max(0, min(_JOB_BLOCKS, copies.pool.num_usable // 4, room))
        device = here[first:last]
        last = first + len(device)
        seconds = copies.cost.copy_seconds(True, len(runs(device)), len(device))
        worth = _MOST_COST * copies.cost.prefill_seconds(first * size, last * size)
        # The first copy is made in any case: nothing is known before.
        if not device or (seconds > worth and copies.cost.knows_copies):
            return False
        host.acquire(there)
        fresh = host.allocate(len(device), after=there[-1] if there else None)
        if fresh is None:
            raise IntegrityError(f"{room} host blocks are free, but not {len(device)}")
        held = there + fresh
        copies.start(CopyJob(True, sequence, first, device, fresh, held, last * size))
        host.release(held)  # the job has references of its own
        copies.figures.saved_blocks += len(device)
        return True
