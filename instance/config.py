"""Settings of one instance. Flags and files that set them live in ``cluster/config.py``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step.

    Attributes:
        max_num_seqs: Sequences in the batch at most.
        max_num_batched_tokens: Token budget of a step.
        max_model_len: Prompt and output tokens of a sequence at most.
        enable_prefix_caching: Reuse full blocks of equal prefixes.
        theta: How far ahead of another a tenant must be, in service by weight, before its
            sequences are preempted for the other's; None: twice what a swap costs.
        priority_interval: Steps between two readings of the tenants' counters at most; a step
            with prefill is followed by one.
        tpot_targets: Seconds that an output token may take, by class; 0, or none: a few times
            a step without prefill. Prefill shares steps as far as they allow.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 8192
    enable_prefix_caching: bool = True
    theta: float | None = None
    priority_interval: int = 8
    tpot_targets: tuple[float, ...] = ()


class SwapMode(enum.StrEnum):
    """Whether steps wait for the copies of preempted sequences.

    AUTO: Only where that is measured to be cheaper.
    ASYNC: Never.
    SYNC: Always.
    """

    AUTO = "auto"
    ASYNC = "async"
    SYNC = "sync"


class PreemptionMode(enum.StrEnum):
    """What becomes of a preempted sequence's KV.

    AUTO: Whichever is measured to be cheaper.
    SWAP: It goes to host memory while there is room.
    RECOMPUTE: It is given up.
    """

    AUTO = "auto"
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class SwapConfig:
    """Swapping of KV to host memory.

    Attributes:
        space_bytes: Host memory for KV; 0 is none.
        num_blocks: Blocks of the host pool; 0 sizes it from ``space_bytes``.
        mode: Whether steps wait for copies.
        preemption: Swap or recompute.
        reuse: Host copies outlive the return of their sequence.
        save: The next victim and finished sequences are copied before anybody waits for it,
            where that is cheap; needs ``reuse`` and prefix caching.
    """

    space_bytes: int = 0
    num_blocks: int = 0
    mode: SwapMode = SwapMode.AUTO
    preemption: PreemptionMode = PreemptionMode.AUTO
    reuse: bool = True
    save: bool = True

    def blocks(self, block_bytes: int) -> int:
        """Blocks of the host pool, its null block included; 0 for none."""
        wanted = self.num_blocks or self.space_bytes // block_bytes
        return wanted if wanted > 1 else 0


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """Limits of live migration.

    Attributes:
        tail_blocks: The last stage, sent while the sequence is out of the batch, holds at
            most this many blocks.
        max_stages: Copy stages before handover at most.
        max_concurrent: Attempts at a time, as source and as destination each.
        reply_timeout: Seconds to wait for an answer before handover, then the attempt ends.
        lease: Seconds that a destination keeps a reservation without hearing of it.
        claim_interval: Seconds between repeats of an unanswered claim.
        grace: Seconds after which a home that is gone counts as dead.
        chunk_bytes: KV bytes per message (256 KiB measured best for gRPC on loopback).
        max_bytes_per_second: Bandwidth share of copies that go on beside decoding; 0 is
            unlimited. Copies cost the steps beside them memory bandwidth and, on CPU, cores.
    """

    tail_blocks: int = 2
    max_stages: int = 8
    max_concurrent: int = 4
    reply_timeout: float = 5.0
    lease: float = 10.0
    claim_interval: float = 0.25
    grace: float = 10.0
    chunk_bytes: int = 256 * 1024
    max_bytes_per_second: float = 256 * 2**20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an instance is started with.

    Attributes:
        model: Local folder, hub id or packaged model name.
        served_model_name: Name under which clients know the model.
        dtype: "auto", "float32", "bfloat16", "float16" or "float64".
        device: "cpu" or "cuda".
        block_size: Tokens per KV block.
        num_blocks: KV blocks; 0 sizes the pool from ``kv_cache_memory_bytes``.
        kv_cache_memory_bytes: Bytes of KV pool on the CPU where ``num_blocks`` is 0.
        gpu_memory_utilization: Share of a GPU's memory that the instance may take; on a GPU
            it sizes the pool where ``num_blocks`` is 0.
        enforce_eager: On a GPU, no graphs.
        compile: On a GPU, the model's layers go through torch.compile.
        num_threads: Compute threads.
        heartbeat: Seconds between reports of held requests to each home.
        report_interval: Seconds between load reports at most.
    """

    model: str = "smollm2"
    served_model_name: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    block_size: int = 16
    num_blocks: int = 0
    kv_cache_memory_bytes: int = 1 << 30
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    compile: bool = False
    num_threads: int = 1
    heartbeat: float = 1.0
    report_interval: float = 0.5
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
