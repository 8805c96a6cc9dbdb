"""Output that matches a grammar: which tokens are allowed next, by llguidance.

What is allowed is a function of the grammar and the output so far. A matcher is therefore no
part of a request's state: the instance that runs a request, or takes it over, makes one from
the request's text and replays the output, at about a microsecond per token.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llguidance
import llguidance.hf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from instance.executor import GrammarRow, StepBatch
from instance.model.grammar_text import LIMITS, GrammarError, definition, message
from instance.request import Grammar, SamplingParams

logger = logging.getLogger(__name__)

MAX_COMPILED = 256
"""Compiled grammars kept; the least recently used goes first."""
MAX_STATES = 1024
"""Sequences whose matcher is kept, likewise."""


def load_tokenizer(
    folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """The vocabulary of a model folder, as matchers need it; takes a second or so.

    Args:
        folder: Has the tokenizer's files.
        vocab_size: Width of the logits; what the tokenizer lacks of it is never allowed.
        eos_token_ids: At least one.

    Raises:
        GrammarError: There is no tokenizer with a ``tokenizers`` backend.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise GrammarError(f"the model's tokenizer cannot be loaded: {error}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GrammarError("the model has no tokenizer.json")
    known = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    return llguidance.hf.from_tokenizer(
        tokenizer, n_vocab=max(vocab_size, known), eos_token=list(eos_token_ids)
    )


@dataclass(slots=True)
class _State:
    """A sequence's matcher and the output it has seen."""

    grammar: Grammar
    matcher: llguidance.LLMatcher
    output: list[int]


class Grammars:
    """Compiled grammars and matchers of one executor.

    ``prepare`` may be called from any thread; ``restrict`` from one thread at a time.

    Args:
        vocab_size: Width of the logits.
        eos_token_ids: The model's end-of-sequence tokens.
        load: Gives the tokenizer, on the compile thread, when the first grammar comes.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        load: Callable[[], llguidance.LLTokenizer],
    ) -> None:
        self._vocab_size = vocab_size
        self._eos = np.array([one for one in eos_token_ids if one < vocab_size], dtype=np.int64)
        self._load = load
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: collections.OrderedDict[Grammar, llguidance.LLMatcher] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        self._states: collections.OrderedDict[str, _State] = collections.OrderedDict()
        # One thread: grammars that are compiled side by side would take the steps' cores.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- compilation

    def prepare(self, grammar: Grammar, ready: Callable[[str], None]) -> None:
        """Compile a grammar on a thread of its own, unless that is done already.

        Args:
            grammar: As the request has it.
            ready: Called once, here or on that thread, with "" or with what is wrong.
        """
        with self._lock:
            known = grammar in self._compiled
        if known:
            ready("")
        else:
            self._pool.submit(self._prepare, grammar, ready)

    def _prepare(self, grammar: Grammar, ready: Callable[[str], None]) -> None:
        error = ""
        try:
            self._matcher(grammar)
        except GrammarError as problem:
            error = f"the grammar cannot be used: {problem}"
        except Exception as problem:
            logger.exception("a grammar could not be compiled")
            error = f"the grammar could not be compiled: {type(problem).__name__}"
        ready(error)

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """A fresh matcher; raises GrammarError."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled.deep_copy()
        if not len(self._eos):
            raise GrammarError(
                "the model has no end-of-sequence token, so its output cannot be constrained"
            )
        if self._tokenizer is None:
            self._tokenizer = self._load()
        made = llguidance.LLMatcher(
            self._tokenizer, definition(grammar), log_level=0, limits=LIMITS
        )
        if made.is_error():
            raise GrammarError(message(made.get_error()))
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return made.deep_copy()

    # ---- masks

    def restrict(self, logits: Tensor, batch: StepBatch) -> dict[int, str]:
        """Set the logits of tokens that a row's grammar does not allow to -inf, in place.

        Args:
            logits: [S, V].
            batch: Its ``grammars`` name the rows; its ``sampling``, ``num_outputs`` and
                ``stop_token_ids`` have a say in how they may end.

        Returns:
            Rows for which that is not possible, and why; their logits are left alone.
        """
        errors: dict[int, str] = {}
        for i, row in batch.grammars.items():
            try:
                allowed = self._allowed(row)
                ends = np.array(
                    [one for one in batch.stop_token_ids[i] if one < self._vocab_size],
                    dtype=np.int64,
                )
                early = int(batch.num_outputs[i]) < batch.sampling[i].min_tokens
                self._hold_back(allowed, batch.sampling[i], ends if early else self._eos[:0])
            except GrammarError as error:
                errors[i] = f"the output cannot be held to its grammar any more: {error}"
                # Its lexer may be exhausted, and copies share it.
                self._states.pop(row.request_id, None)
                with self._lock:
                    self._compiled.pop(row.grammar, None)
                continue
            denied = torch.from_numpy(~allowed)
            logits[i].masked_fill_(denied.to(logits.device), -torch.inf)
        return errors

    def _hold_back(
        self, allowed: NDArray[np.bool_], params: SamplingParams, early: NDArray[np.int64]
    ) -> None:
        """Withhold tokens that would end the output too soon, if others can follow."""
        without = allowed.copy()
        without[early] = False
        if params.ignore_eos:
            without[self._eos] = False
        if without.any():
            allowed &= without

    def _allowed(self, row: GrammarRow) -> NDArray[np.bool_]:
        """Which tokens may follow the row's output, [V]; raises GrammarError if none may."""
        state = self._state(row)
        matcher = state.matcher
        assert self._tokenizer is not None
        bits = np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        accepts = matcher.is_accepting()
        if matcher.is_error():
            raise GrammarError(message(matcher.get_error()))
        allowed = np.unpackbits(
            bits.view(np.uint8), count=self._vocab_size, bitorder="little"
        ).view(np.bool_)
        allowed[self._eos] = accepts
        if not allowed.any():
            raise GrammarError("no token of the vocabulary can continue the output")
        return allowed

    def _state(self, row: GrammarRow) -> _State:
        """The matcher that has seen exactly the row's output."""
        state = self._states.pop(row.request_id, None)
        if (
            state is None
            or state.grammar != row.grammar
            or row.output[: len(state.output)] != state.output
        ):
            # First draw here, or one after a preemption, a move or a replay.
            state = _State(row.grammar, self._matcher(row.grammar), [])
        missing = row.output[len(state.output) :]
        if missing and not state.matcher.consume_tokens(missing):
            raise GrammarError(message(state.matcher.get_error()))
        state.output = row.output
        self._states[row.request_id] = state
        while len(self._states) > MAX_STATES:
            self._states.popitem(last=False)
        return state
