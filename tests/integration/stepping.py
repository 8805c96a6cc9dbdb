"""Drives an executor with hand-made plans: blocks at random, prefill in chunks."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Sequence as Seq

from instance.executor import Executor, StepBatch, StepResult
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan


def run_batch(executor: Executor, batch: StepBatch) -> StepResult:
    """Run one step to its end; raises what the executor answered with."""
    ended: concurrent.futures.Future[StepResult] = concurrent.futures.Future()

    def done(result: StepResult | BaseException) -> None:
        if isinstance(result, BaseException):
            ended.set_exception(result)
        else:
            ended.set_result(result)

    executor.launch(batch, done)
    return ended.result(timeout=60)


class Stepper:
    """Decodes come first, then prefill chunks up to ``chunk`` tokens per row.

    Blocks are handed out one by one from a shuffled list, so tables are scattered.
    """

    def __init__(self, executor: Executor, chunk: int = 16, seed: int = 0) -> None:
        self.executor = executor
        self.chunk = chunk
        self.sequences: list[Sequence] = []
        self.steps = 0
        self._free = list(range(1, executor.num_blocks))
        random.Random(seed).shuffle(self._free)

    def add(self, prompt: Seq[int], params: SamplingParams) -> Sequence:
        request = Request(f"r{len(self.sequences)}", tuple(prompt), params)
        sequence = Sequence.start(request)
        self.sequences.append(sequence)
        return sequence

    def move(self, sequence: Sequence) -> None:
        """Copy a sequence's KV to other blocks and spoil the old ones."""
        kv = self.executor.kv
        assert kv is not None
        old = sequence.block_table
        new = [self._free.pop() for _ in old]
        for source, destination in zip(old, new, strict=True):
            kv.write(destination, 0, bytes(kv.read(source, 1)))
            # All ones are a NaN in every float format.
            kv.write(source, 0, b"\xff" * kv.block_bytes)
        sequence.block_table = new
        self._free[:0] = old

    def finish(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self._free[:0] = sequence.block_table

    def step(self) -> None:
        """Run one step over every unfinished sequence."""
        size = self.executor.description.block_size
        decodes, prefills = [], []
        for sequence in self.sequences:
            if sequence.num_output >= sequence.request.params.max_tokens:
                continue
            left = len(sequence.tokens) - sequence.num_computed
            count = min(left, self.chunk)
            while len(sequence.block_table) * size < sequence.num_computed + count:
                sequence.block_table.append(self._free.pop())
            row = Row(sequence, sequence.num_computed, count, count == left)
            (decodes if left == 1 else prefills).append(row)
        plan = StepPlan(self.steps, decodes + prefills)
        self.steps += 1
        result = run_batch(self.executor, StepBatch.build(plan, size))
        tokens = iter(result.tokens.tolist())
        for row in plan.rows:
            row.sequence.num_computed += row.length
            if row.samples:
                row.sequence.tokens.append(next(tokens))
        assert next(tokens, None) is None

    def run(self) -> None:
        """Step until every sequence has all its tokens."""
        while any(s.num_output < s.request.params.max_tokens for s in self.sequences):
            self.step()
