"""Drives a scheduler as the engine does, over a fake device with modelled KV.

The fake pool keeps, per slot, an id of the whole token prefix that was written there. A row
reads its past through its block table: any block reused too early, hit wrongly or not
written in time shows up as a wrong prefix. Tokens are drawn from what was read.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from instance.config import SchedulerConfig
from instance.executor import StepBatch
from instance.kv.blocks import BlockPool, runs
from instance.kv.copies import HostSpace
from instance.request import (
    FinishReason,
    Request,
    RequestClass,
    SamplingParams,
    Sequence,
    SequenceStatus,
    StepPlan,
)
from instance.scheduler import Emission, Scheduler

GARBAGE = -1
ROOT = 0


class Prefixes:
    """Numbers token prefixes: equal number, equal tokens."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, int], int] = {}

    def after(self, prefix: int, token: int) -> int:
        """The number of ``prefix`` with one more token."""
        return self._ids.setdefault((prefix, token), len(self._ids) + 1)

    def root(self, adapter: str) -> int:
        """The number of the empty prefix: KV of another adapter differs from the start."""
        return self.after(ROOT, -1 - sum(adapter.encode())) if adapter else ROOT

    def along(self, tokens: list[int], adapter: str = "") -> list[int]:
        """The numbers of all non-empty prefixes of ``tokens``."""
        found = []
        prefix = self.root(adapter)
        for token in tokens:
            prefix = self.after(prefix, token)
            found.append(prefix)
        return found


def draw(seed: int, prefix_tokens: int, position: int) -> int:
    """The token at ``position``: a function of seed, position and last prefix only."""
    return random.Random(seed * 1_000_003 + prefix_tokens * 1009 + position).randrange(5)


def make(
    name: str,
    prompt: list[int],
    *,
    max_tokens: int = 8,
    min_tokens: int = 0,
    stop: tuple[int, ...] = (),
    arrival: float = 0.0,
    request_class: RequestClass = RequestClass.STANDARD,
    seed: int = 0,
    adapter: str = "",
) -> Sequence:
    """A waiting sequence."""
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop, seed=seed
    )
    return Sequence.start(
        Request(
            name,
            tuple(prompt),
            params,
            arrival=arrival,
            request_class=request_class,
            adapter=adapter,
        )
    )


class Driver:
    """The engine's loop, step by step, checked at every launch.

    Attributes:
        ended: Finished sequences with the tokens emitted, by request id.
        on_boundary: Called when no step is launched, before a plan is patched.
        on_run: Called while a step runs, before and after the next one is planned.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        late: bool = False,
        host: HostSpace | None = None,
        **config: int | bool,
    ) -> None:
        self.config = SchedulerConfig(**config)  # type: ignore[arg-type]
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.config, self.pool, b"model", host)
        self.prefixes = Prefixes()
        self.kv = [GARBAGE] * (num_blocks * block_size)
        self.launched: StepPlan | None = None
        self.planned: StepPlan | None = None
        self.steps: list[list[tuple[str, int, int, bool]]] = []
        self.preemptions = 0
        self.emitted: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.on_boundary: Callable[[], None] = lambda: None
        self.on_run: Callable[[], None] = lambda: None
        self._late = late  # the device works at the end of a step instead of at its start
        self._batch: StepBatch | None = None
        self._drawn: list[int] = []

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)
            self.emitted[sequence.request_id] = []

    def step(self) -> list[Emission]:
        """End the running step, launch the next one and plan the one after it."""
        scheduler = self.scheduler
        emissions: list[Emission] = []
        if self.launched is not None:
            if self._late:
                self._execute()
            emissions = scheduler.complete(self.launched, self._drawn)
            self.launched = None
            for emission in emissions:
                self._collect(emission)
            self.check()
        self.on_boundary()
        plan = self.planned or scheduler.schedule()
        self.planned = None
        scheduler.patch(plan)
        self.preemptions += len(plan.preempted)
        self._check_plan(plan)
        self.before_launch()
        if plan.rows:
            self.steps.append(
                [(r.sequence.request_id, r.start, r.length, r.samples) for r in plan.rows]
            )
            self.launched = plan
            self._batch = StepBatch.build(plan, self.pool.block_size)
            if not self._late:
                self._execute()
            self.on_run()
            self.planned = scheduler.schedule()
            self.on_run()
        else:
            # Only an event outside starts another step.
            assert self.waits_for_copies() or not self._servable(), "the engine stands still"
        self.check()
        return emissions

    def _servable(self) -> bool:
        """Somebody runs, or waits while nobody at all has memory."""
        scheduler, pool = self.scheduler, self.pool
        waiting = scheduler.waiting if pool.num_free == pool.num_usable else ()
        return any(not one.held for one in (*scheduler.running, *waiting))

    def run(self, limit: int = 20_000) -> None:
        """Step until nothing is left to do."""
        while self.scheduler.has_work() or self.launched is not None:
            limit -= 1
            assert limit > 0, "sequences starve"
            before = len(self.steps)
            self.step()
            moved = len(self.steps) > before or not self.scheduler.has_work()
            assert moved or self.waits_for_copies(), "the engine stalls"

    def before_launch(self) -> None:
        """No step is launched, and the next one is about to be."""

    def waits_for_copies(self) -> bool:
        """Copies are under way without which there may be nothing to do."""
        return False

    def settle(self) -> None:
        """End whatever is under way beside the steps."""

    def check(self) -> None:
        self.scheduler.check_integrity()

    def _collect(self, emission: Emission) -> None:
        sequence = emission.sequence
        tokens = self.emitted[sequence.request_id]
        assert emission.index == len(tokens)
        tokens.extend(emission.tokens)
        if emission.finish_reason:
            assert sequence.request_id not in self.ended
            self.ended[sequence.request_id] = emission.finish_reason

    def _check_plan(self, plan: StepPlan) -> None:
        rows = plan.rows
        assert len(rows) <= self.config.max_num_seqs
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        decodes = [row.length == 1 and row.samples for row in rows]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        served = {row.sequence for row in rows}
        assert len(served) == len(rows)
        for row in rows:
            assert row.sequence.status is SequenceStatus.RUNNING
            assert row.start + row.length <= len(row.sequence.tokens), "an input is not known"
            assert row.samples == (row.start + row.length == len(row.sequence.tokens))
            assert row.start == row.sequence.num_written
        if len(rows) < self.scheduler.max_num_seqs:
            skipped = [
                sequence.request_id
                for sequence in self.scheduler.running
                if sequence not in served and sequence.num_tokens - sequence.num_computed == 1
            ]
            assert len(skipped) <= self.scheduler.num_blocked, "a decode was skipped"

    def _execute(self) -> None:
        batch, plan = self._batch, self.launched
        assert batch is not None
        assert plan is not None
        size = self.pool.block_size
        for row, context in enumerate(batch.context_lens.tolist()):
            first, last = batch.query_starts[row : row + 2].tolist()
            past = context - (last - first)
            prefix = self.prefixes.root(plan.rows[row].sequence.request.adapter)
            if past:
                table = batch.block_tables[row]
                prefix = self.kv[int(table[(past - 1) // size]) * size + (past - 1) % size]
            for index in range(first, last):
                prefix = self.prefixes.after(prefix, int(batch.token_ids[index]))
                self.kv[int(batch.slots[index])] = prefix
        # Read after all writes: of two rows that share a slot one would be wrong.
        for row, context in enumerate(batch.context_lens.tolist()):
            sequence = plan.rows[row].sequence
            table = batch.block_tables[row].tolist()
            read = [self.kv[table[p // size] * size + p % size] for p in range(context)]
            right = self.prefixes.along(sequence.tokens[:context], sequence.request.adapter)
            assert read == right, f"{sequence.request_id} read wrong KV"
        self._drawn = [
            draw(params.seed, self.kv[int(batch.slots[batch.query_starts[row + 1] - 1])], position)
            for row, position, params in zip(
                batch.sample_rows.tolist(),
                batch.sample_positions.tolist(),
                batch.sampling,
                strict=True,
            )
        ]

    def read(self, blocks: list[int]) -> list[int]:
        """All that these blocks hold."""
        size = self.pool.block_size
        return [self.kv[block * size + offset] for block in blocks for offset in range(size)]

    def move(self, sequence: Sequence, first: int, target: list[int]) -> None:
        """Copy the sequence's blocks from the ``first`` on, as a migration does."""
        size = self.pool.block_size
        source = sequence.block_table[first : first + len(target)]
        for one, other in zip(source, target, strict=True):
            self.kv[other * size : (other + 1) * size] = self.kv[one * size : (one + 1) * size]

    def scribble(self, blocks: list[int]) -> None:
        """Overwrite blocks with garbage, as a remote writer may."""
        size = self.pool.block_size
        for first, count in runs(blocks):
            self.kv[first * size : (first + count) * size] = [GARBAGE] * (count * size)

    def expected(self, request: Request) -> tuple[list[int], FinishReason]:
        """What the request must produce, whoever computes it and how often."""
        params = request.params
        prefix = self.prefixes.along(list(request.prompt), request.adapter)[-1]
        output: list[int] = []
        while True:
            length = len(request.prompt) + len(output)
            token = draw(params.seed, prefix, length)
            output.append(token)
            if token in params.stop_token_ids and len(output) > params.min_tokens:
                return output, FinishReason.STOP
            if len(output) == params.max_tokens or length + 1 == self.config.max_model_len:
                return output, FinishReason.LENGTH
            prefix = self.prefixes.after(prefix, token)
