"""Who goes out to host memory, who comes back, and which copies stay there.

The host pool is a ``BlockPool`` like the device's, so a copy is in one of the same states.
*Held*: a live sequence counts on it, be it the only copy (of a swapped-out sequence) or one
that outlived its return. *Cached*: nobody counts on it, but its content is known by the
prefix hash; reused last, least recently released first. A full block never changes, so its
copy stays valid for good, for this sequence, for the next turn of its conversation and for
any other with the same beginning (KV Cache Reuse of FastSwitch, arXiv 2411.18424). Only full
blocks are ever listed, and tokens are compared on a hit, so a copy that the device has
written past cannot be found: it is given up when its sequence goes on.

Copies are only ever issued while no step is launched (``begin``), so no step writes what a
copy reads, nor reads what it writes. The blocks of a victim are then given up by it and
*draining* until the copy has ended; blocks that a copy fills belong to a sequence in no step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from instance.budget import StepCostLearner
from instance.config import PreemptionMode, SwapMode
from instance.kv.blocks import BlockPool, IntegrityError
from instance.kv.copies import Copies, CopyJob, HostSpace, copy_runs
from instance.kv.cost import SwapCost, waiting_pays
from instance.kv.figures import SwapFigures
from instance.kv.runs import runs
from instance.kv.saving import Saver
from instance.kv.tables import BlockTables
from instance.request import Sequence, SequenceStatus

_LOADING = SequenceStatus.LOADING
_RUNNING = SequenceStatus.RUNNING
_WAITING = SequenceStatus.WAITING

# A choice of recompute tells nothing of how fast copies have become: one in so many is a try.
_TRY_EVERY = 32


class Swap:
    """The books of swapping on one instance; copies nothing itself.

    Args:
        tables: Block tables; their host pool is where copies go.
        space: Size and use of that pool.
        steps: What steps cost here.

    Attributes:
        copies: Those under way, and those to be issued.
        cost: What copies and prefills take; fed by whoever runs them.
        figures: What was done so far.
        loaded: Sequences whose KV is back and that wait for a place in the batch.
        lost: Sequences that waited with KV on the host and lost it; whoever reads it clears
            it.
    """

    def __init__(self, tables: BlockTables, space: HostSpace, steps: StepCostLearner) -> None:
        self.copies = Copies(tables, space, steps)
        self.tables = tables
        self.pool: BlockPool = self.copies.pool
        self.host: BlockPool = self.copies.host
        self.cost: SwapCost = self.copies.cost
        self.figures: SwapFigures = self.copies.figures
        self.config = space.config
        self.loaded: list[Sequence] = []
        self.lost: list[Sequence] = []
        self._leaving: list[tuple[Sequence, int]] = []
        self._awaited: dict[Sequence, CopyJob] = {}
        self._saver = Saver(self.copies) if space.config.save and self.copies.listed else None
        self._recomputed = 0

    # ---- figures

    @property
    def num_loading(self) -> int:
        """Sequences on their way into the batch."""
        return len(self.loaded) + sum(1 for job in self._awaited.values() if not job.outward)

    @property
    def awaited(self) -> bool:
        """A sequence waits for a copy."""
        return bool(self._awaited)

    @property
    def quiet(self) -> bool:
        """Nothing is copied or about to be, as long as memory does not run short."""
        saved = self._saver is None or self._saver.idle
        return saved and not self._leaving and not self.copies and not self.loaded

    @property
    def short_below(self) -> int:
        """Free blocks of the device below which copies are made ahead of need."""
        return 0 if self._saver is None else self._saver.short_below

    def saved_for(self, likely: Sequence) -> int:
        """Steps that each write a position of the next victim, and after which there is still
        nothing of it to copy ahead, however short memory is."""
        return self.pool.num_usable if self._saver is None else self._saver.saved_for(likely)

    def busy(self, sequence: Sequence) -> bool:
        """A copy of its KV is on its way, or about to be."""
        return sequence in self._awaited or any(one is sequence for one, _ in self._leaving)

    def leaves(self, sequence: Sequence) -> bool:
        """It was preempted, and the copy of its KV starts at the next boundary."""
        return bool(self._leaving) and any(one is sequence for one, _ in self._leaving)

    def frees(self, missing: int) -> bool:
        """Copies under way, once ended, will leave this many blocks free."""
        coming = self.num_coming()
        return coming > 0 and missing <= self.pool.num_free + coming

    def num_coming(self) -> int:
        """Blocks of the device that nobody will hold once the copies under way have ended."""
        references = self.pool.num_references
        return self.copies.num_coming() + sum(
            1
            for sequence, _ in self._leaving
            for block in sequence.block_table
            if references(block) == 1
        )

    def snapshot(self) -> SwapFigures:
        """The figures now."""
        figures = self.figures
        figures.host_used = self.host.num_usable - self.host.num_free + self.host.num_cached
        return figures.snapshot()

    # ---- out

    def leave(self, sequence: Sequence, live: Iterable[Sequence]) -> bool:
        """Let a victim's KV leave for the host at the next boundary, if that is best.

        Its full blocks that have a valid copy there are not copied again. The victim keeps
        its block table until then: a launched step may still write there.

        Args:
            sequence: Out of the batch already; ``num_computed`` counts a launched step.
            live: All sequences here, of which some may hold copies worth less.

        Returns:
            False where the KV should be given up, to be computed anew.
        """
        tokens = sequence.num_computed
        if not tokens:
            return False
        self._find_copies(sequence, tokens // self.pool.block_size)
        first, last = len(sequence.host_table), self.tables.blocks_for(tokens)
        pieces = len(runs(sequence.block_table[first:last]))
        seconds = self.cost.copy_seconds(True, pieces, last - first)
        seconds += self.cost.copy_seconds(False, max(1, pieces), last)
        if not self._prefer_copy("swap", seconds, 0, tokens):
            return False
        if not self._make_room(last - first, tokens, sequence, live):
            self.figures.decisions["recompute", "host full"] += 1
            return False
        table = sequence.host_table
        fresh = self.host.allocate(last - first, after=table[-1] if table else None)
        if fresh is None:
            raise IntegrityError(f"{self.host.num_free} host blocks are free, but not {last}")
        table.extend(fresh)
        self._leaving.append((sequence, first))
        return True

    def begin(self, likely: Sequence | None) -> bool:
        """Start what can start while no step is launched; ``copies`` has the jobs.

        Args:
            likely: The running sequence that would be the next victim.

        Returns:
            A victim of which nothing had to be copied has left: its blocks are free already.
        """
        freed = False
        leaving, self._leaving = self._leaving, []
        for sequence, first in leaving:
            if sequence.status is not _WAITING or not sequence.block_table:
                continue  # ended meanwhile
            tokens = sequence.num_written
            if sequence.num_in_flight or tokens != sequence.num_computed:
                raise IntegrityError(f"{sequence.request_id} leaves, but a step computes it")
            last = self.tables.blocks_for(tokens)
            host = sequence.host_table
            job = CopyJob(
                True,
                sequence,
                first,
                sequence.block_table[first:last],
                host[first:],
                host[:],
                tokens,
            )
            self._start(job)
            self.tables.release_device(sequence)
            self.figures.out += 1
            self.figures.kept_blocks += first
            if not job.device:
                self.end(job, 0.0)
                freed = True
        if self._saver is not None:
            self._saver.save(likely)
        return freed

    # ---- in

    def load(self, sequence: Sequence, newcomer: bool, ahead: bool) -> bool:
        """Fetch what the host has of a sequence that was just given its blocks.

        Args:
            sequence: Out of the queue; its leading blocks may be hits on the device.
            newcomer: It is admitted for the first time, so what is fetched counts as cached.
            ahead: The batch has no place for it yet.

        Returns:
            False where it can run at once; else it is LOADING, until ``loaded`` lists it.
        """
        size = self.pool.block_size
        first, swapped = sequence.sealed, sequence.num_swapped
        if not swapped:
            self._find_copies(sequence, (len(sequence.tokens) - 1) // size)
        tokens = swapped or len(sequence.host_table) * size
        last = self.tables.blocks_for(tokens)
        if last <= first:
            return self._enter(sequence, ahead)
        device, host = sequence.block_table[first:last], sequence.host_table[first:last]
        seconds = self.cost.copy_seconds(False, len(copy_runs(device, host)), last - first)
        action = "fetch" if swapped else "read back"
        if not self._prefer_copy(action, seconds, first * size, tokens):
            return self._enter(sequence, ahead)
        sequence.status = _LOADING
        self._start(CopyJob(False, sequence, first, device, host, host, tokens))
        if newcomer:
            sequence.num_cached = min(tokens, sequence.num_prompt)
        self.figures.back += 1
        if not swapped:
            self.figures.hit_blocks += last - first
        return True

    def take_loaded(self, most: int) -> list[Sequence]:
        """Up to ``most`` sequences that are back, in the order of their return."""
        taken, self.loaded = self.loaded[: max(0, most)], self.loaded[max(0, most) :]
        return taken

    # ---- both ways

    def end(self, job: CopyJob, result: float | BaseException) -> Sequence | None:
        """A job has ended, in so many seconds or with an error.

        Returns:
            The sequence that could not be fetched and must wait again, without KV; or None.
        """
        ended_well = self.copies.end(job, result)
        sequence = job.sequence
        if self._awaited.get(sequence) is not job:
            return None
        del self._awaited[sequence]
        if job.outward:
            if ended_well:
                sequence.num_swapped = job.num_tokens
            else:
                self.tables.release(sequence)
        elif not ended_well:
            sequence.status = _WAITING
            self.tables.release(sequence)
            self.lost.append(sequence)
            return sequence
        else:
            sequence.num_computed = sequence.num_written = job.num_tokens
            self.tables.seal(sequence)
            self._go_on(sequence)
            self.loaded.append(sequence)
        return None

    def forget(self, sequence: Sequence) -> None:
        """The sequence ends or is taken away; copies under way are of no use to it."""
        self._awaited.pop(sequence, None)
        self._leaving = [entry for entry in self._leaving if entry[0] is not sequence]
        if sequence in self.loaded:
            self.loaded.remove(sequence)

    def note_finished(self, sequence: Sequence) -> None:
        """A sequence has all its tokens; another turn of its conversation may follow."""
        if self._saver is not None:
            self._saver.note_finished(sequence)

    def must_wait(self, step: float, runnable: int, blocked: int, elapsed: float) -> bool:
        """Whether the next step should be held back until a copy has ended.

        Args:
            step: Seconds of a step.
            runnable: Rows that it would have.
            blocked: Sequences that could run but for blocks that a copy keeps.
            elapsed: Seconds since the copies were issued.
        """
        mode = self.config.mode
        if mode is SwapMode.ASYNC or not self._awaited:
            return False
        if mode is SwapMode.SYNC:
            return True
        coming = sum(1 for job in self._awaited.values() if not job.outward)
        left = self.copies.seconds_left()
        if elapsed > 2 * left:
            return False  # the prediction does not hold
        pays = waiting_pays(max(0.0, left - elapsed), step, runnable, blocked + coming)
        if pays and not elapsed:
            self.figures.decisions["wait", "cheaper"] += 1
        return pays

    # ---- checks

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Check host pool, jobs and sequences against each other.

        Raises:
            IntegrityError: With what is wrong.
        """
        references: Counter[int] = Counter()
        size = self.pool.block_size
        for sequence in live:
            name, status = sequence.request_id, sequence.status
            references.update(sequence.host_table)
            job = self._awaited.get(sequence)
            if (status is _LOADING) != (
                sequence in self.loaded or (job is not None and not job.outward)
            ):
                raise IntegrityError(f"{name} is {status}, but its copy says otherwise")
            if job is not None and job.outward and status is not _WAITING:
                raise IntegrityError(f"{name} is {status} while its KV leaves")
            if sequence.num_swapped and (
                len(sequence.host_table) != self.tables.blocks_for(sequence.num_swapped)
                or status is _RUNNING
            ):
                raise IntegrityError(f"{name} is {status}: its host copies do not add up")
            if status is _RUNNING and len(sequence.host_table) * size > sequence.num_written:
                raise IntegrityError(f"{name} counts on a copy of a block it still writes")
        if not all(job in self.copies for job in self._awaited.values()):
            raise IntegrityError("a sequence waits for a copy that is not under way")
        self.copies.check_integrity(references)

    # ---- inside

    def _start(self, job: CopyJob) -> None:
        self.copies.start(job)
        self._awaited[job.sequence] = job

    def _find_copies(self, sequence: Sequence, most: int) -> None:
        """Count on the copies of leading full blocks, ``most`` at most, that others left."""
        if not self.copies.listed:
            return
        self.tables.hash(sequence)
        found = self.host.match(sequence.tokens, sequence.block_hashes[:most])
        fresh = found[len(sequence.host_table) :]
        self.host.acquire(fresh)
        sequence.host_table.extend(fresh)

    def _enter(self, sequence: Sequence, ahead: bool) -> bool:
        """Nothing is fetched: true if the sequence has to wait for a place all the same."""
        self._go_on(sequence)
        if ahead:
            sequence.status = _LOADING
            self.loaded.append(sequence)
        return ahead

    def _go_on(self, sequence: Sequence) -> None:
        """The sequence will write on: of its copies only those of full blocks stay valid."""
        tokens = sequence.num_swapped or len(sequence.host_table) * self.pool.block_size
        keep = tokens // self.pool.block_size if self.config.reuse else 0
        # Fetched or hit blocks alone count as written.
        keep = min(keep, sequence.num_written // self.pool.block_size)
        sequence.num_swapped = 0
        table, sequence.host_table = sequence.host_table, sequence.host_table[:keep]
        self.host.release(table[keep:])

    def _prefer_copy(self, action: str, seconds: float, start: int, end: int) -> bool:
        """Choose between a copy that takes ``seconds`` and computing [start, end) anew."""
        mode = self.config.preemption
        if mode is PreemptionMode.SWAP:
            choice = action, "configured"
        elif mode is PreemptionMode.RECOMPUTE and action == "swap":
            choice = "recompute", "configured"
        elif not self.cost.knows_copies:
            choice = action, "tried"
        elif seconds <= self.cost.prefill_seconds(start, end):
            choice = action, "cheaper"
        else:
            self._recomputed += 1
            tried = self._recomputed % _TRY_EVERY == 0
            choice = (action, "tried") if tried else ("recompute", "cheaper")
        self.figures.decisions[choice] += 1
        return choice[0] == action

    def _make_room(
        self, wanted: int, tokens: int, leaving: Sequence, live: Iterable[Sequence]
    ) -> bool:
        """Have ``wanted`` host blocks free; copies of less worth are given up for it.

        Those that nobody counts on go first, by the pool itself. Then those of running
        sequences, and last the only ones of waiting sequences, if computing all of them anew
        costs less than the ``tokens`` that want to come; the cheapest first.
        """
        if wanted <= self.host.num_free:
            return True
        candidates = [
            one
            for one in live
            if one.host_table
            and one is not leaving
            and not self.busy(one)
            and (one.status is _RUNNING or (one.status is _WAITING and one.num_swapped))
        ]
        candidates.sort(key=lambda one: (one.num_swapped > 0, len(one.host_table)))
        budget = self.cost.prefill_seconds(0, tokens)
        room = self.host.num_free
        chosen: list[Sequence] = []
        for one in candidates:
            if room >= wanted:
                break
            budget -= self.cost.prefill_seconds(0, one.num_swapped)
            if budget < 0:
                break
            # Blocks that others count on as well stay.
            room += sum(1 for block in one.host_table if self.host.num_references(block) == 1)
            chosen.append(one)
        if room < wanted:
            return False
        for one in chosen:
            self.figures.dropped_blocks += len(one.host_table)
            if one.num_swapped:
                self.lost.append(one)
            self.tables.release_host(one)
        return wanted <= self.host.num_free
