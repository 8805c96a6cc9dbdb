"""The scheduler in long random runs; ``kv_driver`` checks every step and every KV read."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.request import FinishReason, Request, RequestClass, Sequence, SequenceStatus
from tests.unit.kv_driver import Driver, make

ADAPTERS = ("", "", "", "other")


class Traffic:
    """Random arrivals, aborts, migrations and remote writers around a driver."""

    def __init__(self, driver: Driver, rng: random.Random, requests: int) -> None:
        self.driver = driver
        self.rng = rng
        self.left = requests
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.away: list[Sequence] = []
        self.reserved: list[list[int]] = []
        self.pinned: list[tuple[list[int], list[int]]] = []
        self.moved = 0
        driver.on_boundary = self.boundary
        driver.on_run = self.running

    def arrive(self) -> None:
        driver, rng = self.driver, self.rng
        self.left -= 1
        name = f"r{len(self.requests)}"
        length = rng.choice((1, 3, 4, 8, 9, 17, 24))
        sequence = make(
            name,
            # Few distinct beginnings, so that prefixes are shared.
            [rng.randrange(2)] * (length // 2) + [rng.randrange(3) for _ in range(-(-length // 2))],
            max_tokens=rng.choice((1, 2, 6, 14)),
            min_tokens=rng.choice((0, 0, 3)),
            stop=rng.choice(((), (0,), (1, 4))),
            arrival=float(rng.randrange(50)),
            request_class=rng.choice(list(RequestClass)),
            seed=rng.randrange(2),
            adapter=rng.choice(ADAPTERS),
        )
        self.requests[name] = sequence.request
        driver.add(sequence)

    def running(self) -> None:
        """What may happen while a step runs: requests come and are aborted."""
        rng = self.rng
        scheduler = self.driver.scheduler
        while self.left and len(scheduler.waiting) < 8 and rng.random() < 0.3:
            self.arrive()
        if scheduler.sequences and rng.random() < 0.02:
            name = rng.choice(list(scheduler.sequences))
            sequence = scheduler.abort(name)
            assert sequence is not None
            assert sequence.finish_reason is FinishReason.ABORT
            assert not sequence.block_table
            self.aborted.add(name)
        if rng.random() < 0.1:
            self.pin()

    def boundary(self) -> None:
        """What happens only when no step is launched."""
        rng, driver = self.rng, self.driver
        if self.left and rng.random() < 0.2:
            self.arrive()
        self.away = [s for s in self.away if s.status is SequenceStatus.HANDOVER]
        if self.away and rng.random() < 0.3:
            self.come_back(self.away.pop(rng.randrange(len(self.away))))
        scheduler = driver.scheduler
        candidates = rng.choice((scheduler.running, scheduler.running, scheduler.waiting))
        candidates = [sequence for sequence in candidates if scheduler.can_leave(sequence)]
        if candidates and rng.random() < 0.2:
            sequence = rng.choice(candidates)
            if driver.planned is not None:
                driver.scheduler.drop(driver.planned, sequence)
            driver.scheduler.take_out(sequence)
            self.away.append(sequence)
        if rng.random() < 0.1:
            blocks = driver.pool.reserve(rng.randint(1, 4))
            if blocks is not None:
                self.reserved.append(blocks)
        for blocks in self.reserved:
            driver.scribble(blocks)
        if self.reserved and rng.random() < 0.2:
            driver.pool.release(self.reserved.pop())
        if self.pinned and rng.random() < 0.3:
            self.unpin()

    def come_back(self, sequence: Sequence) -> None:
        """Undo the handover, or finish it: the sequence goes on in other blocks."""
        driver, pool, scheduler = self.driver, self.driver.pool, self.driver.scheduler
        if self.rng.random() < 0.5 or not sequence.num_kept:
            scheduler.put_back(sequence)
            return
        size = pool.block_size
        full = (len(sequence.tokens) - 1) // size
        hits = pool.match(sequence.tokens, sequence.block_hashes[:full])
        hits = hits[: sequence.num_kept // size]
        pool.acquire(hits)
        needed = -(-sequence.num_kept // size)
        fresh = pool.reserve(needed - len(hits))
        if fresh is None:
            pool.release(hits)
            scheduler.put_back(sequence)
            return
        driver.move(sequence, len(hits), fresh)
        scheduler.check_integrity(hits)
        pool.commit(fresh)
        arrived = Sequence.start(
            sequence.request, epoch=sequence.epoch + 1, emitted=tuple(sequence.output)
        )
        arrived.block_table = hits + fresh
        arrived.num_computed = arrived.num_written = sequence.num_kept
        arrived.num_cached = sequence.num_cached
        scheduler.finish(sequence, FinishReason.NOT_FINISHED)
        scheduler.insert(arrived)
        self.moved += 1

    def pin(self) -> None:
        """A copy starts to read what is written of a running sequence."""
        running = self.driver.scheduler.running
        if running:
            sequence = self.rng.choice(running)
            blocks = sequence.block_table[: sequence.num_written // self.driver.pool.block_size]
            self.driver.pool.pin(blocks)
            self.pinned.append((blocks, self.driver.read(blocks)))

    def unpin(self) -> None:
        blocks, content = self.pinned.pop(self.rng.randrange(len(self.pinned)))
        assert self.driver.read(blocks) == content, "a pinned block was written"
        self.driver.pool.unpin(blocks)

    def run(self) -> None:
        driver = self.driver
        for _ in range(200 * (self.left + 10)):
            if not (self.left or driver.scheduler.sequences or driver.launched):
                break
            driver.step()
        assert not driver.scheduler.sequences, "sequences starve"
        driver.step()
        driver.settle()
        for blocks in self.reserved:
            driver.pool.release(blocks)
        while self.pinned:
            self.unpin()
        driver.check()
        assert driver.pool.num_free == driver.pool.num_usable
        for name, request in self.requests.items():
            output, reason = driver.expected(request)
            if name in self.aborted:
                assert driver.emitted[name] == output[: len(driver.emitted[name])]
                assert name not in driver.ended
            else:
                assert (driver.emitted[name], driver.ended[name]) == (output, reason)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from((11, 14, 20, 60)),
    max_num_seqs=st.sampled_from((1, 3, 8)),
    budget=st.sampled_from((2, 5, 16, 64)),
    caching=st.booleans(),
    late=st.booleans(),
)
def test_every_stream_is_exact(
    seed: int, num_blocks: int, max_num_seqs: int, budget: int, caching: bool, late: bool
) -> None:
    driver = Driver(
        num_blocks,
        4,
        late=late,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=30,
        enable_prefix_caching=caching,
    )
    Traffic(driver, random.Random(seed), requests=25).run()


@pytest.mark.parametrize("late", [False, True])
def test_a_long_run_meets_every_case(late: bool) -> None:
    driver = Driver(16, 4, late=late, max_num_seqs=5, max_num_batched_tokens=16, max_model_len=34)
    traffic = Traffic(driver, random.Random(5), requests=1500)
    traffic.run()
    assert len(driver.steps) > 2000
    assert driver.preemptions > 50
    assert traffic.moved > 20
    assert len(traffic.aborted) > 10
    assert {*driver.ended.values()} == {FinishReason.STOP, FinishReason.LENGTH}
