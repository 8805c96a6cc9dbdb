"""The ``drover`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NoReturn

from cluster import calibrating, operating, replaying, simulating
from cluster.admin_client import CommandError
from cluster.config import ServeConfig
from cluster.flags import ConfigError, add_arguments, flags_of, load_settings, suggest
from cluster.launch import Running, serve
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
    operating.add_commands(command)
    calibrating.add_commands(command)
    replaying.add_commands(command)
    simulating.add_commands(command)
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
            case name if name in operating.COMMANDS:
                operating.run(given)
            case name if name in calibrating.COMMANDS:
                calibrating.run(given)
            case name if name in replaying.COMMANDS:
                replaying.run(given)
            case name if name in simulating.COMMANDS:
                simulating.run(given)
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

  drover status                    where requests run; `drover top` refreshes itself
  drover migrate REQUEST_ID        move one while it runs

Ctrl-C stops the cluster.""",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
