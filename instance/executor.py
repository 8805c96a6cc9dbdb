"""What runs a step: the interface between the engine and a model on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from instance.request import Grammar, SamplingParams, StepPlan, TokenLogprobs

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Static facts of a loaded model and of its KV blocks.

    A block is ``[num_layers, 2, block_size, num_kv_heads, head_dim]`` of ``dtype``.
    """

    name: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    adapter: str = ""
    num_shards: int = 1

    @property
    def kv_salt(self) -> bytes:
        """What KV depends on besides tokens: roots the hashes of blocks."""
        return f"{self.name}\0{self.adapter}\0{self.dtype}".encode()


class GrammarRow(NamedTuple):
    """A draw that a grammar restricts: what is allowed is a function of it and the output.

    Attributes:
        request_id: Finds the state that an earlier step left; it need not exist.
        grammar: What the output must match.
        output: Output tokens before the draw.
    """

    request_id: str
    grammar: Grammar
    output: list[int]


@dataclass(slots=True)
class StepBatch:
    """The arrays of one step, ready for a device. R rows, T positions, S draws.

    Attributes:
        number: Step number, increasing.
        token_ids: [T] input tokens.
        positions: [T] their positions in their sequence.
        slots: [T] where their KV goes: block id * block_size + offset.
        query_starts: [R + 1] row r owns positions query_starts[r]:query_starts[r + 1].
        context_lens: [R] KV length of the row after this step.
        block_tables: [R, W] block ids, padded with the null block 0.
        num_decodes: Leading rows that have one position.
        sample_rows: [S] rows whose last position is sampled.
        sample_positions: [S] position of the token drawn.
        num_outputs: [S] output tokens before the draw (for ``min_tokens``).
        sampling: [S] parameters.
        stop_token_ids: [S] tokens masked while ``num_outputs < min_tokens``.
        token_counts: For draws with penalties, by index in ``sample_rows``: the distinct
            tokens before the draw, and how often each is in the output.
        grammars: Draws that a grammar restricts, by index in ``sample_rows``.
        feeds: Tokens that the step launched just before draws: by index in ``token_ids``, the
            index of the draw there.
    """

    number: int
    token_ids: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    context_lens: Ints
    block_tables: Ints
    num_decodes: int
    sample_rows: Ints
    sample_positions: Ints
    num_outputs: Ints
    sampling: list[SamplingParams]
    stop_token_ids: list[frozenset[int]]
    token_counts: dict[int, tuple[Ints, Ints]] = field(default_factory=dict)
    grammars: dict[int, GrammarRow] = field(default_factory=dict)
    feeds: dict[int, int] = field(default_factory=dict)

    @classmethod
    def build(cls, plan: StepPlan, block_size: int, before: StepPlan | None = None) -> StepBatch:
        """Lay out a plan.

        Args:
            plan: All its tokens are known, but for those that ``before`` draws.
            block_size: Tokens per block.
            before: The plan launched last, if it has not ended.
        """
        rows = plan.rows
        counts = np.array([row.length for row in rows], dtype=np.int64)
        query_starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_starts[1:])
        starts = np.array([row.start for row in rows], dtype=np.int64)
        context_lens = starts + counts
        width = max(1, int(-(-context_lens.max(initial=0) // block_size)))
        block_tables = np.zeros((len(rows), width), dtype=np.int64)
        token_ids = np.empty(int(query_starts[-1]), dtype=np.int64)
        drawn = {} if before is None else before.draws()
        feeds: dict[int, int] = {}
        for index, row in enumerate(rows):
            needed = -(-(row.start + row.length) // block_size)
            block_tables[index, :needed] = row.sequence.block_table[:needed]
            first = query_starts[index]
            known = row.sequence.tokens[row.start : row.start + row.length]
            token_ids[first : first + len(known)] = known
            if len(known) < row.length:
                # At most the last one: a step draws one token of a sequence.
                feeds[int(first) + len(known)] = drawn[row.sequence]
                token_ids[first + len(known)] = 0
        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(token_ids)) - np.repeat(query_starts[:-1] - starts, counts)
        slots = block_tables[row_of, positions // block_size] * block_size + positions % block_size
        sampled = [index for index, row in enumerate(rows) if row.samples]
        return cls(
            number=plan.number,
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=sum(1 for row in rows if row.length == 1 and row.samples),
            sample_rows=np.array(sampled, dtype=np.int64),
            sample_positions=context_lens[sampled],
            num_outputs=np.array(
                [rows[i].start + rows[i].length - rows[i].sequence.num_prompt for i in sampled],
                dtype=np.int64,
            ),
            sampling=[rows[i].sequence.request.params for i in sampled],
            stop_token_ids=[rows[i].sequence.stop_token_ids for i in sampled],
            token_counts={
                index: rows[i].sequence.token_counts().snapshot()
                for index, i in enumerate(sampled)
                if rows[i].sequence.request.params.penalizes
            },
            grammars={
                index: GrammarRow(rows[i].sequence.request_id, grammar, rows[i].sequence.output)
                for index, i in enumerate(sampled)
                if (grammar := rows[i].sequence.request.params.grammar) is not None
            },
            feeds=feeds,
        )


@dataclass(slots=True)
class StepResult:
    """What a step produced.

    Attributes:
        tokens: [S] drawn tokens, in the order of ``StepBatch.sample_rows``.
        duration: Seconds the device worked on the step.
        model_duration: Seconds of that inside the model itself.
        logprobs: Of the draws that ask for them, by index in ``StepBatch.sample_rows``.
        errors: Draws that cannot be made, by index in ``StepBatch.sample_rows``, and why;
            what ``tokens`` holds for them means nothing.
    """

    tokens: Ints
    duration: float
    model_duration: float = 0.0
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class KvPool(Protocol):
    """Byte access to runs of KV blocks. A block's bytes are contiguous."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""

    def read(self, block: int, count: int) -> memoryview:
        """The bytes of blocks [block, block + count), without a copy where possible."""

    def write(self, block: int, offset: int, data: memoryview | bytes) -> None:
        """Write ``data`` at ``offset`` bytes from the start of ``block``; it may run on
        into the blocks that follow."""


@dataclass(frozen=True, slots=True)
class CopyRun:
    """Blocks [device, device + count) and their copies [host, host + count)."""

    device: int
    host: int
    count: int


CopyDone = Callable[[float | BaseException], None]


class Copier(Protocol):
    """Moves runs of KV blocks between the pool and a host pool, beside the steps.

    A job is issued while no step is launched. Jobs of one direction end in the order of
    their issue; out and in do not wait for each other. ``done`` is called once per job, from
    any thread, with the seconds that the copies took (without the wait for other jobs), or
    with what went wrong. From the issue to that call the source may not change and the
    destination may not be used.
    """

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host pool, a null block 0 included."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, on either side."""

    @property
    def host(self) -> KvPool | None:
        """The host pool's bytes; None where KV has none (a modelled executor)."""

    def copy_out(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Copy blocks to the host pool and return at once."""

    def copy_in(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Copy blocks back from the host pool and return at once."""

    def close(self) -> None:
        """Release threads and memory; jobs that have not begun are abandoned."""


class Executor(Protocol):
    """Runs steps in the order in which they are launched."""

    @property
    def description(self) -> ModelDescription:
        """What runs here."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV pool, the null block included."""

    @property
    def kv(self) -> KvPool | None:
        """The pool's bytes; None where KV has none (a modelled executor)."""

    @property
    def copier(self) -> Copier | None:
        """Copies KV to host memory and back; None where there is no host pool."""

    @property
    def feeds_back(self) -> bool:
        """A step may be launched before the one before it has ended, with tokens that that
        one draws (``StepBatch.feeds``)."""

    def launch(self, batch: StepBatch, done: Callable[[StepResult | BaseException], None]) -> None:
        """Start a step and return at once; ``done`` is called once, from any thread."""

    def prepare(self, grammar: Grammar, ready: Callable[[str], None]) -> None:
        """Get a grammar ready for draws, beside the steps, and return at once.

        ``ready`` is called once, from any thread, with "" or with why the grammar cannot be
        used.
        """

    def close(self) -> None:
        """Release threads and memory, the copier's too; launched steps may be abandoned."""
