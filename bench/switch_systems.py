"""The six ways of switching between sequences that ``bench.context_switch`` compares.

All share the scheduler, its priorities and the workload. They differ in how finely KV is
copied, in whether steps wait for copies, and in whether copies are used again:

layer-major
    What FastSwitch (arXiv 2411.18424) measured against: vLLM 0.3.3 keeps K and V of each
    layer in tensors of their own, so a block leaves in ``2 * layers`` calls of
    cudaMemcpyAsync, and the step waits for all of them.
block-major
    A block lies in one piece for all layers: one call per block.
block groups
    One call per run of blocks that is contiguous on both sides.
asynchronous
    Steps go on beside the copies, unless waiting is measured to be cheaper.
reuse
    Copies outlive the return of their sequence, and what others will ask for is copied
    before somebody waits for it. So the engine is served.
recompute
    Nothing is copied: KV is given up, and computed again.

A seventh line is no part of the comparison: "own fairness" is the engine as it is served under
its own priorities, a conversation being a tenant, and with its own reluctance to preempt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from instance.config import PreemptionMode, SwapConfig, SwapMode
from instance.executor import Copier, CopyDone, CopyRun, KvPool
from instance.kv.blocks import BlockPool

FULL = 0.9
"""Copies issued while at least this share of the pool is in use are counted apart."""


@dataclass(frozen=True, slots=True)
class System:
    """One of the compared systems.

    Attributes:
        name: Of the system.
        swap: How it swaps; None: it recomputes.
        per_block: It copies block by block.
        per_layer: It copies K and V of each layer by themselves.
        own: Its priorities are the engine's own, not those of the experiment.
    """

    name: str
    swap: SwapConfig | None
    per_block: bool = False
    per_layer: bool = False
    own: bool = False

    def copies(self, blocks: int, runs: int, layers: int) -> int:
        """Calls that so many blocks take, which lie in so many runs."""
        if not self.per_block:
            return runs
        return blocks * 2 * layers if self.per_layer else blocks

    @property
    def one_stream(self) -> bool:
        """Copies in and out follow each other, as where steps wait for both (vLLM 0.3.3's
        ``Worker.cache_swap``: in, then out, on one stream)."""
        return self.swap is not None and self.swap.mode is SwapMode.SYNC


_SYNCHRONOUS = SwapConfig(
    mode=SwapMode.SYNC, preemption=PreemptionMode.SWAP, reuse=False, save=False
)
_ASYNCHRONOUS = dataclasses.replace(_SYNCHRONOUS, mode=SwapMode.AUTO)

SYSTEMS = (
    System("layer-major", _SYNCHRONOUS, per_block=True, per_layer=True),
    System("block-major", _SYNCHRONOUS, per_block=True),
    System("block groups", _SYNCHRONOUS),
    System("asynchronous", _ASYNCHRONOUS),
    System("reuse", dataclasses.replace(_ASYNCHRONOUS, reuse=True, save=True)),
    System("recompute", None),
)
OWN = dataclasses.replace(SYSTEMS[4], name="own fairness", own=True)
BY_NAME = {system.name: system for system in (*SYSTEMS, OWN)}
FIRST, BLOCKWISE, GROUPED, PLAIN, WHOLE = (system.name for system in SYSTEMS[:5])


@dataclass(slots=True)
class CopyFigures:
    """Copies of sequences' KV, both ways.

    Attributes:
        swaps: Jobs: the KV of one sequence, one way.
        copies: Calls that they took.
        blocks: Blocks that they moved.
    """

    swaps: int = 0
    copies: int = 0
    blocks: int = 0

    def add(self, copies: int, blocks: int) -> None:
        self.swaps += 1
        self.copies += copies
        self.blocks += blocks


class GranularCopier:
    """Copies through another copier, as finely as told, and counts; a ``Copier``.

    Args:
        inner: Copies. Its blocks are ``pieces`` to one of this copier's.
        count: Calls that so many blocks in so many runs take.
        pieces: Each block is copied by itself, in so many pieces; 0 leaves runs whole, as
            where the inner copier has no memory and knows by itself what they cost.

    Attributes:
        all: What was copied.
        full: The part of it that was issued while the device's pool was ``FULL``.
        pool: Whose use decides about that; set once there is an engine.
    """

    def __init__(self, inner: Copier, count: Callable[[int, int], int], pieces: int = 0) -> None:
        self._inner = inner
        self._count = count
        self._pieces = pieces
        self.all, self.full = CopyFigures(), CopyFigures()
        self.pool: BlockPool | None = None

    @property
    def num_host_blocks(self) -> int:
        return self._inner.num_host_blocks // max(1, self._pieces)

    @property
    def block_bytes(self) -> int:
        return self._inner.block_bytes * max(1, self._pieces)

    @property
    def host(self) -> KvPool | None:
        return self._inner.host

    def copy_out(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """See ``Copier``."""
        self._copy(self._inner.copy_out, runs, done)

    def copy_in(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """See ``Copier``."""
        self._copy(self._inner.copy_in, runs, done)

    def close(self) -> None:
        self._inner.close()

    def _copy(
        self,
        copy: Callable[[Sequence[CopyRun], CopyDone], None],
        runs: Sequence[CopyRun],
        done: CopyDone,
    ) -> None:
        blocks = sum(run.count for run in runs)
        copies = self._count(blocks, len(runs))
        if self._pieces:
            runs = _pieces(runs, self._pieces)
        self.all.add(copies, blocks)
        pool = self.pool
        if pool is not None and pool.num_usable - pool.num_free >= FULL * pool.num_usable:
            self.full.add(copies, blocks)
        copy(runs, done)


def _pieces(runs: Sequence[CopyRun], pieces: int) -> list[CopyRun]:
    """Each piece of each block by itself, in units of pieces."""
    return [
        CopyRun((run.device + block) * pieces + piece, (run.host + block) * pieces + piece, 1)
        for run in runs
        for block in range(run.count)
        for piece in range(pieces)
    ]
