"""The context-switch bench: its priorities, its copiers, its clients, its arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import switch_runs
from bench.context_switch import (
    BOUNDS,
    METRICS,
    RATIOS,
    Run,
    changed,
    parameters,
    summary,
    variants,
    verdict,
)
from bench.switch_load import (
    INTERVAL,
    SPREAD,
    STAY,
    Conversations,
    PriorityTrace,
    Turn,
    latencies,
)
from bench.switch_runs import Load, run_modelled
from bench.switch_systems import BY_NAME, FIRST, OWN, PLAIN, SYSTEMS, WHOLE, GranularCopier
from cluster.simulation.engine import SimulatedEngine
from cluster.simulation.profile_files import load_profile
from cluster.simulation.workloads.records import Span, WorkloadRequest
from instance.clock import VirtualClock
from instance.executor import CopyDone, CopyRun
from instance.kv.blocks import BlockPool
from instance.request import FinishReason, RequestClass, Sequence
from instance.scheduler import Emission

STANDARD = RequestClass.STANDARD


# ---- priorities


def priorities(trace: PriorityTrace, tenant: str, periods: int) -> list[float]:
    found = []
    for period in range(periods):
        trace.steps = period * INTERVAL
        found.append(trace.counter((tenant, STANDARD)))
        trace.steps += INTERVAL - 1
        assert trace.counter((tenant, STANDARD)) == found[-1]
    return found


@pytest.mark.parametrize(("pattern", "kept"), [("random", 0.0), ("markov", STAY)])
def test_priorities_change_every_interval(pattern: str, kept: float) -> None:
    values = priorities(PriorityTrace(pattern, 1), "a", 2000)
    assert all(0 <= value < SPREAD for value in values)
    same = sum(one == other for one, other in itertools.pairwise(values))
    assert same / 1999 == pytest.approx(kept, abs=0.05)
    assert sum(values) / 2000 / SPREAD == pytest.approx(0.5, abs=0.1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 200)), max_size=30))
def test_priorities_do_not_depend_on_who_asks_when(asked: list[tuple[str, int]]) -> None:
    expected = {name: priorities(PriorityTrace("markov", 7), name, 9) for name in "abc"}
    trace = PriorityTrace("markov", 7)
    for name, steps in sorted(asked, key=lambda one: one[1]):
        trace.steps = steps
        assert trace.counter((name, STANDARD)) == expected[name][steps // INTERVAL]
    assert expected["a"] != expected["b"]


# ---- copiers


class Log:
    """A copier that only remembers what it is asked for."""

    host = None
    num_host_blocks = 48
    block_bytes = 8

    def __init__(self) -> None:
        self.runs: list[CopyRun] = []

    def copy_out(self, runs: list[CopyRun], done: CopyDone) -> None:
        self.runs += runs
        done(0.0)

    copy_in = copy_out

    def close(self) -> None:
        """Nothing to close."""


RUNS = st.lists(
    st.builds(CopyRun, st.integers(1, 50), st.integers(1, 50), st.integers(1, 9)), max_size=5
)


@given(RUNS, st.integers(0, 4))
def test_a_granular_copier_moves_the_same_bytes(runs: list[CopyRun], pieces: int) -> None:
    inner = Log()
    copier = GranularCopier(inner, lambda blocks, runs: pieces * blocks or runs, pieces)
    ended: list[float | BaseException] = []
    copier.copy_out(runs, ended.append)
    assert ended == [0.0]
    scale = max(1, pieces)
    wanted = [
        (scale * (run.device + i) + piece, scale * (run.host + i) + piece)
        for run in runs
        for i in range(run.count)
        for piece in range(scale)
    ]
    made = [(run.device + i, run.host + i) for run in inner.runs for i in range(run.count)]
    assert made == wanted
    blocks = sum(run.count for run in runs)
    assert (copier.all.swaps, copier.all.blocks) == (1, blocks)
    assert copier.all.copies == len(inner.runs)
    assert copier.num_host_blocks * scale == inner.num_host_blocks
    assert copier.block_bytes == inner.block_bytes * scale


def test_copies_in_a_full_pool_are_counted_apart() -> None:
    copier = GranularCopier(Log(), lambda blocks, runs: runs)
    copier.pool = BlockPool(101, 16)
    copier.copy_out([CopyRun(1, 1, 4)], lambda result: None)
    copier.pool.allocate(90)
    copier.copy_in([CopyRun(1, 1, 4), CopyRun(9, 9, 1)], lambda result: None)
    assert dataclasses.astuple(copier.all) == (2, 3, 9)
    assert dataclasses.astuple(copier.full) == (1, 2, 5)


@pytest.mark.parametrize(
    ("name", "copies"), [("layer-major", 1280), ("block-major", 20), ("block groups", 2)]
)
def test_calls_of_a_copy(name: str, copies: int) -> None:
    assert BY_NAME[name].copies(20, 2, layers=32) == copies


# ---- clients


def test_a_turn_waits_for_the_answer_before_it() -> None:
    clock, sent = VirtualClock(), []

    def submit(sequence: Sequence) -> None:
        sent.append((clock.now(), sequence))

    asked = [
        WorkloadRequest(1.0, (Span("x", 3),), 2, session="s", turn=0),
        WorkloadRequest(2.0, (Span("x", 3), Span("", 2, 0), Span("y", 4)), 1, session="s", turn=1),
        WorkloadRequest(9.0, (Span("x", 9),), 1, session="s", turn=2),
    ]
    over: list[float] = []
    clients = Conversations(asked, clock, submit, range(100), 0, lambda: over.append(clock.now()))
    clients.start()

    def answer(sequence: Sequence, tokens: tuple[int, ...], reason: FinishReason) -> None:
        index = sequence.num_output
        sequence.tokens.extend(tokens)
        clients.stepped([Emission(sequence, index, tokens, reason)])

    clock.run_until(3.0)
    assert [at for at, _ in sent] == [1.0]
    answer(sent[0][1], (7,), FinishReason.NOT_FINISHED)
    clock.run_until(4.0)
    answer(sent[0][1], (8,), FinishReason.LENGTH)
    clock.run_until(5.0)
    assert [at for at, _ in sent] == [1.0, 4.0]
    assert sent[1][1].tokens[:5] == [*sent[0][1].tokens[:3], 7, 8]
    answer(sent[1][1], (5,), FinishReason.LENGTH)
    clock.run_until(9.0)
    answer(sent[2][1], (6,), FinishReason.LENGTH)
    assert [at for at, _ in sent] == [1.0, 4.0, 9.0]
    assert over == [9.0]
    assert clients.open == 0
    assert clients.answers == {"s/0": [7, 8], "s/1": [5], "s/2": [6]}
    assert clients.turns["s/0"].times == [3.0, 4.0]
    clients.decoded([sent[0][1], sent[1][1]], [10.0, 11.0])
    assert [clients.turns[name].times[-2:] for name in ("s/0", "s/1")] == [[10.0, 11.0]] * 2


def test_latencies() -> None:
    turns = [Turn(0.0, 5, [1.0, 2.0, 4.0]), Turn(3.0, 5, [5.0, 5.5])]
    found = latencies(turns, until=4.0)
    assert found["ttft_p50"] == 1.5
    assert found["tbt_p50"] == 1.0
    assert found["tokens_per_second"] == 3 / 4
    assert found["tokens_per_second_in_all"] == pytest.approx(5 / 5.5)


# ---- parameters and verdict


def test_each_parameter_is_halved_and_doubled_by_itself() -> None:
    profile = load_profile("llama-8b-a10")
    names = parameters(profile)
    rows = variants(profile)
    assert len(rows) == 1 + 2 * len(names)
    for name, factor, varied in rows[1:]:
        other = parameters(varied)
        assert other[name] == pytest.approx(names[name] * factor, rel=1e-3)
        assert {key: value for key, value in other.items() if key != name} == {
            key: value for key, value in names.items() if key != name
        }
    assert changed(profile, "copy.launch", 2.0).copy_in.launch == 2 * profile.copy_in.launch


def test_runs_that_differ_have_files_that_differ() -> None:
    profile = load_profile("llama-8b-a10")
    runs = [
        Run(system.name, pattern, seed, load, varied)
        for system in SYSTEMS
        for pattern in ("random", "markov")
        for seed in (0, 1)
        for load in (Load(3), Load(4))
        for _, _, varied in variants(profile)
    ]
    assert len({run.file_name for run in runs}) == len(runs)


def test_verdict() -> None:
    def result(speed: float, copies: int, out: int) -> dict[str, object]:
        keys = [key for key in METRICS if key.startswith(("ttft", "tbt"))]
        swaps = {"swaps": 10, "copies": copies, "blocks": 1000}
        return {
            **dict.fromkeys(keys, 10 / speed),
            **dict.fromkeys(METRICS, 1.0),
            **dict.fromkeys(keys, 10 / speed),
            "tokens_per_second": 100 * speed,
            "swaps": swaps,
            "swaps_full": swaps,
            "bytes_out": out,
            "bytes_in": out,
            "turns": 5,
        }

    made = {system.name: [result(2.0, 100, 8), result(2.0, 100, 8)] for system in SYSTEMS}
    made[FIRST] = [result(1.0, 64000, 8), result(0.5, 64000, 8)]
    made["block-major"] = [result(1.0, 1000, 8)] * 2
    made[WHOLE] = [result(4.0, 100, 2)] * 2
    rows = summary(made)
    whole = next(row for row in rows if row["system"] == WHOLE)
    assert set(whole["better"]) == set(RATIOS) == set(BOUNDS)
    assert whole["better_by_seed"]["ttft_p99"] == [4.0, 8.0]
    assert whole["better"]["throughput"] == 6.0
    found = verdict(rows)
    assert all(target.holds for target in found)
    assert [target.measured for target in found] == [6.0, 6.0, 6.0, 6.0, 10.0, 0.25]
    made[WHOLE] = made[PLAIN] = [result(0.5, 100, 8)] * 2
    assert sum(not target.holds for target in verdict(summary(made))) == 5


# ---- a whole run


SMALL = dataclasses.replace(load_profile("llama-8b-a10"), num_blocks=96, num_host_blocks=900)
ASKED = [
    WorkloadRequest(
        0.1 * number + 3.0 * turn,
        tuple(
            Span(f"s{number}/{at}", 150) if not answer else Span("", 120, at)
            for at in range(turn + 1)
            for answer in ((False, True) if at < turn else (False,))
        ),
        120,
        session=f"s{number}",
        turn=turn,
    )
    for number in range(10)
    for turn in range(2)
]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_modelled_run_answers_everything(system: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same work for all; only those that swap copy, as finely as they should."""
    monkeypatch.setattr(Load, "requests", lambda self, seed: ASKED)
    found = run_modelled(system, SMALL, Load(10), "random", 0)  # type: ignore[arg-type]
    assert found["turns"] == 20
    assert found["preemptions_per_turn"] > 0
    swaps = found["swaps"]
    name = system.name  # type: ignore[attr-defined]
    if name == "recompute":
        assert swaps["swaps"] == 0
        assert found["computed_again"] > 0
    else:
        assert swaps["swaps"] > 0
        assert found["bytes_out"] > 0
        per_block = {"layer-major": 64, "block-major": 1}.get(name)
        if per_block:
            assert swaps["copies"] == per_block * swaps["blocks"]
        else:
            assert swaps["copies"] < swaps["blocks"]
    if name in ("layer-major", "block-major", "block groups"):
        assert found["stall_seconds"] > 0


@pytest.mark.parametrize("name", [FIRST, WHOLE])
def test_steps_accounted_for_together_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "requests", lambda self, seed: ASKED)
    engines: list[SimulatedEngine] = []
    skipped = "cpu_seconds", "occupancy", "contended_share"

    def run(jumps: bool) -> dict[str, Any]:
        def make(*args: Any) -> SimulatedEngine:
            engines.append(SimulatedEngine(*args, jumps=jumps))
            return engines[-1]

        monkeypatch.setattr(switch_runs, "SimulatedEngine", make)
        found = run_modelled(BY_NAME[name], SMALL, Load(10), "markov", 1)
        # Pool and queue are looked at once for all steps of a stretch.
        return {key: found[key] for key in found if key not in skipped}

    one, other = run(True), run(False)
    assert engines[0].jumped > 0 == engines[1].jumped
    assert one.keys() == other.keys()
    for key, value in one.items():
        exact = isinstance(value, dict)  # counts
        assert value == (other[key] if exact else pytest.approx(other[key])), key


def test_the_engine_s_own_priorities_preempt_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Load, "requests", lambda self, seed: ASKED)
    given, own = (
        run_modelled(system, SMALL, Load(10), "random", 0) for system in (BY_NAME[WHOLE], OWN)
    )
    assert own["turns"] == given["turns"] == 20
    assert own["computed"] > 0
    assert 0 < own["preemptions_per_turn"] < given["preemptions_per_turn"]
