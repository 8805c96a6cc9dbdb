"""Copies between the pool and the host pool, from their beginning to their end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from instance.budget import StepCostLearner
from instance.config import SwapConfig
from instance.executor import CopyRun
from instance.kv.blocks import BlockPool, BlockState, IntegrityError
from instance.kv.cost import SwapCost
from instance.kv.figures import SwapFigures
from instance.kv.runs import runs
from instance.kv.tables import BlockTables
from instance.request import Sequence


@dataclass(frozen=True, slots=True)
class HostSpace:
    """The host memory that an instance may swap to.

    Attributes:
        num_blocks: Blocks, a null block 0 included.
        block_bytes: Bytes of each.
        config: How it is used.
    """

    num_blocks: int
    block_bytes: int
    config: SwapConfig


@dataclass(eq=False, slots=True)
class CopyJob:
    """Copies of blocks of one sequence, in one direction.

    Attributes:
        outward: To the host.
        sequence: Whose blocks they are, or were.
        first: Index of the first of them in the sequence.
        device: Blocks on the device; pinned until the end.
        host: Their counterparts.
        held: Host blocks to which the job has references until its end: those, and going out
            the ones before them too.
        num_tokens: Leading tokens whose KV is in place once it has ended.
    """

    outward: bool
    sequence: Sequence
    first: int
    device: list[int]
    host: list[int]
    held: list[int]
    num_tokens: int

    @property
    def runs(self) -> list[CopyRun]:
        """What to copy: pieces that are contiguous on both sides."""
        return copy_runs(self.device, self.host)


def copy_runs(device: list[int], host: list[int]) -> list[CopyRun]:
    """The pieces of a copy that are contiguous on both sides, in order."""
    found: list[CopyRun] = []
    done = 0
    for first, count in runs(device):
        for other, length in runs(host[done : done + count]):
            found.append(CopyRun(first, other, length))
            first += length
        done += count
    return found


class Copies:
    """All copies that were begun and have not ended.

    Args:
        tables: Block tables, with a host pool.
        space: Size and use of that pool.
        steps: What steps cost here.

    Attributes:
        cost: What copies and prefills take; fed by whoever runs them.
        figures: What was done so far.
        listed: Copies can be found by their content.
    """

    def __init__(self, tables: BlockTables, space: HostSpace, steps: StepCostLearner) -> None:
        if tables.host is None:
            raise ValueError("the block tables have no host pool")
        self.tables = tables
        self.pool: BlockPool = tables.pool
        self.host: BlockPool = tables.host
        self.cost = SwapCost(space.block_bytes, self.pool.block_size, steps)
        self.figures = SwapFigures(host_blocks=self.host.num_usable)
        self.listed = space.config.reuse and tables.prefix_caching
        self._under_way: set[CopyJob] = set()
        self._begun: list[CopyJob] = []

    def __bool__(self) -> bool:
        """Some copy is under way."""
        return bool(self._under_way)

    def __contains__(self, job: object) -> bool:
        return job in self._under_way

    def start(self, job: CopyJob) -> None:
        """Keep what the job reads and writes from being used; ``take_begun`` has the job."""
        self.pool.pin(job.device)
        self.host.acquire(job.held)
        self._under_way.add(job)
        if job.device:
            self._begun.append(job)
            lengths = [run.count for run in job.runs]
            self.figures.issued(job.outward, lengths, self.cost.block_bytes)

    def take_begun(self) -> list[CopyJob]:
        """The jobs begun since the last call, to be issued before the next step."""
        begun, self._begun = self._begun, []
        return begun

    def end(self, job: CopyJob, result: float | BaseException) -> bool:
        """Take a job off the books; false if it failed."""
        failed = isinstance(result, BaseException)
        if isinstance(result, BaseException):
            self.figures.failed += 1
        elif job.device:
            self.cost.observe_copy(job.outward, len(job.runs), len(job.device), result)
            self.figures.ended(job.outward, result)
        self._under_way.remove(job)
        self.pool.unpin(job.device)
        if job.outward and not failed:
            self._list(job)
        self.host.release(job.held)
        return not failed

    def num_coming(self) -> int:
        """Blocks of the device that nobody will hold once all have ended."""
        references = self.pool.num_references
        return sum(
            1
            for job in self._under_way
            if job.outward
            for block in job.device
            if not references(block)
        )

    def seconds_left(self) -> float:
        """Seconds that all of them are expected to take, from their issue on."""
        each_way = [0.0, 0.0]
        for job in self._under_way:
            each_way[job.outward] += self.cost.copy_seconds(
                job.outward, len(job.runs), len(job.device)
            )
        return max(each_way)

    def check_integrity(self, references: Counter[int]) -> None:
        """Check both pools against the copies.

        Args:
            references: To host blocks, by others than jobs.

        Raises:
            IntegrityError: With what is wrong.
        """
        expected = Counter(references)
        for job in self._under_way:
            expected.update(job.held)
            for block in job.device:
                if self.pool.state(block) in (BlockState.FREE, BlockState.CACHED):
                    raise IntegrityError(f"block {block} is in a copy, but it is not pinned")
        self.host.check_integrity(expected)

    def _list(self, job: CopyJob) -> None:
        """The full blocks that were copied can be found from now on."""
        if not self.listed:
            return
        sequence, size = job.sequence, self.pool.block_size
        self.tables.hash(sequence)
        for index in range(job.first, job.num_tokens // size):
            self.host.seal(
                job.held[index],
                job.held[index - 1] if index else None,
                sequence.block_hashes[index],
                tuple(sequence.tokens[index * size : (index + 1) * size]),
            )
