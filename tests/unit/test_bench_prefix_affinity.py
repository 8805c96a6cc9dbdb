"""The bench of prefix affinity: its workload, its figures and its verdict."""

from __future__ import annotations

from collections import Counter

import pytest

from bench import prefix_affinity as bench
from cluster.simulation.records import RequestRecord
from instance.request import RequestClass


def record(instance: str, prompt: int, cached: int) -> RequestRecord:
    made = RequestRecord("r", "t", RequestClass.STANDARD, "", 0.0, prompt, 1)
    made.cached, made.instances = cached, [instance]
    return made


def test_what_was_computed_and_where() -> None:
    done = [record("a", 100, 60), record("a", 100, 0), record("b", 60, 0), record("b", 60, -1)]
    found = bench.prefill_of(done, 4)
    assert found["prompt tokens computed"] == 260.0
    assert found["hit rate"] == pytest.approx(60 / 320)
    assert found["imbalance"] == pytest.approx(140 / (260 / 4))


def test_few_prefixes_are_shared_and_some_more_than_others() -> None:
    asked = bench.shared(10.0, 2000, 1)
    counts = Counter(one.prompt[0].stream for one in asked)
    assert len(counts) == bench.SETTINGS["prefixes"]
    assert counts.most_common(1)[0][0] == "prefix-0"
    assert len({one.prompt[1].stream for one in asked}) == len(asked)
    assert asked == bench.shared(10.0, 2000, 1) != bench.shared(10.0, 2000, 2)


def test_the_verdict_is_per_workload() -> None:
    def cell(hit: float, time: float) -> dict[str, dict[str, float]]:
        plain = {"hit rate": 0.5, "imbalance": 1.0, "TTFT P99": 2.0}
        follow = {"hit rate": 0.8, "imbalance": 1.5, "TTFT P99": 4.0}
        ours = {"hit rate": hit, "imbalance": 1.2, "TTFT P99": time}
        return {"round_robin": plain, "freeness": follow, bench.OURS: ours}

    targets = bench.targets_of({"one": cell(0.8, 2.0), "other": cell(0.6, 2.2)})
    assert [target.measured for target in targets] == pytest.approx([1.0, 1.0, 0.75, 1.1])
    assert [target.holds for target in targets] == [True, True, False, False]


def test_a_run_finds_what_was_cached() -> None:
    run = bench.Run(bench.SHARED, "prefix", 8.0, 1, 200, 2)
    found = run.execute()
    assert found["complete"]
    assert 0.0 < found["figures"]["hit rate"] < 1.0
    assert found["figures"]["imbalance"] >= 1.0


def test_the_forms() -> None:
    full = bench.runs_of(False, 2000, 2)
    assert len({one.file_name for one in full}) == len(full) == 20
    assert {one.policy for one in bench.runs_of(True, 1, 1)} == set(bench.POLICIES)
