"""The record of one request of a workload, and the token ids of its prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from instance.request import RequestClass


class WorkloadError(ValueError):
    """A workload cannot be read or made; the text is for the user."""


class Span(NamedTuple):
    """A piece of a prompt.

    Two spans of one stream have the same first tokens, so prompts that begin with the same
    spans share that prefix, and the length of the shorter last one of it.

    Attributes:
        stream: Names the content; "" where ``turn`` does.
        length: Tokens, at least 1.
        turn: The output of this turn of the same session; -1 for a piece of another kind.
    """

    stream: str
    length: int
    turn: int = -1


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request, as its client sends it.

    Attributes:
        arrival: Seconds from the start of the workload. Where ``think`` is given this is the
            earliest moment: that of a previous turn which took no time.
        prompt: Its pieces, in order; at least one.
        output_tokens: Tokens that the model answers with, at least 1. Only whoever plays the
            model may look at it before they are there.
        tenant: Who is charged.
        request_class: Priority class.
        group: A label by which reports may tell requests apart.
        session: Conversation that the request belongs to; "" for none.
        turn: Its number there, from 0.
        think: Seconds from the end of the session's previous turn to this request; None
            where it comes at ``arrival``, whatever became of others.
    """

    arrival: float
    prompt: tuple[Span, ...]
    output_tokens: int
    tenant: str = "default"
    request_class: RequestClass = RequestClass.STANDARD
    group: str = ""
    session: str = ""
    turn: int = 0
    think: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, if earlier turns answer with what they should."""
        return sum(span.length for span in self.prompt)


def token_ids(stream: str, length: int, vocab: Sequence[int], seed: int = 0) -> list[int]:
    """The first ``length`` tokens of a stream: a function of its arguments alone.

    Args:
        stream: Name of the content.
        length: Tokens wanted; a longer piece begins with a shorter one.
        vocab: Ids to choose from; not empty.
        seed: Another one makes other content.
    """
    digest = hashlib.shake_128(f"{seed}\0{stream}".encode()).digest(4 * length)
    drawn = np.frombuffer(digest, dtype="<u4").astype(np.int64) % len(vocab)
    if isinstance(vocab, range):
        chosen = vocab.start + vocab.step * drawn
    else:
        chosen = np.asarray(vocab, dtype=np.int64)[drawn]
    ids: list[int] = chosen.tolist()
    return ids


def prompt_ids(
    request: WorkloadRequest,
    vocab: Sequence[int],
    seed: int = 0,
    outputs: Mapping[int, Sequence[int]] | None = None,
) -> list[int]:
    """Token ids of a prompt.

    Args:
        request: Whose prompt.
        vocab: Ids to choose from; not empty.
        seed: Another one makes other prompts, with the same prefixes in common.
        outputs: What earlier turns of the session answered, by turn. Such a piece is then
            put in whole, whatever its length; content of its own stands for one not given.
    """
    ids: list[int] = []
    for span in request.prompt:
        if span.turn >= 0:
            answer = None if outputs is None else outputs.get(span.turn)
            if answer is not None:
                ids.extend(answer)
                continue
            ids += token_ids(f"{request.session}\0answer {span.turn}", span.length, vocab, seed)
        else:
            ids += token_ids(span.stream, span.length, vocab, seed)
    return ids


def by_arrival(requests: Iterable[WorkloadRequest]) -> list[WorkloadRequest]:
    """In order of arrival; turns of a session that may come at once stay in their order."""
    return sorted(requests, key=lambda request: (request.arrival, request.turn))
