"""The command line: errors, exit codes and what operators see."""

import io
import json
import os
import re
import shlex
import stat
from pathlib import Path

import httpx
import pytest

from cluster import cli, operating, top
from cluster.admin_client import AwayError
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
    "num_requests": 3,
    "migrations": [],
    "tenants": [
        {
            "tenant": "alpha",
            "weight": 2.0,
            "running": 1,
            "waiting": 0,
            "counter": 120.4,
            "behind": 0.0,
        },
        {
            "tenant": "beta",
            "weight": 1.0,
            "running": 1,
            "waiting": 4,
            "counter": 100.0,
            "behind": 20.4,
        },
    ],
    "held": 4,
    "store": {"kind": "redis", "address": "h:6379", "up": False, "error": "refused"},
    "started": 5.0,
    "placement": "freeness",
    "rebalance": True,
    "counters": {"placements": {"new": 10, "held": 4}, "migrations_started": {"balance": 1}},
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


@pytest.mark.parametrize("command", ["serve", *operating.COMMANDS])
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
    assert rows[6] == "and 2 more"
    # The tenant that waits comes first.
    assert rows[8:11] == [
        "TENANT WEIGHT RUNNING WAITING COUNTER BEHIND",
        "beta 1 1 4 100 20",
        "alpha 2 1 0 120 0",
    ]
    assert "4 requests wait in the dispatcher for an instance" in rows
    assert "the store h:6379 is away: refused" in rows
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


def test_the_cluster_may_be_named_in_the_environment(answers, monkeypatch, capsys) -> None:
    answers["/admin/status"] = (200, STATUS)
    monkeypatch.setenv("DROVER_URL", "http://elsewhere:9/")
    monkeypatch.setenv("DROVER_ADMIN_KEY", "from-env")
    assert cli.main(["status"]) == 0
    ((_, url, _, headers),) = answers["seen"]
    assert url == "http://elsewhere:9/admin/status"
    assert headers == {"Authorization": "Bearer from-env"}


def test_a_wrong_key_is_explained(answers, capsys) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers["/admin/status"] = (401, {"error": {"message": "missing or wrong admin key"}})
    assert cli.main(["status"]) == 1
    assert "--admin-key or DROVER_ADMIN_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["drain", "resume"])
def test_orders_to_instances(answers, capsys, order) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers[f"/admin/{order}"] = (200, {"instance_id": "instance-1", "state": "some"})
    assert cli.main([order, "instance-1"]) == 0
    assert "instance-1" in capsys.readouterr().out
    assert cli.main([order, "instance-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "some"
    assert [seen[2] for seen in answers["seen"]] == 2 * [{"instance_id": "instance-1"}]


def instance(name: str, left: int) -> dict:
    return {"instance_id": name, "running": left, "waiting": 0, "charged": 0}


def test_drain_may_wait_until_the_instance_is_empty(answers, capsys, monkeypatch) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers["/admin/drain"] = (200, {"instance_id": "i1", "state": "draining"})
    answers["/admin/instances"] = (200, {"instances": [instance("i0", 3), instance("i1", 2)]})
    assert cli.main(["drain", "i1", "--wait", "--timeout", "0"]) == 1
    assert "i1 still has 2 requests" in capsys.readouterr().err

    def emptied(_: float) -> None:
        answers["/admin/instances"] = (200, {"instances": [instance("i0", 5), instance("i1", 0)]})

    monkeypatch.setattr(operating.time, "sleep", emptied)
    assert cli.main(["drain", "i1", "--wait"]) == 0
    assert "i1 is empty" in capsys.readouterr().out


def test_a_machine_is_drained_with_all_that_runs_there(answers, capsys, monkeypatch) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    busy = [
        {**instance(name, left), "node": node}
        for name, left, node in (("i0", 3, "a"), ("i1", 2, "b"), ("i2", 1, "b"))
    ]
    answers["/admin/instances"] = (200, {"instances": busy})
    answers["/admin/drain"] = (200, {"state": "draining"})
    answers["/admin/requests"] = (200, {"requests": [{}, {}]})
    order = ["drain", "--node", "b", "--until-restart", "--wait", "--gateway"]
    assert cli.main([*order, "--timeout", "0"]) == 1
    assert "b (i1, i2) still has 3 requests" in capsys.readouterr().err
    bodies = [body for _, url, body, _ in answers["seen"] if url.endswith("/drain")]
    assert bodies == [{"instance_id": name, "until_restart": True} for name in ("i1", "i2")]

    pauses = []

    def pause(_: float) -> None:
        # First the instances are emptied, then the gateway's clients have their answers.
        pauses.append(1)
        empty = [{**one, "running": 0} for one in busy]
        answers["/admin/instances"] = (200, {"instances": empty})
        if len(pauses) == 2:
            answers["/admin/requests"] = (200, {"requests": []})

    monkeypatch.setattr(operating.time, "sleep", pause)
    assert cli.main([*order, "--json"]) == 0
    assert len(pauses) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["node"], found["left"], len(found["instances"])) == ("b", 0, 2)
    assert cli.main(["drain", "--node", "empty", "--wait"]) == 0
    assert "empty (no instance) is empty" in capsys.readouterr().out
    for wrong in (["drain"], ["drain", "i1", "--node", "b"]):
        assert cli.main(wrong) == 2
        assert "give an instance, or --node" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["top", "--interval", "0"], ["top", "--iterations", "-1"], ["drain", "i", "--timeout", "x"]],
)
def test_values_out_of_range(arguments, capsys) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    assert cli.main(arguments) == 2
    assert arguments[-2] in capsys.readouterr().err


def test_top_as_text_and_as_json(answers, capsys) -> None:
    write_state("http://127.0.0.1:8123", 8123, "the-key")
    answers["/admin/status"] = (200, STATUS)
    assert cli.main(["top", "--iterations", "2", "--interval", "0.1"]) == 0
    text = capsys.readouterr().out
    assert text.count("instance-0") >= 2
    assert "instances 1/2 ready" in text
    assert "requests 2 running, 0 waiting, 4 held" in text
    assert "placed: held 4, new 10 (0.0/s)" in text
    assert cli.main(["top", "--iterations", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_rates_are_since_the_last_look_at_the_same_dispatcher() -> None:
    later = {**STATUS, "counters": {"placements": {"new": 30, "held": 4}}}
    assert "(10.0/s)" in top.frame(later, (1.0, STATUS), 3.0, "url")
    restarted = {**later, "started": 6.0}
    assert "/s)" not in top.frame(restarted, (1.0, STATUS), 3.0, "url")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_top_goes_on_while_the_cluster_does_not_answer() -> None:
    answers = [STATUS, AwayError("nobody there"), {**STATUS, "held": 77}]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    screen = Screen()
    top.watch(ask, "http://h", 0.0, 3, screen, sleep=lambda _: None)
    text = screen.getvalue()
    assert answers == []
    assert "http://h: nobody there" in text
    assert text.index("4 held") < text.index("nobody there") < text.index("77 held")
    # The terminal is given back as it was.
    assert text.endswith("\x1b[?1049l")
    with pytest.raises(AwayError):
        top.watch(lambda: (_ for _ in ()).throw(AwayError("x")), "http://h", 0.0, 1, screen)


ROOT = Path(__file__).resolve().parents[2]


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "deploy/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_commands_in_the_documents_are_commands() -> None:
    """Whole ones in blocks of shell, of which what is written in capitals is a value."""
    parser = cli.build_parser()
    listed = set(re.findall(r"^ {4}(\w+)\s", parser.format_help(), re.MULTILINE))
    named, whole = set(), []
    for document in documents():
        text = document.read_text(encoding="utf-8")
        named |= set(re.findall(r"`drover ([a-z]+)", text))
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
            whole += [line for line in lines if re.match(r"(\.venv/bin/)?drover ", line)]
    assert {"serve", *operating.COMMANDS} <= listed
    assert named <= listed
    assert whole
    for line in whole:
        words = shlex.split(line, comments=True)[1:]
        assert parser.parse_args(words).command in listed
