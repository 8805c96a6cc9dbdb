"""How long a step takes: the one formula behind modelled executors and cost profiles."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isfinite

import numpy as np

from instance.executor import StepBatch


@dataclass(frozen=True, slots=True)
class StepCost:
    """Cost of a step, all in seconds but the last.

    A step reads all weights, whatever it computes: while that takes longer than the
    arithmetic, further tokens cost next to nothing. ``hidden_tokens`` says how many those are.

    Attributes:
        base: Per step.
        prefill_token: Per position of a row that has several.
        decode_sequence: Per row that has one position.
        context_token: Per KV position that a decode row reads.
        prefill_context: Per KV position that a position of prefill attends to.
        hidden_tokens: Tokens of a step, decode rows counted first, whose prefill costs
            nothing beyond ``base``.

    Raises:
        ValueError: if one is negative or not finite.
    """

    base: float = 0.02
    prefill_token: float = 0.0005
    decode_sequence: float = 0.001
    context_token: float = 1e-6
    prefill_context: float = 0.0
    hidden_tokens: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not isfinite(value) or value < 0:
                raise ValueError(f"{one.name}: {value} is not a cost")

    def of(self, prefill: int, prefill_context: int, decodes: int, decode_context: int) -> float:
        """Duration of a step in seconds.

        Args:
            prefill: Positions of rows that have several.
            prefill_context: Positions that these attend to, summed; see
                ``instance.budget.attended``.
            decodes: Rows of one position.
            decode_context: KV positions that these read, summed.
        """
        seconds = self.base + self.decode_sequence * decodes + self.context_token * decode_context
        if prefill:
            hidden = self.hidden_tokens - decodes
            seconds += self.prefill_context * prefill_context
            if hidden <= 0:
                seconds += self.prefill_token * prefill
            elif prefill > hidden:
                seconds += self.prefill_token * (prefill - hidden)
        return seconds

    def decodes_end(
        self,
        began: float,
        rows: int,
        context: int,
        steps: int,
        end: Callable[[float, float], float] = operator.add,
    ) -> list[float]:
        """When each of ``steps`` steps in a row ends that decode the same rows.

        Args:
            began: When the first of them begins.
            rows: Of every step.
            context: KV positions that the first step reads; each row reads one more in the
                next.
            end: When a step ends, of when it begins and its duration.
        """
        fixed, token = self.base + self.decode_sequence * rows, self.context_token
        ends = itertools.accumulate(
            (fixed + token * read for read in itertools.count(context, rows)), end, initial=began
        )
        next(ends)
        return list(itertools.islice(ends, steps))

    def seconds(self, batch: StepBatch) -> float:
        """Duration of a step in seconds."""
        counts = np.diff(batch.query_starts)
        decodes = counts == 1
        chunks, starts = counts[~decodes], (batch.context_lens - counts)[~decodes]
        return self.of(
            int(chunks.sum()),
            int((chunks * starts + chunks * (chunks + 1) // 2).sum()),
            int(np.count_nonzero(decodes)),
            int(batch.context_lens[decodes].sum()),
        )
