"""Where a sequence ends, and whether an instance can run it at all."""

from __future__ import annotations

from instance.config import SchedulerConfig
from instance.kv.blocks import BlockPool
from instance.request import FinishReason, Sequence


class Limits:
    """The bounds that a model, its pool and the settings put on a sequence.

    Args:
        config: Of the scheduler.
        pool: Must hold the KV of any sequence that is taken on.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self._max_model_len = config.max_model_len
        self._pool = pool

    def length(self, sequence: Sequence) -> int:
        """Tokens at which the sequence ends."""
        return min(sequence.num_prompt + sequence.request.params.max_tokens, self._max_model_len)

    def is_last(self, sequence: Sequence) -> bool:
        """Whether the last token allowed is drawn already, known or not."""
        return len(sequence.tokens) + sequence.num_in_flight >= sequence.max_length

    def check(self, sequence: Sequence) -> None:
        """Note where a sequence ends here, or refuse it.

        Raises:
            ValueError: The prompt is empty, no token is left to draw, or the pool is too
                small.
        """
        name = sequence.request_id
        if not sequence.num_prompt:
            raise ValueError(f"request {name} has an empty prompt")
        limit = sequence.max_length = self.length(sequence)
        if len(sequence.tokens) >= limit:
            raise ValueError(
                f"request {name}: no token is left to draw: {len(sequence.tokens)} known, "
                f"at most {limit} by its max_tokens of {sequence.request.params.max_tokens} "
                f"and max_model_len {self._max_model_len}"
            )
        # The last token drawn is never an input, so it needs no KV.
        needed = -(-(limit - 1) // self._pool.block_size)
        if needed > self._pool.num_usable:
            raise ValueError(
                f"request {name}: prompt and output of up to {limit} tokens (max_model_len "
                f"{self._max_model_len}) need {needed} KV blocks, "
                f"the pool has {self._pool.num_usable}"
            )

    def finish_reason(self, sequence: Sequence) -> FinishReason:
        """Whether its newest token ends a sequence, and why."""
        # As in the sampler: stop tokens count once min_tokens came before them. Under a
        # grammar an earlier one is drawn only where nothing else can follow.
        params = sequence.request.params
        if sequence.tokens[-1] in sequence.stop_token_ids and (
            sequence.num_output > params.min_tokens or params.grammar is not None
        ):
            return FinishReason.STOP
        if len(sequence.tokens) >= sequence.max_length:
            return FinishReason.LENGTH
        return FinishReason.NOT_FINISHED
