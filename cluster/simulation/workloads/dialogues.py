"""Conversations that were recorded: the lengths of their rounds, or their texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.simulation.workloads.fields import count_in, csv_rows
from cluster.simulation.workloads.generators import Conversation
from cluster.simulation.workloads.records import WorkloadError


def rounds(lines: Iterable[str], name: str) -> list[Conversation]:
    """Conversations of a CSV table of their rounds, in order: conversation, turn,
    num_prefill_tokens (the whole history and the message), num_decode_tokens."""
    wanted = ("conversation", "turn", "num_prefill_tokens", "num_decode_tokens")
    dialogues: dict[str, list[tuple[int, int]]] = {}
    said: dict[str, int] = {}
    last: dict[str, int] = {}
    for where, row in csv_rows(lines, name, wanted):
        key = row["conversation"]
        turns = dialogues.setdefault(key, [])
        number = count_in(row, "turn", where, least=0)
        if turns and number != last[key] + 1:
            raise WorkloadError(f"{where}: turn: {last[key] + 1} is wanted, not {number}")
        last[key] = number
        whole = count_in(row, "num_prefill_tokens", where)
        answer = max(1, count_in(row, "num_decode_tokens", where, least=0))
        message = whole - said.get(key, 0)
        if message < 0:
            raise WorkloadError(f"{where}: num_prefill_tokens: less than was said before")
        turns.append((max(1, message), answer))
        said[key] = whole + answer
    if not dialogues:
        raise WorkloadError(f"{name}: no conversation")
    return list(dialogues.values())


Texts = Sequence[tuple[str, str]]
"""What was asked and answered in each turn."""
_TURNS = ("conversations", "conversation", "messages")
_SPEAKER = ("from", "role")
_TEXT = ("value", "content")
_MODEL = {"gpt", "assistant", "model", "chatgpt", "bing", "bard"}
"""Who answers, in ShareGPT's words and OpenAI's; all others ask."""


def texts(entries: Iterable[Any], name: str) -> list[Texts]:
    """Conversations in ShareGPT's form: objects whose ``conversations`` are a list of ``from``
    and ``value``; OpenAI's ``messages`` of ``role`` and ``content`` will do.

    What is said before an answer is one message, whoever said it. A conversation ends with its
    last answer; one that has none, or begins with one, is not asked that way and left out.
    """
    found: list[Texts] = []
    for number, entry in enumerate(entries, 1):
        where = f"{name}: conversation {number}"
        said = _first_of(entry, _TURNS)
        if not isinstance(said, list):
            raise WorkloadError(f"{where}: no list of {' or '.join(_TURNS)}")
        turns: list[tuple[str, str]] = []
        asked: list[str] = []
        for line in said:
            speaker, text = _first_of(line, _SPEAKER), _first_of(line, _TEXT)
            if not isinstance(speaker, str) or not isinstance(text, str | None):
                raise WorkloadError(
                    f"{where}: {' or '.join(_SPEAKER)} and {' or '.join(_TEXT)} are wanted"
                )
            if speaker not in _MODEL:
                asked.append(text or "")
            elif asked:
                turns.append(("\n".join(asked), text or ""))
                asked = []
            elif turns:  # two answers in a row are one
                question, answer = turns[-1]
                turns[-1] = question, f"{answer}\n{text or ''}"
            else:
                break
        if turns:
            found.append(turns)
    if not found:
        raise WorkloadError(f"{name}: no conversation")
    return found


def _first_of(entry: Any, keys: Sequence[str]) -> Any:
    if not isinstance(entry, Mapping):
        return None
    return next((entry[key] for key in keys if key in entry), None)
