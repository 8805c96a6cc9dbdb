"""Why each request was placed and moved as it was, and what that brought in hindsight.

Of a placement the log says what the policy knew of each instance, and when the request's
first token was to be expected there; afterwards, how much sooner another instance would have
been expected to answer than the chosen one did (*regret*). Of a migration it says how free
the instances were; afterwards, whether the request's tokens came faster than its old
instance's steps did in the same time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.events import Action, Event, StartMigration
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.placement import POLICIES, NamedPolicy, Uniform
from cluster.dispatcher.views import LoadView
from cluster.simulation.records import InstanceRecord, RequestRecord
from cluster.simulation.simulation import Outcome
from instance.budget import attended
from instance.step_cost import StepCost

AFTERWARDS = 10.0
"""Seconds after a migration over which what it brought is measured."""


def expected_ttft(view: LoadView, request: PlaceRequest, cached: int, cost: StepCost) -> float:
    """Seconds until the first token, by what is known of an instance now.

    The running step ends; the prompts before it and its own are computed, beside a decode of
    the batch; and where memory is short, the batch gives back blocks at the rate at which it
    fills them, as in a steady state.

    Args:
        cached: Leading blocks of the prompt that the instance holds.
        cost: Of its steps.
    """
    size = view.info.model.block_size
    prompt = max(1, request.num_tokens - cached * size)
    tokens = prompt + max(0, view.backlog)
    alone = cost.of(0, 0, view.running, 0)
    steps = cost.of(tokens, attended(cached * size, prompt), view.running, 0)
    seconds = 0.5 * (view.step_seconds or alone) + steps
    wanted = -(-prompt // size) + sum(view.waiting)
    shortage = wanted - (view.free - view.headroom)
    if shortage > 0:
        freed = max(1, view.running) / size
        seconds += shortage / freed * (view.step_seconds or alone)
    return seconds


class DecisionLog:
    """Keeps every decision of a run; an ``Observer`` of its dispatcher.

    Args:
        cost_of: The cost of an instance's steps, by its name.
    """

    def __init__(self, cost_of: Callable[[str], StepCost]) -> None:
        self._cost_of = cost_of
        self._now = 0.0
        self._entries: list[dict[str, Any]] = []

    def policies(self) -> dict[str, NamedPolicy]:
        """The policies of the registry, each of which tells this log what it was asked."""
        return {
            name: replace(policy, choose=self._wrapped(name, policy.choose))
            for name, policy in POLICIES.items()
        }

    def before(self, core: Dispatcher, event: Event, now: float) -> None:
        """The core is about to take an event."""
        self._now = now

    def after(self, core: Dispatcher, event: Event, actions: list[Action], now: float) -> None:
        """Write down the migrations that it starts."""
        starts = [action for action in actions if isinstance(action, StartMigration)]
        if not starts:
            return
        views = core.members.views(now)
        freeness = {view.instance_id: _rounded(view.rebalancing_freeness()) for view in views}
        for action in starts:
            self._entries.append(
                {
                    "time": round(now, 4),
                    "decision": "migrate",
                    "request": action.request_id,
                    "reason": action.reason,
                    "source": action.source,
                    "destination": action.destination.instance_id,
                    "freeness": freeness,
                }
            )

    def _wrapped(
        self, name: str, choose: Callable[[PlaceRequest, Candidates, Uniform], LoadView]
    ) -> Callable[[PlaceRequest, Candidates, Uniform], LoadView]:
        def chosen(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
            view = choose(request, candidates, rng)
            self._placed(name, request, candidates, view)
            return view

        return chosen

    def _placed(
        self, name: str, request: PlaceRequest, candidates: Candidates, view: LoadView
    ) -> None:
        freeness = candidates.freeness.tolist()
        cached = candidates.cached.tolist()
        self._entries.append(
            {
                "time": round(self._now, 4),
                "decision": "place",
                "request": request.request_id,
                "epoch": request.epoch,
                "tokens": request.num_tokens,
                "policy": name,
                "instance": view.instance_id,
                "candidates": {
                    one.instance_id: {
                        "freeness": _rounded(freeness[index]),
                        "free_blocks": one.free,
                        "running": one.running,
                        "waiting": len(one.waiting),
                        "cached_blocks": cached[index],
                        "expected_ttft": round(
                            expected_ttft(
                                one, request, cached[index], self._cost_of(one.instance_id)
                            ),
                            4,
                        ),
                    }
                    for index, one in enumerate(candidates)
                },
            }
        )

    # ---- hindsight

    def lines(self, outcome: Outcome) -> Iterator[str]:
        """The log as JSON lines, each with what its decision brought."""
        for entry in self.entries(outcome):
            yield json.dumps(entry)

    def entries(self, outcome: Outcome) -> list[dict[str, Any]]:
        """The decisions, each with what it brought."""
        requests = {one.request_id: one for one in outcome.requests}
        ended = {
            (report.request_id, report.source, report.destination): report
            for _, report in outcome.migrations
        }
        found = []
        for entry in self._entries:
            record = requests[entry["request"]]
            if entry["decision"] == "place":
                found.append({**entry, "hindsight": _of_placement(entry, record)})
            else:
                report = ended.get((entry["request"], entry["source"], entry["destination"]))
                outcome_text = "" if report is None else report.outcome
                gain = None
                if outcome_text == "moved":
                    gain = _of_move(entry, record, outcome.instances[entry["source"]])
                found.append({**entry, "outcome": outcome_text, "hindsight": gain})
        return found


def mean_regret(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Mean regret of the placements in seconds, and the share of those with any."""
    regrets = [
        entry["hindsight"]["regret"]
        for entry in entries
        if entry["decision"] == "place" and entry["hindsight"] is not None
    ]
    gains = [
        entry["hindsight"]["gain"]
        for entry in entries
        if entry["decision"] == "migrate" and entry["hindsight"] is not None
    ]
    return {
        "placements": len(regrets),
        "regret_mean": float(np.mean(regrets)) if regrets else 0.0,
        "regretted_share": float(np.mean([one > 0 for one in regrets])) if regrets else 0.0,
        "moves": len(gains),
        "move_gain_mean": float(np.mean(gains)) if gains else 0.0,
    }


def _of_placement(entry: dict[str, Any], record: RequestRecord) -> dict[str, float] | None:
    """What came of a first placement; None where no token came by it."""
    if not len(record.times) or entry["epoch"] > 1:
        return None
    actual = record.times[0] - entry["time"]
    others = [
        one["expected_ttft"]
        for name, one in entry["candidates"].items()
        if name != entry["instance"]
    ]
    best = min(others, default=math.inf)
    return {
        "ttft": round(actual, 4),
        "best_alternative": _rounded(best),
        "regret": round(max(0.0, actual - best), 4),
    }


def _of_move(
    entry: dict[str, Any], record: RequestRecord, source: InstanceRecord
) -> dict[str, float] | None:
    """What a move brought over the seconds that followed, in seconds; None where the request
    or its old instance did not go on long enough to tell."""
    since, until = entry["time"], entry["time"] + AFTERWARDS
    times = np.frombuffer(record.times)
    drawn = times[(times >= since) & (times <= until)]
    reports = np.frombuffer(source.times)
    inside = np.flatnonzero((reports >= since) & (reports <= until))
    if len(drawn) < 2 or len(inside) < 2:
        return None
    first, last = int(inside[0]), int(inside[-1])
    steps = source.steps[last] - source.steps[first]
    if steps < 1:
        return None
    there = float(reports[last] - reports[first]) / steps
    here = float(drawn[-1] - drawn[0]) / (len(drawn) - 1)
    return {
        "step_of_source": round(there, 5),
        "gap_between_tokens": round(here, 5),
        "gain": round((there - here) * (len(drawn) - 1), 4),
    }


def _rounded(value: float) -> float | None:
    """For JSON, which knows no infinity."""
    return round(value, 3) if math.isfinite(value) else None
