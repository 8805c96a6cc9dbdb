"""What a device can do at best, and its kernels and copies beside that."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_model import SHAPES, Size
from bench.report import median
from instance.executor import CopyRun
from instance.model.context import AttentionOptions

RUNS = (1, 2, 4, 8, 16, 64)
"""Blocks in a run of a copy."""


def seconds_of(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Seconds that the device takes for a call, the median of some."""
    call()
    call()
    if device == "cpu":
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return median(found)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return median(times) / 1000


def copy_bandwidth(size: Size) -> float:
    """Bytes that the device reads and writes per second in a plain copy of its memory."""
    source = torch.ones(size.copied, dtype=torch.uint8, device=size.device)
    target = torch.empty_like(source)
    return 2 * size.copied / seconds_of(lambda: target.copy_(source), size.device)


def matrix_peak(size: Size) -> float:
    """Operations per second of a large matrix product of the model's type."""
    side = 8192 if size.device == "cuda" else 128
    one = torch.randn(side, side, dtype=size.dtype, device=size.device)
    other = torch.randn(side, side, dtype=size.dtype, device=size.device)
    out = torch.empty_like(one)
    return 2 * side**3 / seconds_of(lambda: torch.mm(one, other, out=out), size.device)


def attention(size: Size, rows: int, context: int, bandwidth: float) -> dict[str, Any]:
    """Decode attention of one layer alone, and the same by gathering and torch's own.

    Args:
        size: Shape and device.
        rows: Decoding sequences.
        context: Tokens of each.
        bandwidth: Of the device, see ``copy_bandwidth``.
    """
    from instance.model.cuda.attention import AttentionStep, TritonAttention

    sizes = SHAPES[size.shape][1]
    heads, kv_heads, dim = (
        sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    # So many layers that none is in a cache when its turn comes again.
    layers = 4 if size.device == "cuda" else 1
    width = -(-context // 16)
    shape = (1 + rows * width, layers, 2, 16, kv_heads, dim)
    kv = torch.randn(shape, dtype=size.dtype, device=size.device)
    backend = TritonAttention(kv, heads, rows)
    order = torch.randperm(rows * width, generator=torch.Generator().manual_seed(0))
    tables = (1 + order).view(rows, width).to(size.device)
    lens = torch.full((rows,), context, device=size.device)
    last = tables[:, (context - 1) // 16] * 16 + (context - 1) % 16
    starts = torch.arange(rows + 1, device=size.device)
    backend.use(AttentionStep(last, tables, lens, starts, rows, None))
    query = torch.randn(1, heads, rows, dim, dtype=size.dtype, device=size.device)
    new = torch.randn(2, 1, kv_heads, rows, dim, dtype=size.dtype, device=size.device)
    options = AttentionOptions(dim**-0.5)
    found: dict[int, Tensor] = {}

    def attend() -> None:
        for layer in range(layers):
            found[layer] = backend.attend(layer, query, new[0], new[1], options)

    ours = seconds_of(_captured(attend, size.device), size.device) / layers
    read = rows * context * 2 * kv_heads * dim * kv.element_size()
    result: dict[str, Any] = {
        "rows": rows,
        "context": context,
        "seconds": ours,
        "bytes_per_second": read / ours,
        "share_of_roofline": read / ours / bandwidth,
    }
    blocks = tables.flatten()
    try:
        other, theirs = _gathered(kv, blocks, query, rows, context, size.device)
    except Exception as error:
        result["gathered"] = f"not run: {type(error).__name__}: {error}"
        return result
    result["gathered_seconds"] = theirs
    result["times_faster_than_gathered"] = theirs / ours
    difference = (found[0][0].float() - other.float()).abs().max()
    result["largest_difference"] = float(difference)
    return result


def _captured(call: Callable[[], None], device: str) -> Callable[[], None]:
    """The call as a graph, so that what is timed is not its launch."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _gathered(
    kv: Tensor, blocks: Tensor, query: Tensor, rows: int, context: int, device: str
) -> tuple[Tensor, float]:
    """[rows, heads, dim] of layer 0 by a gather and torch's attention, and the seconds."""
    kv_heads, dim = kv.shape[4:]
    padded = len(blocks) * 16 // rows
    asked = query[0].transpose(0, 1).contiguous()
    spread = torch.arange(rows + 1, dtype=torch.int32, device=device)
    pair = torch.empty((2, len(blocks), 16, kv_heads, dim), dtype=kv.dtype, device=device)

    def gather() -> tuple[Tensor, Tensor]:
        for part in range(2):
            torch.index_select(kv[:, 0, part], 0, blocks, out=pair[part])
        if padded == context:
            flat = pair.view(2, rows * padded, kv_heads, dim)
        else:
            flat = pair.view(2, rows, padded, kv_heads, dim)[:, :, :context].flatten(1, 2)
        return flat[0], flat[1]

    if device == "cpu":

        def attend() -> Tensor:
            key, value = (one.view(rows, context, kv_heads, dim) for one in gather())
            out: Tensor = torch.nn.functional.scaled_dot_product_attention(
                asked[:, :, None], key.transpose(1, 2), value.transpose(1, 2), enable_gqa=True
            )
            return out[:, :, 0]
    else:
        from torch.nn.attention.varlen import varlen_attn

        group = query.shape[1] // kv_heads

        def attend() -> Tensor:
            key, value = gather()
            # The heads of a group as queries of their KV head, so that K is not repeated.
            folded = asked.view(rows, kv_heads, group, dim).transpose(1, 2)
            folded = folded.reshape(rows * group, kv_heads, dim)
            out = varlen_attn(folded, key, value, spread * group, spread * context, group, context)
            assert isinstance(out, Tensor)
            return out.view(rows, group, kv_heads, dim).transpose(1, 2).flatten(1, 2)

    out = attend()
    return out, seconds_of(attend, device)


def copies(size: Size) -> dict[str, Any]:
    """Copies of KV to the host and back, by the length of their runs, beside a plain one."""
    from instance.kv.copier import CudaCopier, PinnedMemory, TensorCopier

    sizes = SHAPES[size.shape][1]
    layers, kv_heads, dim = (
        sizes[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    )
    block = (layers, 2, 16, kv_heads, dim)
    block_bytes = int(np.prod(block)) * size.dtype.itemsize
    count = max(2 * RUNS[-1], min(size.copied, 256 << 20) // block_bytes)
    kv = torch.zeros((2 * count + 1, *block), dtype=size.dtype, device=size.device)
    total = count * block_bytes
    copier: Any
    if size.device == "cuda":
        memory = PinnedMemory(total)
        plain, theirs = memory.tensor, kv[:count].view(-1).view(torch.uint8)
        rates = {
            "out": total / seconds_of(lambda: plain.copy_(theirs, non_blocking=True), "cuda"),
            "in": total / seconds_of(lambda: theirs.copy_(plain, non_blocking=True), "cuda"),
        }
        memory.close()
        copier = CudaCopier(kv, 2 * count + 1)
    else:
        host = torch.empty_like(kv[:count])
        rate = total / seconds_of(lambda: host.copy_(kv[:count]), "cpu")
        rates = {"out": rate, "in": rate}
        copier = TensorCopier(kv, 2 * count + 1)

    def measured(outward: bool, length: int) -> float:
        # Every second run, so that no two of them are one.
        jobs = [CopyRun(1 + 2 * at, 1 + 2 * at, length) for at in range(0, count - length, length)]
        issue = copier.copy_out if outward else copier.copy_in
        found = []
        for _ in range(5):
            ended: concurrent.futures.Future[float | BaseException] = concurrent.futures.Future()
            issue(jobs, ended.set_result)
            seconds = ended.result()
            if isinstance(seconds, BaseException):
                raise seconds
            found.append(len(jobs) * length * block_bytes / seconds)
        return median(found)

    try:
        rows = [
            {
                "run_bytes": length * block_bytes,
                **{way: measured(way == "out", length) / rate for way, rate in rates.items()},
            }
            for length in RUNS
        ]
    finally:
        copier.close()
    return {"plain_bytes_per_second": rates, "share_of_plain_by_run": rows}
