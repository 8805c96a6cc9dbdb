"""Log-probabilities of drawn and likeliest tokens, for the rows that ask for them."""

from __future__ import annotations

from collections.abc import Callable

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
        self._top = self._logprobs.topk(most, dim=-1)

    def of(self, tokens: Ints) -> dict[int, TokenLogprobs]:
        """Log-probabilities by row of those that ask.

        Args:
            tokens: [S] tokens drawn.
        """
        return self.fetch(torch.from_numpy(tokens))()

    def fetch(self, tokens: Tensor) -> Callable[[], dict[int, TokenLogprobs]]:
        """Begin to copy what is asked for to the host.

        Args:
            tokens: [S] tokens drawn, where the logits are.

        Returns:
            Gives the log-probabilities by row of those that ask; call it when the device has
            done what was launched until now.
        """
        if not self._asked:
            return dict
        asked = list(self._asked.items())
        drawn = tokens[[i for i, _ in asked]][:, None]
        figures = _to_host(self._logprobs.gather(1, drawn)[:, 0].float())
        top, ids = _to_host(self._top.values.float()), _to_host(self._top.indices)

        def read() -> dict[int, TokenLogprobs]:
            rows = zip(asked, figures.tolist(), ids.tolist(), top.tolist(), strict=True)
            return {
                i: TokenLogprobs(figure, tuple(names[:count]), tuple(values[:count]))
                for (i, count), figure, names, values in rows
            }

        return read


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory, once the device has done what was launched until now."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
