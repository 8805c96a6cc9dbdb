"""`drover replay` and `drover calibrate --url` against a real gateway with modelled steps."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.admin_client import AdminClient
from cluster.replay.client import CompletionClient, ServerError
from cluster.replay.run import Replay, ReplaySettings
from cluster.simulation import mixed_load
from cluster.simulation.calibration import CalibrationError
from cluster.simulation.profile_files import load_profile
from cluster.simulation.remote_calibration import members
from cluster.simulation.workloads.generators import ThinkTime, sessions, single_requests
from cluster.simulation.workloads.records import WorkloadRequest
from cluster.simulation.workloads.sources import load_workload
from cluster.simulation.workloads.transform import mean_rate
from instance.step_cost import StepCost
from tests.integration.modelled_gateway import PRINTABLE, modelled_gateway

KEY = "a client's key"
COST = StepCost(0.004, 2e-5, 1e-4, 1e-7)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with modelled_gateway(tmp_path_factory.mktemp("model"), COST) as url:
        yield url


def replay(
    url: str, requests: list[WorkloadRequest], timeout: float = 0.0, **settings: Any
) -> Replay:
    async def run() -> Replay:
        async with CompletionClient(url, timeout=timeout) as client:
            model, _ = await client.model()
            one = Replay(
                client,
                requests,
                ReplaySettings(model, await client.vocabulary(model), **settings),
            )
            await one.run()
            return one

    return asyncio.run(run())


def test_requests_are_sent_when_due_and_answered(url: str) -> None:
    requests = single_requests([0.0, 0.0, 0.3], [20, 30, 40], [5, 9, 1])
    done = replay(url, requests)
    assert done.finished == 3
    by_number = sorted(done.results, key=lambda one: one.number)
    assert [one.failure for one in by_number] == ["", "", ""]
    assert [one.prompt_tokens for one in by_number] == [20, 30, 40]
    assert [one.output_tokens for one in by_number] == [5, 9, 1]
    for one in by_number:
        assert one.due - 1e-3 <= one.sent <= one.arrivals[0] <= one.ended <= done.seconds
        assert 1 <= len(one.arrivals) <= one.output_tokens
    assert by_number[2].due == 0.3


def test_turns_hold_the_answers_that_were_given(url: str) -> None:
    talk = [[(40, 30), (20, 10), (5, 3)], [(9, 4)]]
    requests = sessions(1, talk, 50.0, 1.0, ThinkTime(0.02, 0.05), system=20)
    done = replay(url, requests)
    of_first = sorted((r for r in done.results if r.session == "s0"), key=lambda one: one.turn)
    assert [one.failure for one in done.results] == [""] * 4
    # A byte is a token here, so what was said comes back as so many tokens.
    assert [one.prompt_tokens for one in of_first] == [60, 60 + 30 + 20, 60 + 30 + 20 + 10 + 5]
    for before, after in itertools.pairwise(of_first):
        assert after.sent >= before.ended
        # Only a true continuation is found in the prefix cache.
        assert after.cached_tokens >= (before.prompt_tokens + before.output_tokens - 1) // 16 * 16


def test_failures_are_counted_by_kind(url: str) -> None:
    too_long = single_requests([0.0, 0.0], [20, 2000], [5, 5])
    done = replay(url, too_long)
    assert sorted(one.failure for one in done.results) == ["", "http_400"]
    slow = single_requests([0.0], [20], [1000])
    assert [one.failure for one in replay(url, slow, timeout=0.3).results] == ["timeout"]
    talk = sessions(1, [[(2000, 5), (5, 5), (5, 5)]], 50.0, 1.0, ThinkTime(0.01, 0.01))
    # What follows a turn that failed is not sent: there is nothing to go on from.
    assert [one.failure for one in replay(url, talk).results] == ["http_400"]


def test_at_most_so_many_at_once(url: str) -> None:
    requests = single_requests([0.0] * 6, [20] * 6, [8] * 6)
    done = replay(url, requests, max_concurrency=2)
    assert all(not one.failure for one in done.results)
    spans = [(one.sent, one.ended) for one in done.results]
    assert all(sum(a <= start < b for a, b in spans) <= 2 for start, _ in spans)


def test_nobody_answers() -> None:
    async def ask() -> None:
        async with CompletionClient("http://127.0.0.1:9") as client:
            await client.model()

    with pytest.raises(ServerError, match="does not answer"):
        asyncio.run(ask())


def test_the_command(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    workload = "tenants-overloaded?rates=20,40&seconds=0.5&prompt=30-60&output=4"
    arguments = ["replay", workload, "--url", url, "--json", str(output), "--save-detailed"]
    assert cli.main([*arguments, "--goodput", "ttft:60000", "tpot:60000"]) == 0
    summary = json.loads(output.read_text())
    assert summary["failed"] == 0
    assert summary["completed"] == len(summary["ttfts"]) > 10
    assert set(summary["tenants"]) == {"tenant-1", "tenant-2"}
    assert summary["request_goodput"] == pytest.approx(summary["request_throughput"])
    assert summary["interrupted"] is False
    told = capsys.readouterr().out
    assert "time to first token" in told
    assert "tenant-2" in told


def test_a_workload_may_be_written_instead(tmp_path: Path) -> None:
    path = tmp_path / "workload.jsonl"
    workload = "sessions?sessions=5&system=9"
    assert cli.main(["replay", workload, "--seed", "3", "--write-workload", str(path)]) == 0
    assert load_workload(f"drover:{path}") == load_workload(workload, 3)
    shape = ["--num-prompts", "4", "--request-rate", "8"]
    assert cli.main(["replay", "fixed", *shape, "--write-workload", str(path)]) == 0
    stretched = load_workload(f"drover:{path}")
    assert len(stretched) == 4
    assert mean_rate(stretched) == pytest.approx(8)
    shape += ["--burstiness", "0.5"]
    assert cli.main(["replay", "fixed", *shape, "--write-workload", str(path)]) == 0
    drawn = load_workload(f"drover:{path}")
    assert [one.prompt for one in drawn] == [one.prompt for one in stretched]
    assert [one.arrival for one in drawn] != [one.arrival for one in stretched]
    lost = str(tmp_path / "no" / "x.jsonl")
    assert cli.main(["replay", workload, "--write-workload", lost]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "wrong"),
    [
        (("llumnix-x-x",), 1, "no workload"),
        (("fixed", "--goodput", "speed:3"), 2, "speed"),
        (("fixed", "--request-rate", "often"), 2, "often"),
        (("fixed", "--burstiness", "0.5"), 2, "--request-rate"),
        (("fixed", "--timeout", "-1"), 2, "--timeout"),
        (("fixed", "--keys", "no-such-file"), 1, "no-such-file"),
        (("fixed", "--json", "no/such/x.json"), 1, "no folder"),
        (("fixed", "--url", "http://127.0.0.1:9"), 1, "does not answer"),
    ],
)
def test_what_prevents_it_is_said(
    url: str,
    arguments: tuple[str, ...],
    code: int,
    wrong: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["replay", "--url", url, *arguments]) == code
    assert wrong in capsys.readouterr().err


def test_ctrl_c_gives_the_figures_until_then(url: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    workload = "fixed?rate=20&requests=5000&prompt=20&output=3"
    # Tests that run as a shell's background job would hand on that Ctrl-C is ignored.
    start = (
        "import signal, sys; from cluster.cli import main;"
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", start, "replay", workload]
    with subprocess.Popen(
        [*command, "--url", url, "--json", str(output)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            ended = re.search(r"(\d+)/5000 ended", line)
            if ended and int(ended[1]) >= 5:
                break
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.stderr.read()
    assert process.returncode == 1
    summary = json.loads(output.read_text())
    assert summary["interrupted"] is True
    assert 5 <= summary["num_prompts"] < 5000
    assert summary["completed"] >= 5
    assert set(summary["failures"]) <= {"interrupted"}


def test_tenants_bring_their_keys(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys = tmp_path / "keys.yaml"
    keys.write_text(json.dumps({"tenant-1": KEY, "tenant-2": "wrong"}))
    output = tmp_path / "out.json"
    folder = tmp_path / "model"
    folder.mkdir()
    workload = "tenants-overloaded?rates=20,20&seconds=0.5&prompt=30&output=4"
    with modelled_gateway(folder, COST, api_key_hashes=(digest,)) as url:
        arguments = ["replay", workload, "--url", url, "--keys", str(keys), "--json", str(output)]
        assert cli.main([*arguments, "--client-key", KEY]) == 0
    tenants = json.loads(output.read_text())["tenants"]
    assert tenants["tenant-1"]["failed"] == 0 < tenants["tenant-1"]["completed"]
    assert tenants["tenant-2"]["completed"] == 0 < tenants["tenant-2"]["failed"]


# ---- drover calibrate --url


def instances(count: int = 1, **changes: Any) -> dict[str, Any]:
    model = {
        "name": "m", "dtype": "float32", "block_size": 16, "num_layers": 1, "num_kv_heads": 1,
        "head_dim": 1, "vocab_size": PRINTABLE.stop, "max_model_len": 1024,
        "eos_token_ids": [1, 2], "adapter": "", "num_shards": 1,
    }  # fmt: skip
    one = {"model": model, "total_blocks": 511, "max_num_seqs": 64, "state": "ready", **changes}
    return {"instances": [one] * count}


def test_a_cluster_is_measured_from_outside(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(self: AdminClient, method: str, path: str, body: object = None) -> Any:
        assert (method, path) == ("GET", "/admin/instances")
        return instances()

    monkeypatch.setattr(AdminClient, "call", call)
    monkeypatch.setattr(mixed_load, "QUICK_REQUESTS", 20)
    output = tmp_path / "cluster.yaml"
    assert cli.main(["calibrate", "--url", url, "--quick", "--name", "out", "-o", str(output)]) == 0
    profile = load_profile(str(output))
    assert profile.name == "out"
    assert profile.num_blocks == 511
    assert profile.link == load_profile("llama-8b-a10").link
    assert "not measured" in profile.sources["link"]
    assert profile.overhead > 0
    # Whether so short a load tells of scatter is a matter of the machine.
    assert "mixed load" in profile.sources["scatter"]
    told = capsys.readouterr().err
    assert re.search(r"mixed load: (speeds of \d|20 answers tell of no scatter)", told)
    assert "mixed load: mean time to the first token" in told
    # A loaded machine only adds to what steps take.
    assert profile.step.of(0, 0, 4, 400) > 0.1 * COST.of(0, 0, 4, 400)


def test_what_the_admin_api_may_say() -> None:
    assert len(members(instances(3))) == 3
    wrong: list[tuple[Any, str]] = [
        (instances(0), "no instance"),
        (instances(state="draining"), "no instance"),
        ({}, "not understood"),
        (instances(model={}), "not understood"),
    ]
    mixed = instances()
    mixed["instances"] += instances(total_blocks=5)["instances"]
    for answer, text in [*wrong, (mixed, "differ")]:
        with pytest.raises(CalibrationError, match=text):
            members(answer)
