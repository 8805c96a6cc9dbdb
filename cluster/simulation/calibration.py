"""Measures a model on this machine: steps, copies to host memory, KV over a connection."""

from __future__ import annotations

import asyncio
import queue
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc.aio

from cluster.simulation.profile import LinkCost
from cluster.simulation.profile_fit import CopySample, StepSample, fit_link
from cluster.simulation.scatter import Scatter
from cluster.simulation.scatter_fit import Work, fit_scatter
from instance import wire
from instance.budget import attended
from instance.config import MigrationConfig, SchedulerConfig
from instance.executor import Copier, CopyRun, Executor, KvPool, StepBatch, StepResult
from instance.migration.transports.grpc import CopyStats, send_blocks, write_chunk
from instance.request import Request, Row, SamplingParams, StepPlan
from instance.request import Sequence as LiveSequence
from protos import migration_pb2 as pb
from protos import migration_pb2_grpc

Progress = Callable[[str], None]

_STEP_TIMEOUT = 600.0
_MIB = 1 << 20
_COPIED_BYTES = 512 * _MIB
"""Of the pools, copies touch so many bytes: more than caches hold."""


class CalibrationError(Exception):
    """Something cannot be measured; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Case:
    """A shape of steps to measure.

    Attributes:
        decodes: Rows of one position.
        context: KV positions that each of them has already.
        prefill: Positions of one further row; 0 for no such row.
        start: Where these begin.
    """

    decodes: int = 0
    context: int = 0
    prefill: int = 0
    start: int = 0

    @property
    def tokens(self) -> int:
        """KV positions that the rows reach, a few further steps included."""
        return self.decodes * (self.context + 16) + self.start + self.prefill

    def __str__(self) -> str:
        parts = []
        if self.decodes:
            parts.append(f"{self.decodes} x decode at {self.context}")
        if self.prefill:
            parts.append(f"prefill of {self.prefill} at {self.start}")
        return ", ".join(parts)


def step_cases(limits: SchedulerConfig, max_model_len: int, kv_tokens: int) -> list[Case]:
    """Shapes that an instance with these limits runs, from the smallest to the largest.

    Args:
        limits: Sequences and tokens of a step at most.
        max_model_len: Longest sequence.
        kv_tokens: Size of the KV pool.
    """
    longest = min(limits.max_model_len, max_model_len)
    budget = min(limits.max_num_batched_tokens, longest)
    chunks = sorted({max(2, budget // share) for share in (1, 2, 3, 4, 8, 16, 32, 64)})
    rows = sorted({1, *(max(1, limits.max_num_seqs // share) for share in (1, 2, 4, 8, 16))})
    contexts = sorted({32, 256, 1024, 4096, longest // 2})
    cases = [Case(prefill=chunk) for chunk in chunks]
    cases += [
        Case(prefill=chunk, start=start)
        for start in (512, 2048, 8192)
        for chunk in (max(2, budget // 4), budget)
    ]
    cases += [Case(decodes=count, context=context) for count in rows for context in contexts]
    cases += [
        Case(decodes=count, context=256, prefill=chunk)
        for count in rows[1:4:2]
        for chunk in (max(2, budget // 8), max(2, budget // 2))
        if count + chunk <= limits.max_num_batched_tokens
    ]
    return [
        case
        for case in cases
        if case.tokens <= kv_tokens and max(case.context + 16, case.start + case.prefill) <= longest
    ]


# ---- steps


def run_step(executor: Executor, batch: StepBatch) -> StepResult:
    """Run one step to its end; raises what went wrong."""
    ended: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
    executor.launch(batch, ended.put)
    result = ended.get(timeout=_STEP_TIMEOUT)
    if isinstance(result, BaseException):
        raise result
    return result


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one shape, one after the other.

    Attributes:
        case: The shape.
        sample: The median step.
        seconds: What each took.
    """

    case: Case
    sample: StepSample
    seconds: tuple[float, ...]


def measure_case(executor: Executor, case: Case, repeats: int) -> Measured:
    """Steps of a shape: decode rows grow from step to step, as in service.

    Args:
        executor: Idle; what its KV pool holds is overwritten.
        case: It has to fit the pool.
        repeats: Steps that count; a further one goes before them.
    """
    size = executor.description.block_size
    free = iter(range(1, executor.num_blocks))

    def sequence(tokens: int) -> LiveSequence:
        # The drawn tokens do not matter: prompts of one repeated token will do.
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        made = LiveSequence.start(Request("calibration", (1,) * tokens, params))
        made.block_table = [next(free) for _ in range(-(-tokens // size))]
        return made

    decodes = [sequence(case.context + repeats + 1) for _ in range(case.decodes)]
    prefill = sequence(case.start + case.prefill) if case.prefill else None
    seconds = []
    for turn in range(repeats + 1):
        at = case.context + turn
        rows = [Row(one, at, 1, True) for one in decodes]
        if prefill is not None:
            rows.append(Row(prefill, case.start, case.prefill, True))
        result = run_step(executor, StepBatch.build(StepPlan(turn, rows), size))
        seconds.append(result.duration)
    middle = case.context + repeats // 2 + 2
    sample = StepSample(
        case.prefill,
        attended(case.start, case.prefill),
        case.decodes,
        case.decodes * middle,
        statistics.median(seconds[1:]),
    )
    return Measured(case, sample, tuple(seconds[1:]))


def measure_steps(
    executor: Executor, cases: Sequence[Case], repeats: int, progress: Progress
) -> list[Measured]:
    """Every case; see ``measure_case``."""
    found = []
    for number, case in enumerate(cases, 1):
        found.append(measure_case(executor, case, repeats))
        seconds = found[-1].sample.seconds
        progress(f"step {number}/{len(cases)}: {case}: {1000 * seconds:.2f} ms")
    return found


def step_scatter(measured: Sequence[Measured]) -> Scatter | None:
    """How steps scatter around the median step of their shape: the first that counts of each
    shape, and those that follow."""
    pairs = []
    for one in measured:
        first, *rest = one.seconds
        if rest:
            usual = one.sample.seconds
            pairs.append((Work(first, usual), Work(sum(rest), usual * len(rest))))
    return fit_scatter(pairs)


# ---- copies


def copy_shapes(num_blocks: int) -> list[tuple[int, int]]:
    """(Runs, blocks of each run) of copies to measure, in a pool of so many blocks."""
    wanted = [(1, 1), (1, 4), (1, 16), (1, 64), (1, 256), (4, 16), (16, 1), (16, 4), (64, 1)]
    return [(runs, count) for runs, count in wanted if runs * (count + 1) < num_blocks]


def measure_copies(
    copier: Copier, num_blocks: int, outward: bool, repeats: int, progress: Progress
) -> list[CopySample]:
    """Copies of several shapes between the pool and host memory, one way.

    Args:
        copier: Idle; what the host pool holds, or with copies inward the pool, is overwritten.
        num_blocks: Blocks of the pool.
        outward: To the host pool, not from it.
        repeats: Copies of each shape, of which the fastest counts: what a busy machine adds
            is no property of the copy. A further one goes before them.
        progress: Told each shape's result.

    Raises:
        CalibrationError: if the pools are too small for two shapes.
    """
    limit = min(num_blocks, copier.num_host_blocks, max(80, _COPIED_BYTES // copier.block_bytes))
    shapes = copy_shapes(limit)
    if len(shapes) < 2:
        raise CalibrationError("the KV pools are too small to measure copies")
    # Memory that nothing was written to yet is slow to write and too fast to read.
    for way in (True, False):
        _copy(copier, [CopyRun(1, 1, limit - 1)], way)
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for turn in range(repeats + 1):
        for number, (runs, count) in enumerate(shapes):
            # Elsewhere each time, and one shape after the other: caches would flatter.
            room = limit - runs * (count + 1)
            first = 1 + (turn * 7919 + number * 104_729) % room
            # A block lies between two runs, so that they stay runs.
            starts = [first + index * (count + 1) for index in range(runs)]
            jobs = [CopyRun(start, start, count) for start in starts]
            seconds[runs, count].append(_copy(copier, jobs, outward))
    found = []
    for number, ((runs, count), taken) in enumerate(seconds.items(), 1):
        sample = CopySample(runs, runs * count * copier.block_bytes, max(1e-9, min(taken[1:])))
        side = "to" if outward else "from"
        progress(
            f"copy {number}/{len(shapes)} {side} host memory: {runs} x "
            f"{count * copier.block_bytes / _MIB:.2f} MiB: {_rate(sample)}"
        )
        found.append(sample)
    return found


def _copy(copier: Copier, jobs: Sequence[CopyRun], outward: bool) -> float:
    ended: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
    (copier.copy_out if outward else copier.copy_in)(jobs, ended.put)
    result = ended.get(timeout=_STEP_TIMEOUT)
    if isinstance(result, BaseException):
        raise result
    return result


# ---- the link


class _Sink(migration_pb2_grpc.MigrationServicer):
    """Writes what it is sent into the upper half of the pool, as a destination does."""

    def __init__(self, kv: KvPool, table: Sequence[int]) -> None:
        self._kv = kv
        self._table = table

    async def Copy(
        self, request_iterator: AsyncIterator[pb.KvChunk], context: object
    ) -> pb.CopyReply:
        async for chunk in request_iterator:
            write_chunk(self._kv, chunk, self._table)
        return pb.CopyReply(written=True)


def measure_link(
    kv: KvPool, num_blocks: int, repeats: int, progress: Progress
) -> tuple[LinkCost, list[CopySample]]:
    """KV blocks over a loopback gRPC connection, the way that migrations take.

    Both ends are in this process: two instances that each have a core do better.

    Returns:
        The costs, and what they were fitted to: copies that a reply follows.

    Raises:
        CalibrationError: if the pool is too small.
    """
    half = (num_blocks - 1) // 2
    most = min(half, max(8, 64 * _MIB // kv.block_bytes))
    split = [(runs, count) for runs in (4, 16) for count in (1, 4) if runs * (count + 1) <= half]
    shapes = list(dict.fromkeys([*((1, most // n) for n in (8, 4, 2, 1)), (1, 1), *split]))
    if most < 8:
        raise CalibrationError("the KV pool is too small to measure the link")
    found = asyncio.run(_measure_link(kv, half, shapes, repeats, progress))
    return fit_link(found), found


async def _measure_link(
    kv: KvPool,
    half: int,
    shapes: Sequence[tuple[int, int]],
    repeats: int,
    progress: Progress,
) -> list[CopySample]:
    server = grpc.aio.server(options=wire.SERVER_OPTIONS)
    table = list(range(1 + half, 1 + 2 * half))
    migration_pb2_grpc.add_MigrationServicer_to_server(_Sink(kv, table), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    found = []
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=wire.CHANNEL_OPTIONS
        ) as channel:
            stub = migration_pb2_grpc.MigrationStub(channel)
            seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
            for _ in range(repeats + 1):
                for runs, count in shapes:
                    began = time.perf_counter()
                    await send_blocks(
                        stub,
                        (),
                        kv,
                        attempt="calibration",
                        stage=0,
                        first=0,
                        blocks=list(_spread(runs, count)),
                        chunk_bytes=MigrationConfig().chunk_bytes,
                        share=None,
                        timeout=_STEP_TIMEOUT,
                        stats=CopyStats(),
                    )
                    seconds[runs, count].append(time.perf_counter() - began)
            for number, ((runs, count), taken) in enumerate(seconds.items(), 1):
                sample = CopySample(runs, runs * count * kv.block_bytes, min(taken[1:]))
                progress(
                    f"link {number}/{len(shapes)}: {runs} x "
                    f"{count * kv.block_bytes / _MIB:.2f} MiB: {_rate(sample)}"
                )
                found.append(sample)
    finally:
        await server.stop(None)
    return found


def _spread(runs: int, count: int) -> Iterator[int]:
    for index in range(runs):
        first = 1 + index * (count + 1)
        yield from range(first, first + count)


def _rate(sample: CopySample) -> str:
    rate = sample.num_bytes / sample.seconds / _MIB
    return f"{1e6 * sample.seconds:.0f} us, {rate:.0f} MiB/s"
