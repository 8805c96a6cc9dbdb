"""The sides of the bench of stalls, on a virtual clock."""

from __future__ import annotations

import itertools

import pytest

from bench.stall_free import rounds, targets
from bench.stall_runs import (
    CHUNKED,
    PREFILL_FIRST,
    SIDES,
    Clients,
    Load,
    Timing,
    run_modelled,
)
from cluster.simulation.profile import CopyCost, CostProfile, LinkCost
from instance.clock import VirtualClock
from instance.executor import ModelDescription
from instance.step_cost import StepCost

LOAD = Load(
    residents=3,
    prompt=20,
    output=60,
    longs=3,
    long_prompt=400,
    long_output=4,
    first=10,
    every=15,
)
STEP, TOKEN = 0.02, 0.001
PROFILE = CostProfile(
    name="toy",
    model=ModelDescription("toy", "float16", 16, 2, 2, 8, 512, 4096, (511,)),
    step=StepCost(base=STEP, prefill_token=TOKEN, decode_sequence=0.0, context_token=0.0),
    copy_out=CopyCost(1e9),
    copy_in=CopyCost(1e9),
    link=LinkCost(1e9),
    num_blocks=200,
)


@pytest.fixture(scope="module")
def runs() -> dict[str, Clients]:
    return {side: run_modelled(PROFILE, LOAD, side) for side in SIDES}


def gaps(clients: Clients) -> list[float]:
    return [
        later - sooner
        for one in clients.residents
        for sooner, later in itertools.pairwise(one.times)
    ]


def test_both_sides_do_the_same_work(runs: dict[str, Clients]) -> None:
    for clients in runs.values():
        assert [len(one.times) for one in clients.residents] == [60] * 3
        assert [len(one.times) for one in clients.longs] == [4] * 3
        for number, one in enumerate(clients.longs):
            sent = sum(time <= one.sent for time in clients.residents[0].times)
            assert sent == 10 + 15 * number
        assert clients.undisturbed() == pytest.approx(STEP)


def test_decodes_pause_for_a_whole_prompt_where_prefill_is_first(runs: dict[str, Clients]) -> None:
    clients = runs[PREFILL_FIRST]
    long = STEP + 400 * TOKEN
    for one in clients.residents:
        times = one.times
        between = [later - sooner for sooner, later in itertools.pairwise(times)]
        stalls = [gap for gap in between if gap > 2 * STEP]
        # One for each prompt: the step of the prompt, and that of the next tokens.
        assert stalls == pytest.approx([long + STEP] * 3)
    for one in clients.longs:
        # It may have to wait for the step that runs and the one planned by then.
        assert one.times[0] - one.sent <= long + 2 * STEP + 1e-9


def test_no_decode_is_skipped_where_prompts_are_chunked(runs: dict[str, Clients]) -> None:
    clients = runs[CHUNKED]
    figures = clients.figures(STEP)
    assert max(gaps(clients)) < STEP + 400 * TOKEN
    assert figures["tbt_p99"] < runs[PREFILL_FIRST].figures(STEP)["tbt_p99"]
    assert figures["ttft"] > runs[PREFILL_FIRST].figures(STEP)["ttft"]
    # All that is computed from the first long prompt on, at what it takes at least.
    assert figures["tokens_per_second"] < 1 / TOKEN + 3 / STEP


def test_undisturbed_steps_are_those_in_which_no_prompt_is_read() -> None:
    clients = Clients(LOAD, CHUNKED, VirtualClock(), range(9))
    clients.residents.append(Timing(0.0, [1.0, 2.0, 9.0, 16.0, 19.0, 23.0]))
    clients.longs += [Timing(2.5, [15.5, 15.6]), Timing(20.0, [22.0])]
    # From 1 to 2, and from 16 to 19.
    assert clients.undisturbed() == 2.0


def test_figures_are_in_undisturbed_steps(runs: dict[str, Clients]) -> None:
    one, half = (runs[CHUNKED].figures(alone) for alone in (STEP, STEP / 2))
    for name in ("tbt_p50", "tbt_p99", "tbt_max"):
        assert half[name] == pytest.approx(2 * one[name])
    assert half["seconds"] == one["seconds"]


def test_a_round_has_both_sides_and_a_verdict() -> None:
    rows = rounds("toy", lambda side: run_modelled(PROFILE, LOAD, side), 2)
    assert [row["side"] for row in rows] == [*SIDES, *SIDES]
    assert rows[:2] == [{**row, "round": 0} for row in rows[2:]]
    tail, rate = targets(rows)
    assert tail.measured == rows[0]["tbt_p99"]
    assert rate.measured == rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]


def test_residents_must_outlive_the_prompts() -> None:
    with pytest.raises(ValueError, match="residents end"):
        Load(1, 10, 20, 3, 100, 1, 10, 6)
