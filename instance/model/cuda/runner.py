"""Runs a transformers model on a GPU: the executor of an instance there."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instance.config import EngineConfig
from instance.executor import StepBatch, StepResult
from instance.kv.copier import CudaCopier, TensorCopier
from instance.model.context import forward_context
from instance.model.cuda.attention import TritonAttention
from instance.model.cuda.compiled import compile_layers, share_code
from instance.model.cuda.graphs import DecodeSteps
from instance.model.cuda.inputs import MixedLayout, StepTensors
from instance.model.cuda.memory import largest_batch, measured_blocks
from instance.model.cuda.pool import DeviceKvPool
from instance.model.cuda.sampling import draw
from instance.model.cuda.sizing import graph_buckets, graph_bytes
from instance.model.loader import load_model
from instance.model.logprobs import RawLogprobs
from instance.model.resolve import Progress, resolve_model
from instance.model.sampler import adjusted, needs_adjusting
from instance.model.support import text_config
from instance.model.worker import Done, ModelWorker
from instance.request import TokenLogprobs

SLOTS = 3
"""Steps whose host memory may be in use: one runs, one is launched behind it, one is read."""


class CudaExecutor(ModelWorker):
    """Runs steps on a GPU; an ``Executor``.

    The worker thread launches a step and goes on; a second thread waits for its tokens. A step
    of decodes is a graph, any other is launched piece by piece. Tokens stay on the device for
    the step that follows (``StepBatch.feeds``) and are copied to the host beside it.

    On a model in main memory it does the same without streams and graphs, with Triton's
    interpreter for kernels: that is for tests.

    Args:
        model: As ``load_model`` returned it.
        folder: Has its tokenizer; None where there is none.
        config: Of the instance.

    Raises:
        ValueError: if the kernels do not know the model's type, or no memory is left for KV.
    """

    feeds_back = True

    def __init__(self, model: PreTrainedModel, folder: Path | None, config: EngineConfig) -> None:
        super().__init__(model, folder, config)
        self._device = model.device
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self._heads = text_config(model.config).num_attention_heads
        self._compiled = config.compile
        if config.compile:
            compile_layers(model)
        limits = config.scheduler
        width = -(-self.description.max_model_len // config.block_size)
        # What the latest step drew.
        self._drawn = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=self._device)
        buckets = graph_buckets(limits.max_num_seqs)
        self._decode = DecodeSteps(self._forward, buckets, width, self._device)
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._slots.put(_Slot(self._decode.staging(), limits.max_num_seqs, self._cuda))
        self._attention = self._attend(self._new_kv(2))
        graphs = () if config.enforce_eager else buckets
        self.num_blocks: int = config.num_blocks or self._affordable(config, graphs)
        if self.num_blocks < 2:
            raise ValueError("the KV pool is too small: it needs the null block and one more")
        kv = self._new_kv(self.num_blocks)
        self._attention = self._attend(kv)
        self.kv: DeviceKvPool | None = DeviceKvPool(kv)
        if num_host := config.swap.blocks(self.kv.block_bytes):
            if self._stream is not None:
                self.copier = CudaCopier(kv, num_host, self._stream)
            else:
                self.copier = TensorCopier(kv, num_host)
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="executor-reader", daemon=True)
        if self._stream is not None:
            self._run_largest(config)
            with self._working():
                if config.enforce_eager:
                    self._decode.warm_up()
                else:
                    self._decode.capture(self._stream)
        self._start()
        self._reader.start()

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> CudaExecutor:
        """The executor of the model that ``config`` names; see ``TorchExecutor`` for errors."""
        folder = resolve_model(config.model, progress)
        model = load_model(folder, config.dtype, config.device, progress)
        return cls(model, folder, config)

    def close(self) -> None:
        """End both threads after the launched steps; steps queued behind them are dropped."""
        super().close()
        self._flights.put(None)
        if threading.current_thread() is not self._reader:
            self._reader.join()

    # ---- memory

    def _new_kv(self, num_blocks: int) -> Tensor:
        model = self.description
        shape = model.num_layers, 2, model.block_size, model.num_kv_heads, model.head_dim
        return torch.zeros((num_blocks, *shape), dtype=self._model.dtype, device=self._device)

    def _attend(self, kv: Tensor) -> TritonAttention:
        return TritonAttention(kv, self._heads, len(self._drawn))

    def _affordable(self, config: EngineConfig, graphs: Sequence[int]) -> int:
        """Blocks of the pool where their number is not set."""
        block_bytes = self._new_kv(1).nbytes
        if not self._cuda:
            return config.kv_cache_memory_bytes // block_bytes
        return measured_blocks(
            self._device,
            config.gpu_memory_utilization,
            block_bytes,
            graph_bytes(graphs, self.description.vocab_size),
            lambda: self._run_largest(config),
        )

    def _run_largest(self, config: EngineConfig) -> None:
        """Run a step that takes as much memory as any; kernels are compiled as it runs."""
        limits = config.scheduler
        batch = largest_batch(limits.max_num_batched_tokens, limits.max_num_seqs, config.block_size)
        slot = self._slots.get()
        # What it uses was made on another stream.
        torch.cuda.synchronize(self._device)
        with self._working():
            self._forward(self._lay_out(batch, slot))
        torch.cuda.synchronize(self._device)
        self._slots.put(slot)

    # ---- steps

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """On this thread, work for the model goes to its stream."""
        stream = (
            contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        with stream, torch.inference_mode(), forward_context(self._attention):
            yield

    def _forward(self, step: StepTensors) -> Tensor:
        """[K, V] logits of a step, whose tokens are drawn; nothing waits for the device."""
        self._attention.use(step.attention)
        logits: Tensor = self._model(
            input_ids=step.tokens(self._drawn)[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=0 if step.kept is None else step.kept,
        ).logits[0]
        draw(logits, step.sampling, self._drawn)
        return logits

    def _lay_out(self, batch: StepBatch, slot: _Slot) -> StepTensors:
        layout = MixedLayout(batch, self._attention.block_q)
        memory = slot.memory(layout.size)
        layout.write(memory.numpy())
        return layout.tensors(memory.to(self._device, non_blocking=True))

    def _begin(self) -> None:
        if self._cuda:
            torch.cuda.set_device(self._device)
        if self._compiled:
            share_code()

    def _take(self, batch: StepBatch, done: Done) -> None:
        slot = self._slots.get()
        flight = _Flight(batch, done, slot, _Span(self._stream))
        try:
            self._launch_step(flight)
        except BaseException as error:
            flight.error = error
        # Errors too: answers come in the order of the steps.
        self._flights.put(flight)

    def _launch_step(self, flight: _Flight) -> None:
        batch, slot = flight.batch, flight.slot
        # On the device this would end the process.
        if int(batch.token_ids.max(initial=0)) >= self.description.vocab_size:
            raise IndexError("a token id is out of the range of the vocabulary")
        draws = len(batch.sample_rows)
        with self._working():
            flight.span.begin()
            if self._decode.takes(batch):
                logits, step = self._decode.run(batch, slot.decode)
            else:
                step = self._lay_out(batch, slot)
                logits = self._forward(step)
            logits = logits[:draws]
            raw = RawLogprobs(logits, batch)
            if batch.grammars and self._grammars is not None:
                flight.errors = self._grammars.restrict(logits, batch)
            if batch.grammars or needs_adjusting(batch):
                draw(adjusted(logits, batch), step.sampling, self._drawn)
            drawn = self._drawn[:draws]
            flight.logprobs = raw.fetch(drawn)
            slot.tokens[:draws].copy_(drawn, non_blocking=True)
            flight.span.end()

    def _read(self) -> None:
        self._begin()
        while (flight := self._flights.get()) is not None:
            result: StepResult | BaseException
            try:
                result = flight.result()
            except BaseException as error:
                result = error
            self._slots.put(flight.slot)
            self._answer(flight.batch, flight.done, result)


class _Slot:
    """Host memory of a step from its launch until its tokens are read.

    Attributes:
        decode: For a step of decodes, see ``DecodeSteps.staging``.
        tokens: [rows] what it draws.
    """

    def __init__(self, decode: tuple[Tensor, Tensor], rows: int, pinned: bool) -> None:
        self.decode = decode
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self._memory = self.tokens.new_empty(0)
        self._pinned = pinned

    def memory(self, size: int) -> Tensor:
        """[size] integers for any other step."""
        if size > len(self._memory):
            self._memory = torch.empty(2 * size, dtype=torch.int64, pin_memory=self._pinned)
        return self._memory[:size]


class _Span:
    """How long the device works on a step."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._times = [0.0, 0.0]
        if stream is not None:
            self._began = torch.cuda.Event(enable_timing=True)
            self._ended = torch.cuda.Event(enable_timing=True, blocking=True)

    def begin(self) -> None:
        if self._stream is not None:
            self._began.record(self._stream)
        self._times[0] = time.perf_counter()

    def end(self) -> None:
        if self._stream is not None:
            self._ended.record(self._stream)
        self._times[1] = time.perf_counter()

    def wait(self) -> float:
        """Wait for the end; the seconds."""
        if self._stream is None:
            return self._times[1] - self._times[0]
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000


@dataclass(slots=True)
class _Flight:
    """A step that was launched and has not been answered."""

    batch: StepBatch
    done: Done
    slot: _Slot
    span: _Span
    logprobs: Callable[[], dict[int, TokenLogprobs]] = dict
    errors: dict[int, str] | None = None
    error: BaseException | None = None

    def result(self) -> StepResult:
        """Wait for the device; raises what went wrong."""
        if self.error is not None:
            raise self.error
        seconds = self.span.wait()
        return StepResult(
            tokens=self.slot.tokens[: len(self.batch.sample_rows)].numpy().copy(),
            duration=seconds,
            model_duration=seconds,
            logprobs=self.logprobs(),
            errors=self.errors or {},
        )
