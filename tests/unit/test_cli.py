"""The command line: errors, exit codes and what operators see."""

import json
import os
import stat

import httpx
import pytest

from cluster import cli
from cluster.local import local_clusters, write_state

STATUS = {
    "instances": [
        {
            "instance_id": "instance-0",
            "state": "ready",
            "running": 2,
            "waiting": 0,
            "load": 0.25,
            "freeness": 321.4,
            "step_seconds": 0.0123,
            "node": "here",
        },
        {
            "instance_id": "instance-1",
            "state": "draining",
            "running": 0,
            "waiting": 0,
            "load": 0.0,
            "freeness": None,
            "step_seconds": 0.0,
            "node": "here",
        },
    ],
    "requests": [
        {
            "request_id": "chatcmpl-1",
            "instance_id": "instance-0",
            "state": "running",
            "migrating": True,
            "class": "standard",
            "tenant": "default",
            "tokens": 77,
            "blocks": 5,
        }
    ],
    "migrations": [],
}
REPORT = {
    "request_id": "chatcmpl-1",
    "source": "instance-0",
    "destination": "instance-1",
    "reason": "admin",
    "outcome": "moved",
    "stages": 2,
    "blocks": 5,
    "bytes_copied": 3 << 20,
    "copies": 2,
    "duration": 0.25,
    "detached": 0.0042,
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("DROVER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def answers(monkeypatch):
    """Answers of a gateway by path; requests seen are appended under "seen"."""
    table: dict = {"seen": []}

    def request(method, url, **options) -> httpx.Response:
        table["seen"].append((method, url, options["json"], options["headers"]))
        status, body = table[httpx.URL(url).path]
        return httpx.Response(status, json=body)

    monkeypatch.setattr(httpx, "request", request)
    return table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--max-num-seq", "4"], "did you mean --max-num-seqs"),
        (["serve", "--port", "70000"], "--port: 70000 is more than 65535"),
        (["migrate"], "REQUEST_ID"),
        (["sing"], "invalid choice: 'sing'"),
    ],
)
def test_usage_errors_go_to_stderr_with_code_2(arguments, message, capsys) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_without_a_command_help_is_shown(capsys) -> None:
    assert cli.main([]) == 2
    assert "serve" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "status", "migrate"])
def test_help_has_examples(command, capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"drover {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_status_of_the_cluster_on_this_machine(answers, capsys) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers["/admin/status"] = (200, STATUS)
    assert cli.main(["status"]) == 0
    text = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0] == "INSTANCE STATE RUNNING WAITING KV USED FREENESS STEP ms NODE"
    assert rows[1] == "instance-0 ready 2 0 25% 321 12.3 here"
    assert rows[2] == "instance-1 draining 0 0 0% - 0.0 here"
    assert rows[5] == "chatcmpl-1 instance-0 migrating standard default 77 5"
    ((method, url, _, headers),) = answers["seen"]
    assert (method, url) == ("GET", "http://127.0.0.1:8123/admin/status")
    assert headers == {"Authorization": "Bearer the-key"}


def test_status_as_json(answers, capsys) -> None:
    answers["/admin/status"] = (200, STATUS)
    assert cli.main(["status", "--json", "--url", "http://elsewhere/", "--admin-key", "k"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_migrate(answers, capsys) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers["/admin/migrate"] = (200, REPORT)
    assert cli.main(["migrate", "chatcmpl-1", "--to", "instance-1"]) == 0
    text = capsys.readouterr().out
    assert "chatcmpl-1 moved from instance-0 to instance-1" in text
    assert "3.0 MiB" in text
    ((_, _, body, _),) = answers["seen"]
    assert body == {"request_id": "chatcmpl-1", "destination": "instance-1"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": {"message": "no instance holds this request"}}), "no instance holds"),
        ((500, ["?"]), "answered 500"),
        ((200, {**REPORT, "outcome": "refused: no room"}), "stayed on instance-0: refused"),
    ],
)
def test_failures_go_to_stderr_with_code_1(answers, capsys, answer, message) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers["/admin/migrate"] = answer
    assert cli.main(["migrate", "chatcmpl-1"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_no_cluster_and_several_clusters(capsys) -> None:
    assert cli.main(["status"]) == 1
    assert "no cluster runs on this machine" in capsys.readouterr().err
    write_state("http://127.0.0.1:1", 1, "a")
    write_state("http://127.0.0.1:2", 2, "b")
    assert cli.main(["status"]) == 1
    assert "choose with --url: http://127.0.0.1:1, http://127.0.0.1:2" in capsys.readouterr().err


def test_a_server_that_does_not_answer(capsys) -> None:
    assert cli.main(["status", "--url", "http://127.0.0.1:1"]) == 1
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().err


def test_state_files_are_private_and_those_of_dead_clusters_vanish() -> None:
    path = write_state("http://127.0.0.1:8123", 8123, "the-key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one["url"] for one in local_clusters()] == ["http://127.0.0.1:8123"]
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "pid": 2**22 + 1}))
    assert local_clusters() == []
    assert not path.exists()
