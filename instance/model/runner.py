"""Runs a transformers model: the executor of a real instance."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from instance.config import EngineConfig
from instance.executor import Copier, ModelDescription, StepBatch, StepResult
from instance.kv.copier import TensorCopier, TensorKvPool
from instance.model.attention import make_attention
from instance.model.context import forward_context
from instance.model.grammar import Grammars, load_tokenizer
from instance.model.loader import describe, load_model
from instance.model.logprobs import RawLogprobs
from instance.model.resolve import Progress, resolve_model
from instance.model.sampler import sample
from instance.model.support import text_config
from instance.request import Grammar

Done = Callable[[StepResult | BaseException], None]

logger = logging.getLogger(__name__)


class TorchExecutor:
    """Runs steps on one worker thread, in the order of their launch; an ``Executor``.

    The step's rows, decode and prefill alike, ride in one forward pass of shape [1, T]; the
    output head sees the sampled positions only. ``done`` is called on the worker thread. A
    step that raises is answered with the exception; the executor itself goes on.

    Args:
        config: Model, dtype, pool size and threads.
        progress: Told what the start is at: "converting", "loading weights", "warming up".

    Raises:
        ModelNotFoundError: if there is no such model.
        UnsupportedModelError: if the model would be wrong.
        ValueError: if a setting makes no sense, or the pool is too small for two blocks.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        if config.device != "cpu":
            raise ValueError(f"device must be 'cpu', not {config.device!r}")
        folder = resolve_model(config.model, progress)
        self._model = load_model(folder, config.dtype, config.device, progress)
        self.description: ModelDescription = describe(
            self._model,
            config.served_model_name or Path(config.model).name,
            config.block_size,
            config.scheduler.max_model_len,
        )
        self.num_blocks: int = _num_blocks(config, self._model.dtype, self.description)
        self._kv = torch.zeros(
            (
                self.num_blocks,
                self.description.num_layers,
                2,
                config.block_size,
                self.description.num_kv_heads,
                self.description.head_dim,
            ),
            dtype=self._model.dtype,
        )
        self._grammars = Grammars(
            self.description.vocab_size,
            self.description.eos_token_ids,
            functools.partial(
                load_tokenizer,
                folder,
                self.description.vocab_size,
                self.description.eos_token_ids,
            ),
        )
        heads = text_config(self._model.config).num_attention_heads
        self._attention = make_attention(self._kv, heads)
        kv = TensorKvPool(self._kv, self._attention.written)
        self.kv: TensorKvPool | None = kv
        self.copier: Copier | None = None
        if num_host := config.swap.blocks(kv.block_bytes):
            self.copier = TensorCopier(self._kv, num_host, self._attention.written)
        self._steps: queue.SimpleQueue[tuple[StepBatch, Done] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(
            target=self._work, args=(config.num_threads,), name="executor", daemon=True
        )
        self._thread.start()

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
        self._grammars.prepare(grammar, ready)

    def close(self) -> None:
        """End the worker thread after the running step; steps queued behind it are dropped."""
        self._closed = True
        self._grammars.close()
        if self.copier is not None:
            self.copier.close()
        self._steps.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self, num_threads: int) -> None:
        # Holds for the calling thread only.
        torch.set_num_threads(num_threads)
        while (step := self._steps.get()) is not None and not self._closed:
            batch, done = step
            result: StepResult | BaseException
            try:
                result = self._run(batch)
            except BaseException as error:
                result = error
            try:
                done(result)
            except Exception:
                logger.exception("the callback of step %d failed", batch.number)

    def _run(self, batch: StepBatch) -> StepResult:
        began = time.perf_counter()
        sampled = batch.query_starts[batch.sample_rows + 1] - 1
        # A step of prefill chunks alone samples nothing, but a head needs a row.
        kept = sampled if len(sampled) > 0 else batch.query_starts[1:2] - 1
        with torch.inference_mode(), forward_context(self._attention):
            self._attention.prepare(batch)
            launched = time.perf_counter()
            logits = self._model(
                input_ids=torch.from_numpy(batch.token_ids)[None],
                position_ids=torch.from_numpy(batch.positions)[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(kept),
            ).logits[0]
            computed = time.perf_counter()
            logits = logits[: len(sampled)]
            raw = RawLogprobs(logits, batch)
            errors = self._grammars.restrict(logits, batch) if batch.grammars else {}
            tokens = sample(logits, batch)
            logprobs = raw.of(tokens)
        return StepResult(
            tokens=tokens,
            duration=time.perf_counter() - began,
            model_duration=computed - launched,
            logprobs=logprobs,
            errors=errors,
        )


def _num_blocks(config: EngineConfig, dtype: torch.dtype, model: ModelDescription) -> int:
    if config.num_blocks > 0:
        num_blocks = config.num_blocks
    else:
        values = 2 * model.num_layers * model.num_kv_heads * model.head_dim * config.block_size
        num_blocks = config.kv_cache_memory_bytes // (values * dtype.itemsize)
    if num_blocks < 2:
        raise ValueError("the KV pool is too small: it needs the null block and one more")
    return num_blocks
