"""The ``drover`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import httpx

from cluster.config import ServeConfig
from cluster.flags import ConfigError, add_arguments, flags_of, load_settings, suggest
from cluster.launch import Running, serve
from cluster.local import local_clusters
from cluster.ray_setup import LaunchError

FAILURE, USAGE = 1, 2

SERVE_EXAMPLES = """\
examples:
  drover serve                                       the packaged small model, 2 instances
  drover serve Qwen/Qwen3-0.6B --instances 4 --port 9000
  drover serve ./my-model --config cluster.yaml --rebalance off

Every flag --like-this may be given as DROVER_LIKE_THIS in the environment, or as
like-this in the file named by --config. The command line wins over the environment,
which wins over the file.
"""
STATUS_EXAMPLES = """\
examples:
  drover status                                      the cluster on this machine
  drover status --json | jq .instances
  drover status --url http://gpu-head:8000 --admin-key KEY
"""
MIGRATE_EXAMPLES = """\
examples:
  drover migrate chatcmpl-8f2c                       to the instance with most room
  drover migrate chatcmpl-8f2c --to instance-1

`drover status` lists the requests that run and where.
"""


class CommandError(Exception):
    """The command cannot do what was asked; the text is for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message += suggest(unknown.split()[0].partition("=")[0], flags_of(ServeConfig))
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``drover``."""
    parser = _Parser(
        prog="drover",
        description="Serve a language model from many instances and move requests as they run.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"drover {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    serving = command("serve", "start a cluster and serve until interrupted", SERVE_EXAMPLES)
    add_arguments(serving, ServeConfig)
    status = command("status", "show instances, requests and migrations", STATUS_EXAMPLES)
    status.add_argument("--json", action="store_true", help="print everything as JSON")
    migrate = command("migrate", "move a running request", MIGRATE_EXAMPLES)
    migrate.add_argument("request_id", metavar="REQUEST_ID", help="as `drover status` shows it")
    migrate.add_argument(
        "--to", metavar="INSTANCE", help="destination (default: the instance with most room)"
    )
    for client in (status, migrate):
        client.add_argument(
            "--url", help="base URL of the cluster (default: the one on this machine)"
        )
        client.add_argument(
            "--admin-key",
            metavar="KEY",
            help="its admin key (default: that of the one on this machine)",
        )
    return parser


def version() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("drover")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 1 if the command failed, or 2 if it was not understood.
    """
    parser = build_parser()
    try:
        given = parser.parse_args(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    if given.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        match given.command:
            case "serve":
                serve(load_settings(ServeConfig, vars(given)), _say, _welcome)
            case "status":
                _status(given)
            case "migrate":
                _migrate(given)
    except ConfigError as error:
        return _fail(str(error), USAGE)
    except (LaunchError, CommandError) as error:
        return _fail(str(error), FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", FAILURE)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"drover: error: {message}", file=sys.stderr)
    return code


# ---- serve


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _welcome(running: Running) -> None:
    number = len(running.instances)
    print(
        f"""\
Drover is ready on {running.url} ({running.model}, {number} \
instance{"s" * (number > 1)}, {running.seconds:.0f} s)

Try:
  curl {running.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{running.model}", "stream": true, "max_tokens": 64, \
"messages": [{{"role": "user", "content": "Hello!"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{running.url}/v1", api_key="none")

  drover status                    where requests run
  drover migrate REQUEST_ID        move one while it runs

Ctrl-C stops the cluster.""",
        flush=True,
    )


# ---- clients of the admin API


def _target(given: argparse.Namespace) -> tuple[str, str]:
    """URL and admin key of the cluster that is meant."""
    clusters = local_clusters()
    if given.url:
        url = given.url.rstrip("/")
        known = next((c["admin_key"] for c in clusters if c["url"] == url), "")
        return url, given.admin_key or known
    if not clusters:
        raise CommandError("no cluster runs on this machine; name one with --url")
    if len(clusters) > 1:
        urls = ", ".join(cluster["url"] for cluster in clusters)
        raise CommandError(f"several clusters run on this machine; choose with --url: {urls}")
    return clusters[0]["url"], given.admin_key or clusters[0]["admin_key"]


def _call(
    given: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None
) -> Any:
    url, key = _target(given)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # A migration answers when it has ended.
        response = httpx.request(
            method, url + path, json=body, headers=headers, timeout=httpx.Timeout(10.0, read=150.0)
        )
        answer = response.json()
    except httpx.HTTPError as error:
        raise CommandError(f"{url} does not answer: {error}") from None
    except ValueError:
        raise CommandError(f"{url}{path} answered {response.status_code}, not JSON") from None
    if response.is_error:
        detail = answer.get("error") if isinstance(answer, dict) else None
        message = detail.get("message") if isinstance(detail, dict) else None
        raise CommandError(str(message or f"{url}{path} answered {response.status_code}"))
    return answer


def _status(given: argparse.Namespace) -> None:
    answer = _call(given, "GET", "/admin/status")
    print(json.dumps(answer, indent=2) if given.json else format_status(answer))


def _migrate(given: argparse.Namespace) -> None:
    body = {"request_id": given.request_id, "destination": given.to}
    report = _call(given, "POST", "/admin/migrate", body)
    if report.get("outcome") != "moved":
        raise CommandError(
            f"{given.request_id} stayed on {report.get('source')}: {report.get('outcome')}"
        )
    print(
        f"{report['request_id']} moved from {report['source']} to {report['destination']}: "
        f"{report['blocks']} blocks, {report['bytes_copied'] / 2**20:.1f} MiB in "
        f"{report['copies']} copies and {report['stages']} stages, "
        f"{1000 * report['duration']:.0f} ms, "
        f"out of the batch for {1000 * report['detached']:.1f} ms"
    )


def format_status(status: dict[str, Any]) -> str:
    """Tables of ``/admin/status`` for people."""
    parts = [
        _table(
            ("INSTANCE", "STATE", "RUNNING", "WAITING", "KV USED", "FREENESS", "STEP ms", "NODE"),
            [
                (
                    entry["instance_id"],
                    entry["state"],
                    str(entry["running"]),
                    str(entry["waiting"]),
                    f"{100 * entry['load']:.0f}%",
                    "-" if entry["freeness"] is None else f"{entry['freeness']:.0f}",
                    f"{1000 * entry['step_seconds']:.1f}",
                    entry["node"],
                )
                for entry in status.get("instances", [])
            ],
            "no instance is known",
        ),
        _table(
            ("REQUEST", "INSTANCE", "STATE", "CLASS", "TENANT", "TOKENS", "BLOCKS"),
            [
                (
                    entry["request_id"],
                    entry["instance_id"],
                    "migrating" if entry["migrating"] else entry["state"],
                    entry["class"],
                    entry["tenant"],
                    str(entry["tokens"]),
                    str(entry["blocks"]),
                )
                for entry in status.get("requests", [])
            ],
            "no request runs",
        ),
    ]
    migrations = status.get("migrations", [])[:10]
    if migrations:
        parts.append(
            _table(
                ("MOVED", "FROM", "TO", "REASON", "OUTCOME", "BLOCKS", "DETACHED ms"),
                [
                    (
                        entry["request_id"],
                        entry["source"],
                        entry["destination"],
                        entry["reason"],
                        entry["outcome"],
                        str(entry["blocks"]),
                        f"{1000 * entry['detached']:.1f}",
                    )
                    for entry in migrations
                ],
                "",
            )
        )
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> str:
    if not rows:
        return empty
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
