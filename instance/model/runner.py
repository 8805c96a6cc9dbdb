"""Runs a transformers model: the executor of a real instance."""

from __future__ import annotations

import time

import torch

from instance.config import EngineConfig
from instance.executor import Executor, ModelDescription, StepBatch, StepResult
from instance.kv.copier import TensorCopier, TensorKvPool
from instance.model.attention import make_attention
from instance.model.context import forward_context
from instance.model.loader import load_model
from instance.model.logprobs import RawLogprobs
from instance.model.resolve import Progress, resolve_model
from instance.model.sampler import sample
from instance.model.support import text_config
from instance.model.worker import Done, ModelWorker


def make_executor(config: EngineConfig, progress: Progress | None = None) -> Executor:
    """The executor of a device; see ``TorchExecutor`` for arguments and errors.

    Raises:
        ValueError: also if there is no such device.
    """
    if config.device != "cuda":
        return TorchExecutor(config, progress)
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU")
    from instance.model.cuda.runner import CudaExecutor

    return CudaExecutor.load(config, progress)


class TorchExecutor(ModelWorker):
    """Runs steps on the CPU; an ``Executor``.

    The step's rows, decode and prefill alike, ride in one forward pass of shape [1, T]; the
    output head sees the sampled positions only. ``done`` is called on the worker thread.

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
            raise ValueError(f"device must be 'cpu' or 'cuda', not {config.device!r}")
        folder = resolve_model(config.model, progress)
        model = load_model(folder, config.dtype, config.device, progress)
        super().__init__(model, folder, config)
        self.num_blocks: int = _num_blocks(config, model.dtype, self.description)
        self._num_threads = config.num_threads
        self._kv = torch.zeros(
            (
                self.num_blocks,
                self.description.num_layers,
                2,
                config.block_size,
                self.description.num_kv_heads,
                self.description.head_dim,
            ),
            dtype=model.dtype,
        )
        self._attention = make_attention(self._kv, text_config(model.config).num_attention_heads)
        kv = TensorKvPool(self._kv, self._attention.written)
        self.kv: TensorKvPool | None = kv
        if num_host := config.swap.blocks(kv.block_bytes):
            self.copier = TensorCopier(self._kv, num_host, self._attention.written)
        self._start()

    def _begin(self) -> None:
        # Holds for the calling thread only.
        torch.set_num_threads(self._num_threads)

    def _take(self, batch: StepBatch, done: Done) -> None:
        self._answer(batch, done, self._run(batch))

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
            errors = {}
            if batch.grammars and self._grammars is not None:
                errors = self._grammars.restrict(logits, batch)
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
