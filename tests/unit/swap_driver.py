"""A driver whose scheduler swaps: a fake copier ends jobs late and in any order.

The host pool keeps, per slot, the same ids of token prefixes as the device pool does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from instance.config import SwapConfig
from instance.kv.blocks import BlockState
from instance.kv.copies import CopyJob, HostSpace
from instance.kv.swap import Swap
from instance.request import Sequence
from instance.scheduler import Emission
from tests.unit.kv_driver import GARBAGE, Driver


@dataclass(eq=False)
class Copying:
    """A job on its way: what it must have moved when it ends."""

    job: CopyJob
    source: list[int]


class SwapDriver(Driver):
    """``Driver`` with a host pool.

    A copy reads its source at the end, and fills its target with garbage from the start: so
    a source written too early, or a target read too early, shows.

    Args:
        host_blocks: Blocks of the host pool.
        swap: How it is used.
        rng: Decides when jobs end; None ends them at the next step.
        failures: Share of jobs that fail.

    Attributes:
        held_back: No copy ends.
        jobs: All issued.
        steps_beside_copies: Steps that ran while a copy was under way.
    """

    def __init__(
        self,
        num_blocks: int,
        host_blocks: int,
        swap: SwapConfig,
        rng: random.Random | None = None,
        failures: float = 0.0,
        **more: int | bool,
    ) -> None:
        self.host_space = HostSpace(host_blocks, 1 << 16, swap)
        super().__init__(num_blocks, host=self.host_space, **more)
        self.rng = rng
        self.failures = failures
        self.host_kv = [GARBAGE] * (host_blocks * self.pool.block_size)
        self.copying: list[Copying] = []
        self.jobs: list[CopyJob] = []
        self.held_back = False
        self.steps_beside_copies = 0

    @property
    def swap(self) -> Swap:
        swap = self.scheduler.swap
        assert swap is not None
        return swap

    def before_launch(self) -> None:
        """Issue the copies that were begun."""
        assert self.launched is None, "a copy is issued while a step runs"
        for job in self.swap.copies.take_begun():
            self.jobs.append(job)
            assert len(job.device) == len(job.host) > 0
            runs = job.runs
            assert [b for r in runs for b in range(r.device, r.device + r.count)] == job.device
            assert [b for r in runs for b in range(r.host, r.host + r.count)] == job.host
            source = self.read(job.device) if job.outward else self.read_host(job.host)
            self.copying.append(Copying(job, source))
            kv, target = (self.host_kv, job.host) if job.outward else (self.kv, job.device)
            self._fill(kv, target, [GARBAGE] * len(source))

    def step(self) -> list[Emission]:
        """End some copies while the step runs, then go on as ever."""
        self.end_some()
        self.steps_beside_copies += bool(self.copying) and self.launched is not None
        return super().step()

    def waits_for_copies(self) -> bool:
        return bool(self.copying)

    def settle(self) -> None:
        while self.copying:
            self.end(self.copying[0])

    def end_some(self) -> None:
        """End copies: all, or some at random, in any order; none while ``held_back``."""
        for copying in self.copying[:]:
            if not self.held_back and (self.rng is None or self.rng.random() < 0.4):
                self.end(copying)

    def end(self, copying: Copying) -> None:
        """A job ends, well or not."""
        job, size = copying.job, self.pool.block_size
        self.copying.remove(copying)
        now = self.read(job.device) if job.outward else self.read_host(job.host)
        assert now == copying.source, "the source of a copy was written"
        for block in job.device:
            state = self.pool.state(block)
            assert state in (BlockState.HELD, BlockState.DRAINING)
        if self.rng is not None and self.rng.random() < self.failures:
            self.scheduler.end_copy(job, OSError("the copy failed"))
            return
        if job.outward:
            self._fill(self.host_kv, job.host, copying.source)
        else:
            self._fill(self.kv, job.device, copying.source)
        full = copying.source[: (job.num_tokens // size - job.first) * size]
        sequence = job.sequence
        right = self.prefixes.along(sequence.tokens, sequence.request.adapter)
        assert full == right[job.first * size :][: len(full)], "a copy of wrong KV"
        self.scheduler.end_copy(job, 1e-5 * len(job.device))

    def read_host(self, blocks: list[int]) -> list[int]:
        size = self.pool.block_size
        return [self.host_kv[block * size + offset] for block in blocks for offset in range(size)]

    def move(self, sequence: Sequence, first: int, target: list[int]) -> None:
        """As ``Driver.move``; straight from the host if that is where the KV is."""
        if not sequence.num_swapped:
            super().move(sequence, first, target)
            return
        source = sequence.host_table[first : first + len(target)]
        self._fill(self.kv, target, self.read_host(source))

    def _fill(self, kv: list[int], blocks: list[int], content: list[int]) -> None:
        size = self.pool.block_size
        for index, block in enumerate(blocks):
            kv[block * size : (block + 1) * size] = content[index * size : (index + 1) * size]

    def check(self) -> None:
        super().check()
        busy = {block for copying in self.copying for block in copying.job.host}
        writing = [
            block for copying in self.copying if copying.job.outward for block in copying.job.host
        ]
        assert len(set(writing)) == len(writing), "two copies write one host block"
        reading = {
            block
            for copying in self.copying
            if not copying.job.outward
            for block in copying.job.host
        }
        assert reading.isdisjoint(writing), "a host block is read while it is written"
        for block in busy:
            assert self.swap.host.state(block) is BlockState.HELD
        # What the host lists is what it holds.
        size = self.pool.block_size
        for block in self.swap.host.prefix.listed():
            assert GARBAGE not in self.host_kv[block * size : (block + 1) * size]
