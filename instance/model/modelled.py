"""An executor without a model: steps take as long as a cost model says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from instance.clock import Clock, TimerHandle
from instance.executor import Copier, Ints, ModelDescription, StepBatch, StepResult
from instance.model.noise import position_key
from instance.request import Grammar
from instance.step_cost import StepCost


class ModelledExecutor:
    """Answers each step after the time it would take; an ``Executor``.

    Steps run one after the other: a step launched while one runs starts when that one ends.
    Tokens are a function of (seed, position), lie in the vocabulary and are never an
    end-of-sequence token. There is no KV, so ``kv`` is None; a copier copies nothing either.

    ``launch`` and ``done`` run on the clock's thread (the event loop, for a real clock).

    Args:
        description: What to pretend to be.
        num_blocks: KV blocks to pretend to have.
        clock: Real or virtual.
        cost: Durations.
        copier: Answers copies to and from host memory, where there should be any.

    Raises:
        ValueError: if every token of the vocabulary ends a sequence.
    """

    kv: None = None
    feeds_back = False

    def __init__(
        self,
        description: ModelDescription,
        num_blocks: int,
        clock: Clock,
        cost: StepCost,
        copier: Copier | None = None,
    ) -> None:
        self.description = description
        self.num_blocks = num_blocks
        self.copier = copier
        self._clock = clock
        self._cost = cost
        eos = set(description.eos_token_ids)
        self._drawable = [token for token in range(description.vocab_size) if token not in eos]
        if not self._drawable:
            raise ValueError("the vocabulary has nothing but end-of-sequence tokens")
        self._free_at = clock.now()
        self._closed = False
        self._timers: dict[int, TimerHandle] = {}
        self._launched = 0

    def launch(self, batch: StepBatch, done: Callable[[StepResult | BaseException], None]) -> None:
        """Queue a step and return at once.

        Raises:
            RuntimeError: after ``close``.
        """
        if self._closed:
            raise RuntimeError("the executor is closed")
        duration = self._cost.seconds(batch)
        now = self._clock.now()
        self._free_at = max(now, self._free_at) + duration
        number = self._launched
        self._launched += 1

        def end() -> None:
            self._timers.pop(number, None)
            done(StepResult(self._tokens(batch), duration, duration))

        self._timers[number] = self._clock.call_later(self._free_at - now, end)

    def prepare(self, grammar: Grammar, ready: Callable[[str], None]) -> None:
        """Refuse: the tokens are not text."""
        ready("this instance has no model: it cannot hold its output to a grammar")

    def close(self) -> None:
        """Abandon the launched steps."""
        self._closed = True
        if self.copier is not None:
            self.copier.close()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _tokens(self, batch: StepBatch) -> Ints:
        drawn = [
            self._drawable[position_key(params.seed, int(position)) % len(self._drawable)]
            for params, position in zip(batch.sampling, batch.sample_positions, strict=True)
        ]
        return np.array(drawn, dtype=np.int64)
