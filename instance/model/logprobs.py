"""Log-probabilities of drawn and likeliest tokens, for the rows that ask for them."""

from __future__ import annotations

import torch
from torch import Tensor

from instance.executor import Ints, StepBatch
from instance.request import TokenLogprobs


class RawLogprobs:
    """Log-probabilities of a step before anything changes its logits (what vLLM calls
    ``raw_logprobs``): make it first, ask it for the tokens drawn afterwards.

    Figures are of single precision, as they are sent, also where the model computes in
    double.

    Args:
        logits: [S, V].
        batch: Its ``sampling`` gives the S rows.
    """

    def __init__(self, logits: Tensor, batch: StepBatch) -> None:
        asked = {
            i: params.logprobs
            for i, params in enumerate(batch.sampling)
            if params.logprobs is not None
        }
        self._asked = asked
        if not asked:
            return
        chosen = logits if len(asked) == len(logits) else logits[list(asked)]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self._logprobs = chosen.log_softmax(dim=-1, dtype=dtype)
        most = min(max(asked.values()), logits.shape[1])
        top, ids = self._logprobs.topk(most, dim=-1)
        self._top: list[list[float]] = top.float().tolist()
        self._ids: list[list[int]] = ids.tolist()

    def of(self, tokens: Ints) -> dict[int, TokenLogprobs]:
        """Log-probabilities by row of those that ask.

        Args:
            tokens: [S] tokens drawn.
        """
        if not self._asked:
            return {}
        drawn = torch.from_numpy(tokens[list(self._asked)])[:, None]
        figures: list[float] = (
            self._logprobs.gather(1, drawn.to(self._logprobs.device))[:, 0].float().tolist()
        )
        return {
            i: TokenLogprobs(
                figures[at], tuple(self._ids[at][:count]), tuple(self._top[at][:count])
            )
            for at, (i, count) in enumerate(self._asked.items())
        }
