"""The engine's swapping on a virtual clock: to the step, what waits for what."""

from __future__ import annotations

from typing import Any

import pytest

from instance.clock import VirtualClock
from instance.config import EngineConfig, PreemptionMode, SchedulerConfig, SwapConfig, SwapMode
from instance.engine import Engine
from instance.executor import ModelDescription
from instance.kv.swap import Swap
from instance.model.modelled import ModelledExecutor
from instance.model.modelled_copier import ModelledCopier
from instance.request import Request, RequestClass, SamplingParams, Sequence
from instance.scheduler import Emission
from instance.step_cost import StepCost

MIB = 1 << 20
STEP = 0.01
MODEL = ModelDescription("m", "float32", 16, 2, 2, 8, 1000, 8192)


class World:
    """An engine whose steps take 10 ms and whose blocks are a MiB each."""

    def __init__(
        self,
        swap: SwapConfig,
        bytes_per_second: float,
        num_blocks: int = 2000,
        prefill_token: float = 1e-6,
    ) -> None:
        self.clock = clock = VirtualClock()
        self.copier = ModelledCopier(
            4000, MIB, clock, lambda size, runs: size / bytes_per_second + runs * 1e-5
        )
        cost = StepCost(STEP, prefill_token, 0.0, 0.0)
        executor = ModelledExecutor(MODEL, num_blocks, clock, cost, self.copier)
        config = EngineConfig(
            scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=20_000), swap=swap
        )
        self.engine = Engine(
            executor,
            config,
            clock,
            lambda call: (clock.call_later(0.0, call), None)[1],
            self._step,
            self._failed,
        )
        self.ended: list[str] = []

    @property
    def swap(self) -> Swap:
        swap = self.engine.scheduler.swap
        assert swap is not None
        return swap

    def _step(self, emissions: list[Emission]) -> None:
        self.ended += [e.sequence.request_id for e in emissions if e.finish_reason]

    def _failed(self, error: BaseException) -> None:
        raise error

    def submit(self, name: str, prompt: int, tokens: int, **more: Any) -> Sequence:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        first = sum(map(ord, name)) % 900
        sequence = Sequence.start(
            Request(name, tuple((first + i) % 1000 for i in range(prompt)), params, **more)
        )
        self.engine.submit(sequence)
        return sequence

    def run(self, until: Any) -> None:
        for _ in range(200_000):
            if until():
                return
            assert self.clock.run_next(), "nothing is due"
        raise AssertionError("it never happens")

    def finish(self) -> None:
        self.run(lambda: not self.engine.scheduler.sequences)
        while self.clock.run_next():
            pass
        self.engine.scheduler.check_integrity()
        assert self.engine.pool.num_free == self.engine.pool.num_usable

    def displace(self) -> tuple[int, float]:
        """A gibibyte leaves for an urgent request; steps and seconds beside that copy."""
        self.submit("a small one", 64, 400)
        self.submit("the large one", 8000, 150)
        large = self.engine.scheduler.sequences["the large one"]
        self.run(lambda: large.num_output > 100)
        self.submit("urgent", 64, 30, request_class=RequestClass.INTERACTIVE)
        self.run(lambda: self.swap.awaited)
        assert self.swap.figures.bytes_out > 400 * MIB
        steps, began = self.engine.steps, self.clock.now()
        self.run(lambda: not self.swap.awaited)
        return self.engine.steps - steps, self.clock.now() - began


@pytest.mark.parametrize("mode", [SwapMode.ASYNC, SwapMode.AUTO])
def test_steps_go_on_beside_a_large_copy(mode: SwapMode) -> None:
    world = World(SwapConfig(mode=mode, preemption=PreemptionMode.SWAP, save=False), 2e9)
    steps, seconds = world.displace()
    # Half a GiB at 2 GB/s: a quarter of a second, in which the other two go on.
    assert seconds > 0.2
    assert steps >= seconds / STEP - 2
    world.finish()
    # To fetch a block that takes 0.5 ms it may wait, but not for what takes steps.
    assert world.swap.figures.stall_seconds < 0.2 * STEP
    assert set(world.ended) == {"a small one", "the large one", "urgent"}


def test_a_synchronous_swap_holds_all_steps_back() -> None:
    world = World(SwapConfig(mode=SwapMode.SYNC, preemption=PreemptionMode.SWAP, save=False), 2e9)
    steps, seconds = world.displace()
    assert steps == 0
    world.finish()
    assert world.swap.figures.stalls >= 1
    assert world.swap.figures.stall_seconds >= seconds
    assert len(world.ended) == 3


def test_swap_or_recompute_is_whichever_is_cheaper() -> None:
    # 8000 tokens are half a GiB, and cost 8 ms to compute anew in this model.
    slow = World(SwapConfig(save=False), 1e9)
    for round_ in range(6):
        slow.submit(f"teach{round_}", 3000, 3)
        slow.finish()
        slow.swap.cost.observe_copy(True, 1, 100, 0.1)
        slow.swap.cost.observe_copy(False, 1, 100, 0.1)
    slow.submit("a small one", 64, 400)
    slow.submit("the large one", 8000, 150)
    large = slow.engine.scheduler.sequences["the large one"]
    slow.run(lambda: large.num_output > 5)
    slow.submit("urgent", 64, 30, request_class=RequestClass.INTERACTIVE)
    slow.run(lambda: large.num_preemptions > 0)
    assert slow.swap.figures.decisions["recompute", "cheaper"] == 1
    assert slow.swap.figures.out == 0
    slow.finish()


def test_a_swapped_out_sequence_returns_ahead_of_its_place() -> None:
    world = World(SwapConfig(preemption=PreemptionMode.SWAP, save=False), 2e10)
    world.submit("a small one", 64, 60)
    large = world.submit("the large one", 2000, 150)
    world.run(lambda: large.num_output > 5)
    world.submit("urgent", 64, 80, request_class=RequestClass.INTERACTIVE)
    world.run(lambda: large.num_swapped > 0)
    world.run(lambda: bool(world.swap.loaded))
    # Its KV is back although the batch is full still.
    assert len(world.engine.scheduler.running) == 2
    before = large.num_output
    world.run(lambda: "a small one" in world.ended)
    world.run(lambda: large.num_output > before)
    assert world.swap.figures.stall_seconds < 0.1 * STEP
    world.finish()
    assert large.seconds_lost > 0
    assert sum(world.swap.figures.lost) == 1


def test_what_finished_is_read_back_for_the_next_turn() -> None:
    world = World(SwapConfig(), 2e10, num_blocks=300, prefill_token=1e-4)
    first = world.submit("first", 1600, 10)
    world.finish()
    assert world.swap.figures.saved_blocks > 0
    for index in range(5):
        world.submit(f"other{index}", 2000, 40)
    world.finish()
    assert world.swap.figures.saved_blocks > 100
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    again = Sequence.start(Request("again", (*first.tokens, 1, 2, 3), params))
    world.engine.submit(again)
    world.finish()
    assert world.swap.figures.hit_blocks > 0
    assert again.num_cached >= 1600
