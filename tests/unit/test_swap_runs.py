"""Swapping in long random runs: no block is used too early, no copy is ever a wrong one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.config import PreemptionMode, SwapConfig
from instance.request import FinishReason, RequestClass, Sequence, SequenceStatus
from tests.unit.kv_driver import make
from tests.unit.swap_driver import SwapDriver
from tests.unit.test_scheduler_runs import Traffic


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from((11, 14, 20, 60)),
    host_blocks=st.sampled_from((3, 9, 24, 100)),
    max_num_seqs=st.sampled_from((1, 3, 8)),
    budget=st.sampled_from((2, 5, 16, 64)),
    caching=st.booleans(),
    late=st.booleans(),
    reuse=st.booleans(),
    save=st.booleans(),
    preemption=st.sampled_from(PreemptionMode),
    failures=st.sampled_from((0.0, 0.0, 0.2)),
)
def test_every_stream_is_exact(
    seed: int,
    num_blocks: int,
    host_blocks: int,
    max_num_seqs: int,
    budget: int,
    caching: bool,
    late: bool,
    reuse: bool,
    save: bool,
    preemption: PreemptionMode,
    failures: float,
) -> None:
    rng = random.Random(seed)
    driver = SwapDriver(
        num_blocks,
        host_blocks,
        SwapConfig(preemption=preemption, reuse=reuse, save=save),
        rng,
        failures,
        late=late,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=30,
        enable_prefix_caching=caching,
    )
    Traffic(driver, rng, requests=25).run()
    driver.swap.host.check_integrity({})
    if preemption is PreemptionMode.RECOMPUTE:
        assert driver.swap.figures.out == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_long_run_meets_every_case(late: bool) -> None:
    rng = random.Random(7)
    driver = SwapDriver(
        16,
        30,
        SwapConfig(preemption=PreemptionMode.SWAP),
        rng,
        0.02,
        late=late,
        max_num_seqs=5,
        max_num_batched_tokens=16,
        max_model_len=34,
    )
    traffic = Traffic(driver, rng, requests=1500)
    traffic.run()
    figures = driver.swap.figures
    assert figures.out > 50
    assert figures.back > 50
    assert figures.kept_blocks > 20
    assert figures.hit_blocks > 20
    assert figures.saved_blocks > 20
    assert figures.failed > 2
    assert driver.steps_beside_copies > 100
    assert traffic.moved > 20
    assert sum(figures.run_lengths) == figures.runs_in + figures.runs_out
    assert figures.blocks_in == sum(len(job.device) for job in driver.jobs if not job.outward)
    assert figures.blocks_out == sum(len(job.device) for job in driver.jobs if job.outward)


def test_a_long_run_with_a_small_host_pool() -> None:
    rng = random.Random(11)
    driver = SwapDriver(
        12,
        9,
        SwapConfig(preemption=PreemptionMode.SWAP),
        rng,
        max_num_seqs=5,
        max_num_batched_tokens=16,
        max_model_len=34,
        enable_prefix_caching=False,
    )
    Traffic(driver, rng, requests=1000).run()
    figures = driver.swap.figures
    assert figures.out > 50
    assert figures.kept_blocks > 0
    assert figures.dropped_blocks > 0
    assert figures.decisions["recompute", "host full"] > 0
    # Without prefix hashes a copy is of use to its own sequence alone.
    assert figures.hit_blocks == figures.saved_blocks == 0


def test_a_victim_with_nothing_left_to_copy_makes_room_at_once() -> None:
    """Nothing else would start a step then: neither a step nor a copy is there to end."""
    driver = SwapDriver(
        11,
        24,
        SwapConfig(preemption=PreemptionMode.SWAP, save=False),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=40,
    )
    victim = make("victim", list(range(15)), max_tokens=4)
    driver.add(victim)
    driver.step()
    driver.add(urgent("first", 1))
    while victim.status is not SequenceStatus.LOADING:
        driver.step()
    driver.end_some()
    driver.add(urgent("second", 2))
    before = len(driver.jobs)
    driver.step()
    assert victim.num_swapped == 16
    assert len(driver.jobs) == before
    assert [row[0] for row in driver.steps[-1]] == ["second"]
    driver.run()
    assert set(driver.ended.values()) == {FinishReason.LENGTH}


def urgent(name: str, seed: int) -> Sequence:
    """It needs most of the pool, all of which is free once the only other one has left."""
    prompt = [seed * 100 + index for index in range(28)]
    return make(name, prompt, max_tokens=2, request_class=RequestClass.INTERACTIVE)
