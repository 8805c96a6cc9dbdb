"""The bench of priorities: the same requests on every side, and ratios to the blind one."""

from __future__ import annotations

import dataclasses

import pytest

from bench import priorities as bench
from instance.request import RequestClass


def run(side: str) -> bench.Run:
    return bench.Run(side, 4.0, 8.0, 1, 30, 2)


def test_sides_differ_by_the_class_alone() -> None:
    blind, order, headroom, less = (run(side).workload() for side in bench.SIDES)
    assert order == headroom == less
    assert {one.request_class for one in blind} == {RequestClass.STANDARD}
    assert any(one.request_class is RequestClass.INTERACTIVE for one in order)
    plain = [dataclasses.replace(one, request_class=RequestClass.STANDARD) for one in order]
    assert plain == blind
    for one in order:
        assert (one.group == bench.HIGH) == (one.request_class is RequestClass.INTERACTIVE)


def test_a_run_tells_high_and_normal_apart() -> None:
    found = run(bench.HEADROOM).execute()
    assert found["finished"] == 30
    assert found["complete"]
    assert {part: set(of) for part, of in found["figures"].items()} == {
        bench.HIGH: set(bench.FIGURES),
        bench.NORMAL: set(bench.FIGURES),
    }


def test_the_verdict_is_on_pairs_of_runs() -> None:
    def figures(high: float, normal: float) -> dict[str, dict[str, float]]:
        return {
            bench.HIGH: dict.fromkeys(bench.FIGURES, high),
            bench.NORMAL: dict.fromkeys(bench.FIGURES, normal),
        }

    results = [
        {
            "run": {"rate": 78.0, "burstiness": cv, "seed": 1, "side": side},
            "figures": figures(*values),
        }
        for cv in (2.0, 4.0)
        for side, values in {
            bench.BLIND: (cv, cv),
            bench.ORDER: (cv, cv),
            bench.HEADROOM: (cv / (cv / 2), cv * 1.02),
        }.items()
    ]
    high, normal = bench.targets_of(bench.cells_of(results))
    assert high.measured == pytest.approx(2.0**0.5)
    assert high.holds
    assert normal.measured == pytest.approx(1.02)
    assert normal.holds


def test_the_quick_form_has_every_side() -> None:
    assert {one.side for one in bench.runs_of(True, bench.RATES, 0, 0)} == set(bench.SIDES)
