"""Decode steps in buckets, replayed from graphs: with a stand-in for CUDA's graphs, which runs
the captured work again on the same memory."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.request import SamplingParams

pytest.importorskip("triton")

from instance.model.cuda import memory
from instance.model.cuda.graphs import WARM_UPS, DecodeSteps
from instance.model.cuda.inputs import StepTensors

BUCKETS = (1, 2, 4, 7)
WIDTH = 5


class Graph:
    """Work that was captured, and the pool that it was captured into."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.into: object = None
        self.replays = 0

    def pool(self) -> object:
        return self.into or self

    def replay(self) -> None:
        self.replays += 1
        for call in self.work:
            call()


class Model:
    """Logits that tell all that a step was given."""

    def __init__(self) -> None:
        self.capturing: Graph | None = None
        self.last = torch.arange(100, 100 + BUCKETS[-1])
        self.sizes: list[int] = []

    def forward(self, step: StepTensors) -> Tensor:
        self.sizes.append(len(step.token_ids))
        out = torch.empty(len(step.token_ids), 6, dtype=torch.int64)

        def work() -> None:
            attention = step.attention
            used = attention.context_lens[:, None] > torch.arange(WIDTH) * 4
            tables = (attention.tables * used * torch.arange(1, WIDTH + 1)).sum(1)
            rows = [step.tokens(self.last), step.positions, attention.slots]
            rows += [attention.context_lens, tables, step.sampling.top_ks]
            out.copy_(torch.stack(rows, 1))

        work()
        if self.capturing is not None:
            self.capturing.work.append(work)
        return out


def batch_of(rows: int, draw: random.Random) -> StepBatch:
    lens = np.array([draw.randrange(1, 4 * WIDTH + 1) for _ in range(rows)])
    width = -(-int(lens.max()) // 4)
    fed = [row for row in range(rows) if draw.random() < 0.5]
    ids = [draw.randrange(50) for _ in range(rows)]
    return StepBatch(
        number=0,
        token_ids=np.array([0 if row in fed else ids[row] for row in range(rows)]),
        positions=lens - 1,
        slots=np.array([draw.randrange(4, 400) for _ in range(rows)]),
        query_starts=np.arange(rows + 1),
        context_lens=lens,
        block_tables=np.array(
            [[draw.randrange(1, 100) for _ in range(width)] for _ in range(rows)]
        ),
        num_decodes=rows,
        sample_rows=np.arange(rows),
        sample_positions=lens,
        num_outputs=np.zeros(rows, dtype=np.int64),
        sampling=[SamplingParams(top_k=draw.randrange(1, 9)) for _ in range(rows)],
        stop_token_ids=[frozenset()] * rows,
        feeds={row: draw.randrange(BUCKETS[-1]) for row in fed},
    )


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, list[Graph]]:
    model, made = Model(), list[Graph]()

    @contextlib.contextmanager
    def capture(graph: Graph, pool: object = None, **_: Any) -> Iterator[None]:
        graph.into = pool
        made.append(graph)
        model.capturing = graph
        yield
        model.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return model, made


def expected(batch: StepBatch, last: Tensor) -> list[list[int]]:
    found = []
    for row in range(len(batch.context_lens)):
        blocks = batch.block_tables[row, : -(-int(batch.context_lens[row]) // 4)]
        token = last[batch.feeds[row]] if row in batch.feeds else batch.token_ids[row]
        tables = sum(int(block) * (at + 1) for at, block in enumerate(blocks))
        length, slot = int(batch.context_lens[row]), int(batch.slots[row])
        top_k = batch.sampling[row].top_k
        found.append([int(token), length - 1, slot, length, tables, top_k])
    return found


@pytest.mark.parametrize("captured", [False, True])
def test_steps_are_padded_and_nothing_of_earlier_ones_is_left(
    captured: bool, graphs: tuple[Model, list[Graph]]
) -> None:
    model, made = graphs
    steps = DecodeSteps(model.forward, BUCKETS, WIDTH, torch.device("cpu"))
    if captured:
        assert steps.capture(None)  # type: ignore[arg-type]
        # The largest first, each warmed up; all in the memory of the first.
        runs = WARM_UPS + 1
        assert model.sizes == [size for size in reversed(BUCKETS) for _ in range(runs)]
        assert [graph.pool() for graph in made] == [made[0]] * len(BUCKETS)
    staging = [steps.staging(), steps.staging()]
    draw = random.Random(2)
    for number in range(60):
        batch = batch_of(draw.randint(1, BUCKETS[-1]), draw)
        assert steps.takes(batch)
        logits, tensors = steps.run(batch, staging[number % 2])
        rows = len(batch.context_lens)
        assert len(logits) == min(size for size in BUCKETS if size >= rows)
        assert logits[:rows].tolist() == expected(batch, model.last)
        # Padding: no context, the null block, a greedy draw, no token fed.
        assert not logits[rows:, 2:].any()
        assert not tensors.sampling.temperatures[rows:].any()
        assert not logits[rows:, 0].any()
    assert sum(graph.replays for graph in made) == (60 if captured else 0)


def test_other_steps_are_not_taken(graphs: tuple[Model, list[Graph]]) -> None:
    steps = DecodeSteps(graphs[0].forward, BUCKETS, WIDTH, torch.device("cpu"))
    draw = random.Random(1)
    assert not steps.takes(batch_of(8, draw))
    wide = batch_of(2, draw)
    wide.block_tables = np.ones((2, WIDTH + 1), dtype=np.int64)
    assert not steps.takes(wide)
    mixed = batch_of(3, draw)
    mixed.num_decodes = 2
    assert not steps.takes(mixed)
    silent = batch_of(3, draw)
    silent.sample_rows = np.arange(2)
    assert not steps.takes(silent)


def test_a_model_that_cannot_be_captured_runs_piece_by_piece(
    graphs: tuple[Model, list[Graph]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = graphs
    capture = torch.cuda.graph

    def fails(graph: Graph, **more: Any) -> Any:
        if len(made) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(graph, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "graph", fails)
    steps = DecodeSteps(model.forward, BUCKETS, WIDTH, torch.device("cpu"))
    assert not steps.capture(None)  # type: ignore[arg-type]
    batch = batch_of(7, random.Random(4))
    logits, _ = steps.run(batch, steps.staging())
    assert logits.tolist() == expected(batch, model.last)
    assert not any(graph.replays for graph in made)


def test_the_pool_gets_what_the_largest_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    calls: list[str] = []
    figures = {
        # 2 of 80 GiB are others', of torch's 20 the step used 19.
        "mem_get_info": (58 * gib, 80 * gib),
        "memory_reserved": 20 * gib,
        "max_memory_allocated": 19 * gib,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            calls.append(name)
            return figures[name]

        return call

    for name in figures:
        monkeypatch.setattr(torch.cuda, name, stand_in(name))
    blocks = memory.measured_blocks(
        torch.device("cpu"), 0.9, 2 << 20, gib, lambda: calls.append("step")
    )
    # 72 GiB of which 2 + 19 + 1 are taken, in blocks of 2 MiB.
    assert blocks == 50 * 512
    assert calls.index("reset_peak_memory_stats") < calls.index("step")
    assert calls.index("step") < calls.index("mem_get_info")
