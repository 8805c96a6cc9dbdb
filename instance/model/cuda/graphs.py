"""Decode steps as CUDA graphs: what the CPU would launch a thousand times is launched once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.model.cuda.inputs import DECODE_FIELDS, StepTensors, decode_tensors, write_decode
from instance.model.cuda.sizing import bucket_for

Forward = Callable[[StepTensors], Tensor]
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and libraries take their workspaces."""

logger = logging.getLogger(__name__)


class _Bucket:
    """Static memory of the steps of one size.

    Attributes:
        graph: Its work, captured; None where it is launched anew each time.
        logits: [bucket, V] of the latest step.
    """

    def __init__(self, size: int, tables: Tensor, query_starts: Tensor) -> None:
        self.fields = torch.zeros((DECODE_FIELDS, size), dtype=torch.int64, device=tables.device)
        # All rows are padding until a step comes.
        self.fields[1] = -1
        self.tensors = decode_tensors(self.fields, tables[:size], query_starts)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None


class DecodeSteps:
    """Runs steps of decodes, padded to the next bucket.

    All must happen on one stream, which is current, and inside of the forward context.

    Args:
        forward: Computes the logits of a step, draws its tokens, and returns the logits. It
            must not wait for the device.
        buckets: Batch sizes, rising.
        width: Blocks of a sequence at most.
        device: Of the model.
    """

    def __init__(
        self, forward: Forward, buckets: Sequence[int], width: int, device: torch.device
    ) -> None:
        self._forward = forward
        self._sizes = tuple(buckets)
        most = self._sizes[-1]
        self._tables = torch.zeros((most, width), dtype=torch.int32, device=device)
        starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._buckets = {size: _Bucket(size, self._tables, starts) for size in self._sizes}
        self._pinned = device.type == "cuda"

    def warm_up(self) -> None:
        """Run a step of padding in every bucket, so that its kernels are compiled."""
        for size in reversed(self._sizes):
            self._forward(self._buckets[size].tensors)

    def capture(self, stream: torch.cuda.Stream) -> bool:
        """Capture a graph of every bucket, the largest first; they share their memory.

        Returns:
            False if the model's work cannot be captured; it is launched piece by piece then.
        """
        pool = None
        try:
            for size in reversed(self._sizes):
                bucket = self._buckets[size]
                for _ in range(WARM_UPS):
                    self._forward(bucket.tensors)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    bucket.logits = self._forward(bucket.tensors)
                pool = graph.pool()
                bucket.graph = graph
        except RuntimeError:
            logger.exception("decode steps run without graphs: they cannot be captured")
            for bucket in self._buckets.values():
                bucket.graph = None
            torch.cuda.synchronize()
            return False
        return True

    def staging(self) -> tuple[Tensor, Tensor]:
        """Host memory from which a step can start."""
        most, width = self._tables.shape
        return (
            torch.zeros(DECODE_FIELDS * most, dtype=torch.int64, pin_memory=self._pinned),
            torch.zeros(most * width, dtype=torch.int32, pin_memory=self._pinned),
        )

    def takes(self, batch: StepBatch) -> bool:
        """It is a step of decodes alone, not too large and not too long."""
        rows, width = batch.block_tables.shape
        return (
            batch.num_decodes == rows
            and len(batch.sample_rows) == rows
            and rows <= self._sizes[-1]
            and width <= self._tables.shape[1]
        )

    def run(self, batch: StepBatch, staging: tuple[Tensor, Tensor]) -> tuple[Tensor, StepTensors]:
        """Launch a step.

        Args:
            batch: One that it ``takes``.
            staging: Not in use by an earlier step.

        Returns:
            [bucket, V] logits, which the next step of this size overwrites, and the step.
        """
        rows, width = batch.block_tables.shape
        size = bucket_for(rows, self._sizes)
        assert size is not None
        bucket = self._buckets[size]
        fields, tables = staging
        here = fields[: DECODE_FIELDS * size].view(DECODE_FIELDS, size)
        write_decode(batch, here.numpy())
        bucket.fields.copy_(here, non_blocking=True)
        ids = tables[: rows * width].view(rows, width)
        np.copyto(ids.numpy(), batch.block_tables, casting="same_kind")
        self._tables[:rows, :width].copy_(
            ids.to(self._tables.device, non_blocking=True), non_blocking=True
        )
        if bucket.graph is not None:
            bucket.graph.replay()
        else:
            bucket.logits = self._forward(bucket.tensors)
        assert bucket.logits is not None
        return bucket.logits, bucket.tensors
