"""What the systems of ``bench.context_switch`` are asked, and what came of it.

Priorities are drawn ahead, as in FastSwitch (arXiv 2411.18424): each conversation has one,
and all change every so many steps.
"""

from __future__ import annotations

import functools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import percentile
from cluster.simulation.workloads.records import WorkloadRequest, prompt_ids
from instance.clock import Clock
from instance.leases import LeasedCounters
from instance.request import Account, Request, SamplingParams
from instance.request import Sequence as LiveSequence
from instance.scheduler import Emission

INTERVAL = 25
"""Steps between two changes of the priorities: FastSwitch's frequency of 0.04."""
STAY = 0.8
"""Probability that a conversation's priority outlives a change, in the Markov pattern."""
PATTERNS = ("random", "markov")
SPREAD = 1e12
"""Priorities lie between 0 and this. The scheduler adds what it has planned to a counter; beside
this no step's work changes an order."""


class PriorityTrace:
    """Priorities that change with the steps; stands in for tenants' ``ServiceCounters``.

    A conversation is a tenant. Its priority is a number in [0, ``SPREAD``), the smaller the
    sooner, and depends on seed, name and time alone. "random" draws all anew at each change;
    "markov" keeps each with probability ``STAY``, so that who was served tends to be served
    on.

    Args:
        pattern: One of ``PATTERNS``.
        seed: Another one makes another trace.

    Attributes:
        steps: Steps so far; whoever runs them moves it on.
        computed: Prompt tokens computed for the first time by their requests.
        computed_again: Tokens computed again after preemptions.
    """

    def __init__(self, pattern: str, seed: int) -> None:
        self.steps = 0
        self.computed = 0
        self.computed_again = 0
        self._stay = {"random": 0.0, "markov": STAY}[pattern]
        self._seed = seed
        self._drawn: dict[str, tuple[random.Random, list[float]]] = {}

    def counter(self, account: Account) -> float:
        tenant = account[0]
        if tenant not in self._drawn:
            self._drawn[tenant] = random.Random(f"{self._seed}/{tenant}"), []
        draw, values = self._drawn[tenant]
        period = self.steps // INTERVAL
        while len(values) <= period:
            chance, fresh = draw.random(), SPREAD * draw.random()
            values.append(values[-1] if values and chance < self._stay else fresh)
        return values[period]

    def left(self, account: Account) -> float:
        """Nobody has to be told of charges."""
        return math.inf

    def weight(self, tenant: str) -> float:
        return 1.0

    def charge(self, account: Account, prompt: int, output: int) -> None:
        """Service does not change priorities; prompts are counted."""
        self.computed += prompt

    def charge_system(self, tokens: int) -> None:
        """Counted as well."""
        self.computed_again += tokens

    def waiting_begins(self, account: Account, request_id: str) -> None:
        """Who waits does not matter."""

    def waiting_ends(self, account: Account, request_id: str, moved: bool = False) -> None:
        """Nor who waits no more."""


class OwnPriorities(LeasedCounters):
    """The engine's own counters of service, which count what is computed as well.

    Attributes:
        steps, computed, computed_again: As of ``PriorityTrace``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.computed = 0

    @property
    def computed_again(self) -> int:
        return self.system

    def charge(self, account: Account, prompt: int, output: int) -> None:
        super().charge(account, prompt, output)
        self.computed += prompt


@dataclass(slots=True)
class Turn:
    """One request: times in seconds of the run's clock."""

    arrival: float
    prompt: int
    times: list[float] = field(default_factory=list)
    preemptions: int = 0


class Conversations:
    """Clients that hold conversations: no turn is sent before the last one is answered.

    Args:
        workload: Turns of sessions, by arrival.
        clock: Real or virtual.
        submit: Takes a sequence.
        vocab: Token ids to ask with.
        seed: Of the contents.
        ended: Called once all is answered.
        expect: Told the id of each request and how many tokens it will be answered with.

    Attributes:
        turns: All that were sent, by request id.
        answers: Output tokens of those that ended.
    """

    def __init__(
        self,
        workload: Sequence[WorkloadRequest],
        clock: Clock,
        submit: Callable[[LiveSequence], None],
        vocab: range,
        seed: int,
        ended: Callable[[], None] = lambda: None,
        expect: Callable[[str, int], None] = lambda name, tokens: None,
    ) -> None:
        self.turns: dict[str, Turn] = {}
        self.answers: dict[str, list[int]] = {}
        self._clock = clock
        self._submit = submit
        self._vocab = vocab
        self._seed = seed
        self._ended = ended
        self._expect = expect
        self._sessions: dict[str, dict[int, WorkloadRequest]] = {}
        self._said: dict[str, dict[int, list[int]]] = {}
        for request in workload:
            self._sessions.setdefault(request.session, {})[request.turn] = request
        self._open = len(workload)
        self._began = 0.0
        self._last = max(request.arrival for request in workload)

    @property
    def last_due(self) -> float:
        """When the last turn is due."""
        return self._began + self._last

    @property
    def open(self) -> int:
        """Turns that are not answered yet."""
        return self._open

    def start(self) -> None:
        """Let time begin now."""
        self._began = self._clock.now()
        for turns in self._sessions.values():
            self._schedule(turns[0])

    def _schedule(self, asked: WorkloadRequest) -> None:
        delay = self._began + asked.arrival - self._clock.now()
        self._clock.call_later(max(0.0, delay), functools.partial(self._send, asked))

    def stepped(self, emissions: Sequence[Emission]) -> None:
        """The engine's listener."""
        now = self._clock.now()
        for emission in emissions:
            sequence = emission.sequence
            self.turns[sequence.request_id].times.extend([now] * len(emission.tokens))
            if emission.finish_reason:
                self._finished(sequence)

    def decoded(self, sequences: Sequence[LiveSequence], times: Sequence[float]) -> None:
        """The simulated engine's listener for steps that were accounted for together."""
        for sequence in sequences:
            self.turns[sequence.request_id].times.extend(times)

    def preempted(self, sequence: LiveSequence) -> None:
        """The engine's listener."""
        self.turns[sequence.request_id].preemptions += 1

    def _send(self, asked: WorkloadRequest) -> None:
        name = f"{asked.session}/{asked.turn}"
        said = self._said.setdefault(asked.session, {})
        prompt = prompt_ids(asked, self._vocab, self._seed, said)
        now = self._clock.now()
        self.turns[name] = Turn(now, len(prompt))
        self._expect(name, asked.output_tokens)
        params = SamplingParams(
            temperature=0.0, max_tokens=asked.output_tokens, ignore_eos=True, seed=self._seed
        )
        request = Request(name, tuple(prompt), params, tenant=asked.session, arrival=now)
        self._submit(LiveSequence.start(request))

    def _finished(self, sequence: LiveSequence) -> None:
        if sequence.error:
            raise RuntimeError(f"{sequence.request_id}: {sequence.error}")
        name = sequence.request_id
        session, _, turn = name.rpartition("/")
        self.answers[name] = self._said[session][int(turn)] = sequence.output
        self._open -= 1
        following = self._sessions[session].get(int(turn) + 1)
        if following is not None:
            self._schedule(following)
        if not self._open:
            self._ended()


LEVELS = (50, 95, 99, 99.9)
"""Percentiles that are reported."""


def latencies(turns: Sequence[Turn], until: float) -> dict[str, float]:
    """Percentiles of TTFT and TBT in seconds, and output tokens per second.

    Throughput is that until the last turn is due (``until``, in seconds of the run's clock);
    from then on the batch runs empty. The whole run's is told too.
    """
    first = [turn.times[0] - turn.arrival for turn in turns]
    between = [
        later - sooner
        for turn in turns
        for sooner, later in zip(turn.times, turn.times[1:], strict=False)
    ]
    began = min(turn.arrival for turn in turns)
    seconds = max(turn.times[-1] for turn in turns) - began
    tokens = sum(len(turn.times) for turn in turns)
    early = sum(bisect_right(turn.times, until) for turn in turns)
    found: dict[str, Any] = {}
    for name, values in (("ttft", first), ("tbt", between)):
        ordered = sorted(values)
        for level in LEVELS:
            found[f"{name}_p{level:g}"] = percentile(ordered, level)
    return {
        **found,
        "tokens_per_second": early / (until - began),
        "tokens_per_second_in_all": tokens / seconds,
        "seconds": seconds,
    }
