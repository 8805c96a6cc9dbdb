"""What the requests of a simulation will answer: the one thing that no policy may see."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from cluster.simulation.workloads.records import token_ids
from instance.request import Sequence


class Answers:
    """Output tokens of every request, asked for by the modelled executors alone.

    An answer is drawn token by token; its last one is the end-of-sequence token.

    Args:
        vocab: Ids of ordinary tokens; not empty.
        end_token: The end-of-sequence token, outside ``vocab``.
        seed: Another one makes other contents of the same lengths.
    """

    def __init__(self, vocab: range, end_token: int, seed: int = 0) -> None:
        self._vocab = vocab
        self._end_token = end_token
        self._seed = seed
        self._lengths: dict[str, int] = {}
        self._tokens: dict[str, list[int]] = {}

    def prepare(self, request_id: str, num_tokens: int) -> None:
        """Let a request answer with ``num_tokens`` tokens, at least 1."""
        self._lengths[request_id] = max(1, num_tokens)

    def tokens(self, request_id: str, first: int, count: int) -> SequenceOf[int]:
        """Output tokens from index ``first`` on; ``count`` of them, all within the answer."""
        return self._of(request_id)[first : first + count]

    def token(self, request_id: str, index: int) -> int:
        """The output token at ``index``; beyond the end, and where the request has ended while
        a step still drew for it, the end-of-sequence token again."""
        tokens = self._tokens.get(request_id)
        if tokens is None:
            if request_id not in self._lengths:
                return self._end_token
            tokens = self._of(request_id)
        return tokens[index] if index < len(tokens) else self._end_token

    def ends_at(self, sequence: Sequence) -> int:
        """Tokens of prompt and answer together."""
        return len(sequence.request.prompt) + self._lengths[sequence.request.request_id]

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._tokens.pop(request_id, None)
        self._lengths.pop(request_id, None)

    def _of(self, request_id: str) -> list[int]:
        tokens = self._tokens.get(request_id)
        if tokens is None:
            length = self._lengths[request_id]
            tokens = token_ids(f"answer\0{request_id}", length, self._vocab, self._seed)
            tokens[-1] = self._end_token
            self._tokens[request_id] = tokens
        return tokens
