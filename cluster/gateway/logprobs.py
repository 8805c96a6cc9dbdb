"""Log-probabilities as the OpenAI API shapes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from instance.request import TokenLogprobs

LEAST = -9999.0
"""Stands for minus infinity, which JSON has not (as in vLLM)."""


class Scored(NamedTuple):
    """An output token with its log-probabilities; ``offset`` is where in the text, in
    characters, it begins."""

    token: int
    offset: int
    logprobs: TokenLogprobs


class LogprobsFormat:
    """The ``logprobs`` of a choice, in the form of chats or of completions.

    There is an entry for each token that counts as output, one that stopped the sequence
    included (as in vLLM).

    Args:
        chat: For chat completions; otherwise for completions.
        token_bytes: Bytes of a token.
    """

    def __init__(self, chat: bool, token_bytes: Callable[[int], bytes]) -> None:
        self._chat = chat
        self._token_bytes = token_bytes

    def render(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """The object for these tokens, ready for JSON."""
        if self._chat:
            return {"content": [self._content(one) for one in scored], "refusal": None}
        return {
            "tokens": [self._text(one.token) for one in scored],
            "token_logprobs": [max(one.logprobs.logprob, LEAST) for one in scored],
            "top_logprobs": [self._likeliest(one) for one in scored],
            "text_offset": [one.offset for one in scored],
        }

    def _text(self, token: int) -> str:
        return self._token_bytes(token).decode("utf-8", "replace")

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._token_bytes(token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST),
            "bytes": list(raw),
        }

    def _content(self, one: Scored) -> dict[str, Any]:
        _, ids, figures = one.logprobs
        return {
            **self._entry(one.token, one.logprobs.logprob),
            "top_logprobs": [
                self._entry(token, figure) for token, figure in zip(ids, figures, strict=True)
            ],
        }

    def _likeliest(self, one: Scored) -> dict[str, float]:
        """The token drawn, then the likeliest: one more where it is not among them."""
        drawn, ids, figures = one.logprobs
        entries = {self._text(one.token): max(drawn, LEAST)}
        for token, figure in zip(ids, figures, strict=True):
            entries.setdefault(self._text(token), max(figure, LEAST))
        return entries
