"""Workloads drawn from distributions: single requests, sessions, and tenants' demands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from cluster.simulation.workloads.arrivals import Floats, ramp, renewal, switched
from cluster.simulation.workloads.lengths import Lengths
from cluster.simulation.workloads.records import Span, WorkloadRequest, by_arrival
from instance.request import RequestClass

Conversation = Sequence[tuple[int, int]]
"""New prompt tokens and output tokens of each turn."""


def independent(
    seed: int, arrivals: Callable[[Generator], Floats], prompt: Lengths, output: Lengths
) -> list[WorkloadRequest]:
    """Single requests; prompt and output lengths are drawn independently of each other."""
    rng = np.random.default_rng(seed)
    times = arrivals(rng)
    prompts, outputs = prompt(rng, len(times)), output(rng, len(times))
    return single_requests(times.tolist(), prompts.tolist(), outputs.tolist())


def single_requests(
    arrivals: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    tenants: Sequence[str] | None = None,
    name: str = "r",
) -> list[WorkloadRequest]:
    """Requests with nothing in common; ``name`` tells their contents from others'."""
    return [
        WorkloadRequest(
            arrival,
            (Span(f"{name}{number}", prompt),),
            output,
            "default" if tenants is None else tenants[number],
        )
        for number, (arrival, prompt, output) in enumerate(
            zip(arrivals, prompts, outputs, strict=True)
        )
    ]


@dataclass(frozen=True, slots=True)
class ThinkTime:
    """Log-normal seconds between an answer and the next turn.

    Attributes:
        median: Half of the times are shorter.
        p90: Nine of ten are shorter; at least ``median``.
    """

    median: float = 20.0
    p90: float = 80.0

    def draw(self, rng: Generator, count: int) -> list[float]:
        """``count`` times, drawn one after the other."""
        spread = np.log(self.p90 / self.median) / 1.2815515655446004
        times: list[float] = rng.lognormal(np.log(self.median), spread, count).tolist()
        return times


def sessions(
    seed: int,
    conversations: Iterable[Conversation],
    rate: float,
    cv: float,
    think: ThinkTime,
    system: int = 0,
) -> list[WorkloadRequest]:
    """Conversations whose every turn repeats what was said before.

    The prompt of a turn is the system prompt, the same in all sessions, then the messages
    and answers so far, then the new message.

    Args:
        seed: Of arrivals and think times.
        conversations: Lengths of their turns.
        rate: Sessions that begin per second.
        cv: Burstiness of the beginnings.
        think: Time between an answer and the next message.
        system: Tokens of the system prompt; 0 for none.
    """
    rng = np.random.default_rng([seed, 0x5E5510])
    dialogues = list(conversations)
    starts = renewal(rng, rate, cv, len(dialogues)).tolist()
    made = []
    for number, (start, turns) in enumerate(zip(starts, dialogues, strict=True)):
        session = f"s{number}"
        said: list[Span] = [Span("system", system)] if system else []
        waits = think.draw(rng, max(0, len(turns) - 1))
        arrival = start
        for turn, (message, answer) in enumerate(turns):
            wait = waits[turn - 1] if turn else None
            arrival += wait or 0.0
            said.append(Span(f"{session}/{turn}", message))
            made.append(
                WorkloadRequest(
                    arrival, tuple(said), answer, session=session, turn=turn, think=wait
                )
            )
            said.append(Span("", answer, turn))
    return by_arrival(made)


def conversations(
    seed: int, count: int, turns: float, first: Lengths, message: Lengths, answer: Lengths
) -> list[list[tuple[int, int]]]:
    """Conversations with a geometric number of turns, ``turns`` in the mean (at least 1)."""
    rng = np.random.default_rng([seed, 0xD1A106])
    numbers = rng.geometric(1.0 / turns, count).tolist()
    firsts = first(rng, count).tolist()
    total = sum(numbers)
    messages, answers = iter(message(rng, total).tolist()), iter(answer(rng, total).tolist())
    return [
        [(opening if turn == 0 else next(messages), next(answers)) for turn in range(number)]
        for opening, number in zip(firsts, numbers, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tenant asks for.

    Attributes:
        tenant: Its name.
        rate: Requests per second at first, above 0.
        prompt: Prompt lengths.
        output: Output lengths.
        last_rate: Requests per second at the end; None for as many as at first.
        cv: Burstiness of its arrivals.
        on: Seconds of demand at a stretch; 0: it never pauses.
        off: Seconds of silence that follow.
        start: Seconds before the first demand.
        request_class: Priority class of all its requests.
    """

    tenant: str
    rate: float
    prompt: Lengths
    output: Lengths
    last_rate: float | None = None
    cv: float = 1.0
    on: float = 0.0
    off: float = 0.0
    start: float = 0.0
    request_class: RequestClass = RequestClass.STANDARD


def tenants(seed: int, demands: Sequence[Demand], duration: float) -> list[WorkloadRequest]:
    """Requests of several tenants before ``duration`` seconds.

    A tenant's requests depend on its own demand and place in the list only: another's
    demand can change beside them.
    """
    made = []
    for number, demand in enumerate(demands):
        rng = np.random.default_rng([seed, number])
        last = demand.rate if demand.last_rate is None else demand.last_rate
        times = ramp(rng, demand.rate, last, demand.cv, duration - demand.start)
        if demand.on:
            times = switched(times, demand.on, demand.off)
        times = times + demand.start
        # Lengths are drawn for all, so that a later border changes none before it.
        prompts, outputs = demand.prompt(rng, len(times)), demand.output(rng, len(times))
        made += [
            WorkloadRequest(
                arrival,
                (Span(f"{demand.tenant}/{index}", prompt),),
                output,
                demand.tenant,
                demand.request_class,
            )
            for index, (arrival, prompt, output) in enumerate(
                zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
            )
            if arrival < duration
        ]
    return by_arrival(made)
