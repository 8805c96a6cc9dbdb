"""The operators' commands of ``drover``: status, top, drain, resume and migrate."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster import tables, top
from cluster.admin_client import AdminClient, CommandError
from cluster.flags import ConfigError, number

COMMANDS = ("status", "top", "drain", "resume", "migrate")
AddCommand = Callable[[str, str, str], argparse.ArgumentParser]

STATUS_EXAMPLES = """\
examples:
  drover status                                      the cluster on this machine
  drover status --json | jq .instances
  drover status --url http://gpu-head:8000 --admin-key KEY
"""
TOP_EXAMPLES = """\
examples:
  drover top                                         until Ctrl-C
  drover top --interval 1
  drover top --iterations 1 | head                   once, as text
"""
DRAIN_EXAMPLES = """\
examples:
  drover drain instance-1                            move its requests away, give it none
  drover drain instance-1 --wait                     and return when it is empty
  drover resume instance-1                           take it back
  drover drain --node "$HOSTNAME" --until-restart --wait --gateway --url http://127.0.0.1:8000
                                                     before this machine, or pod, goes away
"""
RESUME_EXAMPLES = """\
examples:
  drover resume instance-1                           after `drover drain instance-1`
"""
MIGRATE_EXAMPLES = """\
examples:
  drover migrate chatcmpl-8f2c                       to the instance with most room
  drover migrate chatcmpl-8f2c --to instance-1

`drover status` lists the requests that run and where.
"""
_POLL = 0.5
"""Seconds between looks at an instance that is being emptied."""


def add_commands(command: AddCommand) -> None:
    """Declare the commands; ``command`` takes name, summary and examples."""
    status = command("status", "show instances, requests and migrations", STATUS_EXAMPLES)
    watch = command("top", "show the cluster again and again", TOP_EXAMPLES)
    watch.add_argument(
        "--interval", metavar="SECONDS", default="2", help="time between refreshes (default: 2)"
    )
    watch.add_argument(
        "--iterations",
        metavar="N",
        type=int,
        default=0,
        help="refreshes, then end (default: until interrupted)",
    )
    drain = command("drain", "empty an instance by moving its requests", DRAIN_EXAMPLES)
    drain.add_argument("--wait", action="store_true", help="return when it is empty")
    drain.add_argument(
        "--node", metavar="NAME", help="every instance on this machine, as `drover status` shows it"
    )
    drain.add_argument(
        "--until-restart",
        action="store_true",
        help="the instance that is started in its place takes requests again",
    )
    drain.add_argument(
        "--gateway",
        action="store_true",
        help="with --wait: and when the gateway at --url has no request of a client left",
    )
    drain.add_argument(
        "--timeout", metavar="SECONDS", default="600", help="with --wait, at most (default: 600)"
    )
    resume = command("resume", "let a drained instance take requests again", RESUME_EXAMPLES)
    for one, count in ((drain, "?"), (resume, None)):
        one.add_argument(
            "instance_id", metavar="INSTANCE", nargs=count, help="as `drover status` shows it"
        )
    migrate = command("migrate", "move a running request", MIGRATE_EXAMPLES)
    migrate.add_argument("request_id", metavar="REQUEST_ID", help="as `drover status` shows it")
    migrate.add_argument(
        "--to", metavar="INSTANCE", help="destination (default: the instance with most room)"
    )
    for one in (status, watch, drain, resume, migrate):
        one.add_argument(
            "--url",
            help="base URL of the cluster (default: DROVER_URL, or the one on this machine)",
        )
        one.add_argument(
            "--admin-key",
            metavar="KEY",
            help="its admin key (default: DROVER_ADMIN_KEY, or that of the one on this machine)",
        )
        one.add_argument("--json", action="store_true", help="print the whole answer as JSON")


def run(given: argparse.Namespace) -> None:
    """Run one of the commands.

    Raises:
        CommandError: if it cannot be done.
        ConfigError: if a value is out of range.
    """
    client = AdminClient.find(given.url, given.admin_key)
    match given.command:
        case "status":
            answer = client.call("GET", "/admin/status")
            _show(given, answer, tables.status)
        case "top":
            _top(given, client)
        case "drain":
            _drain(given, client)
        case "resume":
            answer = client.call("POST", "/admin/resume", {"instance_id": given.instance_id})
            _show(given, answer, lambda _: f"{given.instance_id} takes requests again")
        case "migrate":
            _migrate(given, client)


def _show(given: argparse.Namespace, answer: Any, text: Callable[[Any], str]) -> None:
    print(json.dumps(answer, indent=2) if given.json else text(answer), flush=True)


def _seconds(name: str, text: str, least: float) -> float:
    try:
        return number(least)(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _top(given: argparse.Namespace, client: AdminClient) -> None:
    interval = _seconds("--interval", given.interval, 0.1)
    if given.iterations < 0:
        raise ConfigError(f"--iterations: {given.iterations} is less than 0")

    def ask() -> Any:
        return client.call("GET", "/admin/status")

    try:
        if given.json:
            done = 0
            while not given.iterations or done < given.iterations:
                if done:
                    time.sleep(interval)
                print(json.dumps(ask()), flush=True)
                done += 1
        else:
            top.watch(ask, client.url, interval, given.iterations)
    except KeyboardInterrupt:
        # The usual way to leave it.
        return


def _drain(given: argparse.Namespace, client: AdminClient) -> None:
    patience = _seconds("--timeout", given.timeout, 0.0)
    if (given.instance_id is None) == (given.node is None):
        raise ConfigError("drain: give an instance, or --node")
    names = [given.instance_id]
    if given.node is not None:
        found = client.call("GET", "/admin/instances")["instances"]
        names = [one["instance_id"] for one in found if one["node"] == given.node]
    answers = []
    for name in names:
        body = {"instance_id": name}
        if given.until_restart:
            body["until_restart"] = True
        answers.append(client.call("POST", "/admin/drain", body))
    # For one instance its answer, for a node the answers of all.
    answer = answers[0] if given.node is None else {"node": given.node, "instances": answers}
    what = f"{given.node} ({', '.join(names) or 'no instance'})" if given.node else names[0]
    if not given.wait:
        _show(given, answer, lambda _: f"{what} is draining; `drover status` shows what is left")
        return
    deadline = time.monotonic() + patience
    while left := _left(client, names, given.gateway):
        if time.monotonic() >= deadline:
            raise CommandError(f"{what} still has {left} requests; it goes on draining")
        time.sleep(_POLL)
    _show(given, {**answer, "left": 0}, lambda _: f"{what} is empty")


def _left(client: AdminClient, names: Sequence[str], gateway: bool) -> int:
    """Requests on these instances; if there is none, with ``gateway`` those of its clients."""
    found = client.call("GET", "/admin/instances")["instances"]
    left = sum(
        one["running"] + one["waiting"] + one["charged"]
        for one in found
        if one["instance_id"] in names
    )
    if not left and gateway:
        left = len(client.call("GET", "/admin/requests")["requests"])
    return int(left)


def _migrate(given: argparse.Namespace, client: AdminClient) -> None:
    body = {"request_id": given.request_id, "destination": given.to}
    report = client.call("POST", "/admin/migrate", body)
    if report.get("outcome") != "moved":
        raise CommandError(
            f"{given.request_id} stayed on {report.get('source')}: {report.get('outcome')}"
        )
    _show(given, report, _moved)


def _moved(report: dict[str, Any]) -> str:
    return (
        f"{report['request_id']} moved from {report['source']} to {report['destination']}: "
        f"{report['blocks']} blocks, {report['bytes_copied'] / 2**20:.1f} MiB in "
        f"{report['copies']} copies and {report['stages']} stages, "
        f"{1000 * report['duration']:.0f} ms, "
        f"out of the batch for {1000 * report['detached']:.1f} ms"
    )
