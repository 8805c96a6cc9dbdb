"""What a simulation writes: figures, plots, the decision log, and the command itself."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import cli, simulating
from cluster.flags import ConfigError
from cluster.simulation import charts
from cluster.simulation.decisions import DecisionLog, mean_regret
from cluster.simulation.network import NetworkConfig
from cluster.simulation.profile_files import format_profile, load_profile
from cluster.simulation.records import InstanceRecord, RequestRecord
from cluster.simulation.report import FIGURES, html_report
from cluster.simulation.results import (
    _fairness,
    _fragmentation,
    latencies,
    stages,
    statistics,
    summarize,
)
from cluster.simulation.settings import SimulateConfig, make_plan
from cluster.simulation.simulation import Death, Simulation
from cluster.simulation.workloads.generators import single_requests
from instance.load import Role
from instance.request import RequestClass
from tests.unit.simulating import profile, scenario, simulate, workload


def figures(**more: Any) -> dict[str, Any]:
    return summarize(simulate(scenario(**more), workload(40, rate=8.0))[1])


def record(
    name: str, tenant: str, arrival: float, times: list[float], prompt: int = 10
) -> RequestRecord:
    made = RequestRecord(name, tenant, RequestClass.STANDARD, "", arrival, prompt, len(times))
    made.times.extend(times)
    made.ended, made.status = times[-1], "finished"
    return made


def test_the_summary_adds_up() -> None:
    found = figures()
    assert found["complete"]
    assert found["finished"] == found["requests"] == 40
    assert found["lost_tokens"] == 0
    asked = workload(40, rate=8.0)
    tokens = found["throughput"]["output_tokens_per_second"] * found["seconds"]
    assert tokens == pytest.approx(sum(one.output_tokens for one in asked))
    latency = found["latency"]
    assert latency["ttft"]["p50"] <= latency["ttft"]["p99"] <= latency["e2e"]["max"]
    assert len(latency["e2e"]["curve"]) == 51
    assert set(found["instances"]) == {"instance-0", "instance-1", "instance-2"}
    assert found["tenants"]["default"]["requests"] == 40
    assert json.loads(json.dumps(found)) == found


def test_preemption_loss_counts_to_the_next_token_beyond_the_running_step() -> None:
    one = record("a", "t", 0.0, [1.0, 1.1])
    one.preempted(1.15, step=0.1, known=3)
    one.times.append(1.2)  # the running step still brought it
    one.resumed()
    assert one.preempted_at is not None
    one.times.append(4.25)
    one.resumed()
    assert one.preemption_loss == pytest.approx(4.25 - 1.15 - 0.1)


def test_the_stages_of_a_request_add_up_to_all_of_its_time() -> None:
    roles = (("instance-0", Role.PREFILL), ("instance-1", Role.DECODE), ("instance-2", Role.DECODE))
    one = scenario()
    apart = dataclasses.replace(one, dispatcher=dataclasses.replace(one.dispatcher, roles=roles))
    for told, moves in ((scenario(rebalance=False), False), (apart, True)):
        outcome = simulate(told, workload(30, rate=4.0))[1]
        assert all(done.arrival < done.started < done.times[0] for done in outcome.requests)
        found = stages(outcome.requests)
        whole = latencies(outcome.requests)["e2e"]["mean"]
        assert sum(part["mean"] for part in found.values()) == pytest.approx(whole)
        assert (found["transfer"]["max"] > 0) == moves
        assert min(done.transfer for done in outcome.requests) >= 0


def test_memory_is_fragmented_where_it_would_do_in_one_place() -> None:
    def instance(used: int, wanted: int) -> InstanceRecord:
        return InstanceRecord(
            100,
            array("d", [0.0, 10.0]),
            array("l", [used, used]),
            array("l", [1, 1]),
            array("l", [1, 1]),
            array("l", [wanted, wanted]),
            array("l", [0, 0]),
        )

    apart = _fragmentation({"a": instance(80, 30), "b": instance(80, 0)})
    assert apart["mean"] == pytest.approx(30 / 200)
    full = _fragmentation({"a": instance(95, 30), "b": instance(90, 0)})
    assert full["mean"] == 0.0


def test_the_gap_is_between_tenants_that_ask_all_the_time() -> None:
    busy = [record("a", "one", 0.0, [float(k) for k in range(1, 101)])]
    rarely = [record("b", "two", 50.0, [50.5])]
    assert _fairness(busy + rarely)["gap_mean"] is None
    twice = [record("c", "two", 0.0, [k / 2 for k in range(1, 201)])]
    assert _fairness(busy + twice)["gap_mean"] == pytest.approx(2.0, rel=0.1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_statistics_are_ordered(values: list[float]) -> None:
    found = statistics(values)
    assert found["p50"] <= found["p80"] <= found["p95"] <= found["p99"] <= found["max"]


# ---- plots


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(
    series=st.dictionaries(
        st.text("ab<&\"'", min_size=1, max_size=5),
        st.lists(st.tuples(NUMBERS, st.none() | NUMBERS), max_size=20),
        max_size=3,
    ),
    log_y=st.booleans(),
)
def test_lines_are_valid_and_within_the_frame(
    series: dict[str, list[tuple[float, float | None]]], log_y: bool
) -> None:
    tree = ElementTree.fromstring(charts.lines("t", series, "x", "y", log_y=log_y))
    for path in tree.iter("path"):
        numbers = [float(one.strip("ML")) for one in path.attrib["d"].split()]
        assert all(-0.1 <= x <= charts.WIDTH + 0.1 for x in numbers[::2])
        assert all(-0.1 <= y <= charts.HEIGHT + 0.1 for y in numbers[1::2])


def test_bars_are_as_high_as_their_values() -> None:
    tree = ElementTree.fromstring(charts.bars("t", {"p": {"a": 1.0, "b": 4.0}}, "y"))
    heights = [float(one.attrib["height"]) for one in tree.iter("rect") if "title" in _tags(one)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.5)


def _tags(element: ElementTree.Element) -> list[str]:
    return [child.tag for child in element]


def test_the_report_stands_alone_and_names_every_policy() -> None:
    runs = {"freeness": figures(), "round_robin <b>": figures(placement="round_robin")}
    page = html_report(
        {"version": "1", "workload": "w", "seed": 0, "config": {"rate": 2}, "policies": runs}
    )
    assert "http" not in page
    assert "<script" not in page
    assert "round_robin &lt;b&gt;" in page
    assert "<b>" not in page
    start = 0
    drawn = 0
    while (start := page.find("<svg", start)) >= 0:
        end = page.index("</svg>", start) + len("</svg>")
        ElementTree.fromstring(page[start:end])
        drawn, start = drawn + 1, end
    assert drawn >= 10
    for name, find, _ in FIGURES:
        if find(runs["freeness"]) is not None:
            assert name in page


# ---- decisions


def test_every_placement_and_move_is_explained() -> None:
    step = profile().step
    log = DecisionLog(lambda name: step)
    given_scenario = scenario(placement="round_robin")
    asked = workload(40, rate=8.0)
    outcome = Simulation(given_scenario, asked, log, log.policies()).run()
    entries = log.entries(outcome)
    placed = [one for one in entries if one["decision"] == "place"]
    assert len(placed) == 40
    for entry in placed:
        assert entry["instance"] in entry["candidates"]
        assert 1 <= len(entry["candidates"]) <= 3  # those with room
        assert all(one["expected_ttft"] > 0 for one in entry["candidates"].values())
        assert entry["hindsight"]["ttft"] > 0
        assert entry["hindsight"]["regret"] >= 0
    moves = [one for one in entries if one["decision"] == "migrate"]
    assert len(moves) == len(outcome.migrations) > 0
    assert all(one["source"] in one["freeness"] for one in moves)
    assert mean_regret(entries)["placements"] == 40
    lines = list(log.lines(outcome))
    assert [json.loads(line) for line in lines] == entries
    # Watching changes nothing.
    alone = simulate(given_scenario, asked)[1]
    assert [one.times for one in alone.requests] == [one.times for one in outcome.requests]


# ---- the command


def plan_of(**more: Any) -> Any:
    return make_plan(SimulateConfig(workload="fixed?requests=5&rate=2", **more))


def test_flags_become_scenarios() -> None:
    plan = plan_of(
        profile=("llama-7b-a10*2", "llama-8b-a10*1"),
        policies="freeness:early, round_robin:still",
        kill=("1@3+2.5", "2@4"),
        set=("max-num-seqs=32",),
        seed=7,
    )
    assert [one.name for one in plan.profiles] == ["llama-7b-a10"] * 2 + ["llama-8b-a10"]
    early, still = plan.scenarios["freeness:early"], plan.scenarios["round_robin:still"]
    assert early.dispatcher.requests.run_ahead is None
    assert early.dispatcher.rebalance.enabled
    assert not still.dispatcher.rebalance.enabled
    assert still.dispatcher.placement == "round_robin"
    assert early.deaths == (Death(3.0, 1, 2.5), Death(4.0, 2, None))
    assert early.engine.scheduler.max_num_seqs == 32
    assert early.seed == 7


def test_what_requests_take_beside_their_steps_is_part_of_a_profile(tmp_path: Path) -> None:
    means = []
    for overhead in (0.0, 0.25):
        path = tmp_path / f"{overhead}.yaml"
        path.write_text(format_profile(replace(load_profile("llama-8b-a10"), overhead=overhead)))
        plan = plan_of(profile=(f"{path}*2",), policies="freeness")
        outcome = Simulation(plan.scenarios["freeness"], plan.workload).run()
        means.append(summarize(outcome)["latency"]["ttft"]["mean"])
    default = NetworkConfig()
    known = default.gateway + 2 * default.actor + default.message
    assert means[1] - means[0] == pytest.approx(0.25 - known)


def test_requests_that_meet_delay_each_other_as_a_profile_says(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(format_profile(replace(load_profile("llama-8b-a10"), contention=0.25)))
    made = {
        name: plan_of(profile=(f"{name}*2",), policies="freeness")
        for name in ("llama-8b-a10", str(path))
    }
    for gap, later in ((100.0, [0.0] * 3), (0.001, [0.0, 0.25, 0.25])):
        asked = single_requests([gap * n for n in range(3)], [64] * 3, [8] * 3)
        alone, beside = (
            Simulation(plan.scenarios["freeness"], asked).run().requests for plan in made.values()
        )
        firsts = [two.times[0] - one.times[0] for one, two in zip(alone, beside, strict=True)]
        assert firsts == pytest.approx(later, abs=0.08)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"policies": "freenes"}, "freenes"),
        ({"policies": "freeness:fast"}, "fast"),
        ({"policies": ","}, "none"),
        ({"profile": ("llama-9b",)}, "llama-9b"),
        ({"profile": ("llama-7b-a10", "llama-8b-a10*2")}, "count"),
        ({"kill": ("9@1",)}, "9@1"),
        ({"kill": ("x",)}, "--kill x"),
        ({"set": ("max-nun-seqs=3",)}, "max-num-seqs"),
        ({"set": ("max-num-seqs=many",)}, "many"),
    ],
)
def test_what_makes_no_sense_is_said(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("*", r"\*")):
        plan_of(**more)


def test_simulate_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "html", "log")}
    arguments = [
        *("simulate", "fixed?requests=12&rate=4", "--instances", "2", "--seed", "3"),
        *("--policies", "freeness,round_robin:still"),
        *(part for name, path in paths.items() for part in (f"--{name}", str(path))),
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "time to first token" in shown.out
    assert "round_robin:still" in shown.out
    result = json.loads(paths["json"].read_text())
    assert list(result["policies"]) == ["freeness", "round_robin:still"]
    assert result["policies"]["freeness"]["finished"] == 12
    assert result["seed"] == 3
    assert result["version"]
    assert "regret_mean" in result["policies"]["freeness"]["decisions"]
    assert paths["html"].read_text().startswith("<!doctype html>")
    assert len(paths["log"].read_text().splitlines()) >= 24
    assert cli.main(arguments) == 0
    again = json.loads(paths["json"].read_text())
    assert again["policies"] == result["policies"]


def test_an_interrupted_simulation_keeps_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = simulating._simulate, []

    def interrupted(name: str, plan: Any, logged: bool) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(name, plan, logged)

    monkeypatch.setattr(simulating, "_simulate", interrupted)
    path = tmp_path / "out.json"
    arguments = ["simulate", "fixed?requests=4&rate=4", "--instances", "1", "--json", str(path)]
    assert cli.main(arguments) == cli.FAILURE
    assert "1 of 2 policies" in capsys.readouterr().err
    assert list(json.loads(path.read_text())["policies"]) == ["freeness"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["simulate"], "workload"),
        (["simulate", "llumnix-m-n"], "llumnix-m-m"),
        (["simulate", "fixed", "--json", "/no/such/folder/out.json"], "no folder"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == cli.USAGE
    assert text in capsys.readouterr().err
