"""What changes logits before the draw: bias and penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from instance.executor import Ints, StepBatch


def adjust(logits: Tensor, batch: StepBatch) -> Tensor:
    """Apply logit bias and the penalties of the rows that have them, in this order:

    1. ``logit_bias`` is added.
    2. Repetition: logits of tokens in prompt or output are divided by the penalty where
       positive and multiplied by it where negative (as transformers'
       ``RepetitionPenaltyLogitsProcessor``).
    3. Frequency and presence: ``count * frequency_penalty`` and ``presence_penalty`` are
       taken off the logits of tokens in the output (OpenAI API reference).

    The order is vLLM's. Token ids outside of the vocabulary are left out.

    Args:
        logits: [S, V]; changed in place if of at least single precision.
        batch: Its ``sampling`` and ``token_counts`` give the S rows.

    Returns:
        The logits: a copy in single precision where some row is adjusted and they were of
        less.
    """
    biased = [i for i, params in enumerate(batch.sampling) if params.logit_bias]
    penalized = [i for i, params in enumerate(batch.sampling) if params.penalizes]
    if (biased or penalized) and logits.dtype.itemsize < 4:
        logits = logits.float()
    if biased:
        _add_bias(logits, batch, biased)
    if penalized:
        _penalize(logits, batch, penalized)
    return logits


class _Entries:
    """Some tokens of some rows, as one flat index of a step's logits.

    Args:
        logits: [S, V].
        rows: Rows.
        tokens: Token ids of each row, without doubles; those outside of V are left out.
    """

    def __init__(self, logits: Tensor, rows: Sequence[int], tokens: Sequence[Ints]) -> None:
        self._sizes = [len(one) for one in tokens]
        ids = np.concatenate(tokens)
        self._known = ids < logits.shape[1]
        self._logits = logits
        self.at = (
            torch.from_numpy(np.repeat(rows, self._sizes)[self._known]).to(logits.device),
            torch.from_numpy(ids[self._known]).to(logits.device),
        )

    def values(self, values: Sequence[np.ndarray]) -> Tensor:
        """One figure for each token, given row by row."""
        kept = np.concatenate(values)[self._known]
        return torch.from_numpy(kept).to(self._logits.device, self._logits.dtype)

    def by_row(self, values: Sequence[float]) -> Tensor:
        """One figure for each token, the same within a row."""
        kept = np.repeat(np.asarray(values, dtype=np.float64), self._sizes)[self._known]
        return torch.from_numpy(kept).to(self._logits.device, self._logits.dtype)


def _add_bias(logits: Tensor, batch: StepBatch, rows: list[int]) -> None:
    pairs = [np.array(batch.sampling[i].logit_bias, dtype=np.float64) for i in rows]
    # Token ids are exact in a double.
    entries = _Entries(logits, rows, [one[:, 0].astype(np.int64) for one in pairs])
    logits[entries.at] += entries.values([one[:, 1] for one in pairs])


def _penalize(logits: Tensor, batch: StepBatch, rows: list[int]) -> None:
    params = [batch.sampling[i] for i in rows]
    counted = [batch.token_counts[i] for i in rows]
    entries = _Entries(logits, rows, [tokens for tokens, _ in counted])
    counts = entries.values([outputs for _, outputs in counted])
    repetition = entries.by_row([one.repetition_penalty for one in params])
    values = logits[entries.at]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= entries.by_row([one.frequency_penalty for one in params]) * counts
    values -= entries.by_row([one.presence_penalty for one in params]) * counts.clamp(max=1)
    logits[entries.at] = values
