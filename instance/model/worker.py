"""What every executor of a real model has: the model, its grammars, and a thread for steps."""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from instance.config import EngineConfig
from instance.executor import Copier, ModelDescription, StepBatch, StepResult
from instance.model.loader import describe
from instance.request import Grammar

if TYPE_CHECKING:
    from instance.model.grammar import Grammars

Done = Callable[[StepResult | BaseException], None]

logger = logging.getLogger(__name__)


class ModelWorker:
    """Takes steps on one worker thread, in the order of their launch.

    A step that raises is answered with the exception; the executor itself goes on.

    Args:
        model: As ``load_model`` returned it.
        folder: Has its tokenizer; None where there is none.
        config: Of the instance.

    Attributes:
        description: The static facts of the model.
        copier: Copies KV to host memory and back; None until a subclass has one.
    """

    feeds_back = False

    def __init__(self, model: PreTrainedModel, folder: Path | None, config: EngineConfig) -> None:
        self._model = model
        self._folder = folder
        self.description: ModelDescription = describe(
            model,
            config.served_model_name or Path(config.model).name,
            config.block_size,
            config.scheduler.max_model_len,
        )
        self.copier: Copier | None = None
        self._grammars = _grammars(self.description, folder)
        self._steps: queue.SimpleQueue[tuple[StepBatch, Done] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)

    def launch(self, batch: StepBatch, done: Done) -> None:
        """Queue a step and return at once.

        Raises:
            RuntimeError: after ``close``.
        """
        if self._closed:
            raise RuntimeError("the executor is closed")
        self._steps.put((batch, done))

    def prepare(self, grammar: Grammar, ready: Callable[[str], None]) -> None:
        """Compile a grammar on a thread beside the steps; see ``Executor.prepare``."""
        if self._grammars is None:
            ready("output cannot be held to a grammar: llguidance is not installed here")
        else:
            self._grammars.prepare(grammar, ready)

    def close(self) -> None:
        """End the worker thread after the running step; steps queued behind it are dropped."""
        self._closed = True
        if self._grammars is not None:
            self._grammars.close()
        if self.copier is not None:
            self.copier.close()
        self._steps.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _start(self) -> None:
        """Take steps from now on."""
        self._thread.start()

    def _work(self) -> None:
        self._begin()
        while (step := self._steps.get()) is not None and not self._closed:
            batch, done = step
            try:
                self._take(batch, done)
            except BaseException as error:
                self._answer(batch, done, error)

    def _begin(self) -> None:
        """Set up the worker thread."""

    def _take(self, batch: StepBatch, done: Done) -> None:
        """Run a step and see to it that it is answered."""
        raise NotImplementedError

    def _answer(self, batch: StepBatch, done: Done, result: StepResult | BaseException) -> None:
        try:
            done(result)
        except Exception:
            logger.exception("the callback of step %d failed", batch.number)


def _grammars(model: ModelDescription, folder: Path | None) -> Grammars | None:
    """What holds output to grammars; None where its library or a tokenizer is missing."""
    if folder is None:
        return None
    try:
        from instance.model.grammar import Grammars, load_tokenizer
    except ModuleNotFoundError:
        logger.warning("output cannot be held to grammars: llguidance is not installed")
        return None
    vocab_size, eos = model.vocab_size, model.eos_token_ids
    return Grammars(vocab_size, eos, functools.partial(load_tokenizer, folder, vocab_size, eos))
