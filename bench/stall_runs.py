"""Runs of ``bench.stall_free``: answers being read while long prompts arrive.

Some *residents* decode from the start. A long prompt arrives each time that the first of them
has written so many tokens more, so that both sides do the same work whatever the machine.

chunked
    The engine as it is served: a step holds as much prefill as its decodes bear.
prefill first
    As schedulers did before chunked prefill: prompts are computed whole and at once, and
    decodes pause until none is left.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.report import median, percentile
from cluster.simulation.answers import Answers
from cluster.simulation.device import device, vocabulary
from cluster.simulation.engine import SimulatedEngine
from cluster.simulation.profile import CostProfile
from cluster.simulation.workloads.records import token_ids
from instance.clock import Clock, RealClock, VirtualClock
from instance.config import EngineConfig, SchedulerConfig
from instance.engine import Engine
from instance.executor import Executor
from instance.leases import LeasedCounters
from instance.request import Request, RequestClass, SamplingParams, Sequence
from instance.scheduler import Emission

SIDES = ("chunked", "prefill first")
CHUNKED, PREFILL_FIRST = SIDES
NO_TARGET = 1e6
"""Seconds that a token may take where nothing bounds a prefill."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked.

    Attributes:
        residents: Requests that decode from the start.
        prompt: Tokens of their prompts.
        output: Tokens that each of them writes.
        longs: Long prompts.
        long_prompt: Tokens of each.
        long_output: Tokens that each of them writes.
        first: Tokens of the first resident before the first long prompt.
        every: And between two.
    """

    residents: int
    prompt: int
    output: int
    longs: int
    long_prompt: int
    long_output: int
    first: int
    every: int

    def __post_init__(self) -> None:
        if self.first + self.every * (self.longs - 1) > self.output:
            raise ValueError("the residents end before the last long prompt arrives")

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(self.prompt + self.output, self.long_prompt + self.long_output)

    @property
    def kv_tokens(self) -> int:
        """Tokens of all requests."""
        own = self.residents * (self.prompt + self.output)
        return own + self.longs * (self.long_prompt + self.long_output)


def scheduling(side: str, load: Load) -> SchedulerConfig:
    """The settings of a side."""
    # Prompts are unlike each other, but the second side of a run must not find the first's.
    if side == CHUNKED:
        return SchedulerConfig(max_model_len=load.context, enable_prefix_caching=False)
    return SchedulerConfig(
        max_model_len=load.context,
        max_num_batched_tokens=load.kv_tokens,
        enable_prefix_caching=False,
        tpot_targets=(NO_TARGET,) * len(RequestClass),
    )


@dataclass(slots=True)
class Timing:
    """One request: when it was sent, and when each of its tokens came, in seconds."""

    sent: float
    times: list[float] = field(default_factory=list)


class Clients:
    """Sends the requests of a load and notes when their tokens come.

    Args:
        load: What is asked.
        side: Whether decodes pause for prompts.
        clock: Of the engine.
        vocab: Token ids to ask with.
        expect: Told the id of each request and its number of tokens.
        ended: Called when the last request has ended.

    Attributes:
        residents, longs: In the order in which they were sent.
    """

    def __init__(
        self,
        load: Load,
        side: str,
        clock: Clock,
        vocab: range,
        expect: Callable[[str, int], None] = lambda name, tokens: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.residents: list[Timing] = []
        self.longs: list[Timing] = []
        self.open = load.residents + load.longs
        self._load = load
        self._pauses = side == PREFILL_FIRST
        self._clock = clock
        self._vocab = vocab
        self._expect = expect
        self._ended = ended
        self._engine: Engine | None = None
        self._timings: dict[str, Timing] = {}
        self._unread: list[Sequence] = []
        self._paused: list[Sequence] = []

    def start(self, engine: Engine) -> None:
        """Send the residents."""
        self._engine = engine
        for number in range(self._load.residents):
            load = self._load
            timing, _ = self._send(f"resident-{number}", load.prompt, load.output)
            self.residents.append(timing)

    def stepped(self, emissions: list[Emission]) -> None:
        """The engine's listener."""
        now = self._clock.now()
        for emission in emissions:
            if emission.sequence.error:
                raise RuntimeError(f"{emission.sequence.request_id}: {emission.sequence.error}")
            self._timings[emission.sequence.request_id].times += [now] * len(emission.tokens)
            self.open -= bool(emission.finish_reason)
        self._resume()
        load, sent = self._load, len(self.longs)
        due = load.first + load.every * sent
        if sent < load.longs and len(self.residents[0].times) >= due:
            timing, sequence = self._send(f"long-{sent}", load.long_prompt, load.long_output)
            self.longs.append(timing)
            if self._pauses:
                self._pause(sequence)
        if not self.open:
            self._ended()

    def _send(self, name: str, prompt: int, output: int) -> tuple[Timing, Sequence]:
        assert self._engine is not None
        now = self._clock.now()
        timing = self._timings[name] = Timing(now)
        self._expect(name, output)
        ids = tuple(token_ids(name, prompt, self._vocab))
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        sequence = Sequence.start(Request(name, ids, params, arrival=now))
        self._engine.submit(sequence)
        return timing, sequence

    def _pause(self, prompt: Sequence) -> None:
        """No decode is planned until the prompt is computed."""
        assert self._engine is not None
        self._unread.append(prompt)
        for sequence in self._engine.scheduler.running:
            if sequence not in self._unread and not sequence.held:
                sequence.held = True
                self._paused.append(sequence)

    def _resume(self) -> None:
        """Decodes go on once the step that runs computes the last of the prompts."""
        self._unread = [one for one in self._unread if not (one.num_in_flight or one.num_output)]
        if not self._unread:
            for sequence in self._paused:
                sequence.held = False
            self._paused = []

    def figures(self, alone: float) -> dict[str, Any]:
        """What the run came to.

        Args:
            alone: Seconds of an undisturbed step.

        Returns:
            ``tbt_p50``, ``tbt_p99``, ``tbt_max``: between two tokens of a resident, from the
            first long prompt on, in undisturbed steps. ``ttft``: of the long prompts, median
            in seconds. ``seconds``: from the first long prompt to the end of all;
            ``tokens_per_second``: computed and drawn then.
        """
        began = self.longs[0].sent
        end = max(timing.times[-1] for timing in self._timings.values())
        gaps = [
            (later - sooner) / alone
            for one in self.residents
            for sooner, later in itertools.pairwise(one.times)
            if later > began
        ]
        drawn = sum(time > began for one in self._timings.values() for time in one.times)
        computed = drawn + self._load.longs * self._load.long_prompt
        return {
            "alone": alone,
            "tbt_p50": percentile(gaps, 50),
            "tbt_p99": percentile(gaps, 99),
            "tbt_max": max(gaps),
            "ttft": median(one.times[0] - one.sent for one in self.longs),
            "seconds": end - began,
            "tokens_per_second": computed / (end - began),
        }

    def undisturbed(self) -> float:
        """Median seconds between two tokens of a resident while no long prompt is read."""
        read = [(one.sent, one.times[0]) for one in self.longs]
        return median(
            later - sooner
            for one in self.residents
            for sooner, later in itertools.pairwise(one.times)
            if all(later <= sent or sooner >= first for sent, first in read)
        )


def run_modelled(profile: CostProfile, load: Load, side: str) -> Clients:
    """A side on a virtual clock, with steps that last as a profile says."""
    clock = VirtualClock()
    vocab, end_token = vocabulary(profile.model)
    answers = Answers(vocab, end_token)
    clients = Clients(load, side, clock, vocab, answers.prepare)

    def failed(error: BaseException) -> None:
        raise error

    made = device(profile, 0.0)(clock)
    engine = SimulatedEngine(
        made.executor,
        EngineConfig(scheduler=scheduling(side, load)),
        clock,
        made.cost,
        answers,
        clients.stepped,
        lambda sequences, times: None,
        failed,
        lambda sequence: None,
        LeasedCounters(),
        jumps=False,
    )
    clients.start(engine)
    while clients.open and clock.run_next():
        pass
    if clients.open:
        raise RuntimeError(f"{clients.open} requests were never answered")
    engine.scheduler.check_integrity()
    return clients


def run_real(executor: Executor, load: Load, side: str) -> Clients:
    """A side on an executor that computes, by this machine's clock."""
    return asyncio.run(_run_real(executor, load, side))


async def _run_real(executor: Executor, load: Load, side: str) -> Clients:
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[None] = loop.create_future()

    def post(call: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(call)

    clock = RealClock()
    vocab = range(100, executor.description.vocab_size)
    clients = Clients(load, side, clock, vocab, ended=lambda: finished.set_result(None))
    engine = Engine(
        executor,
        EngineConfig(scheduler=scheduling(side, load)),
        clock,
        post,
        clients.stepped,
        finished.set_exception,
    )
    clients.start(engine)
    await finished
    return clients
