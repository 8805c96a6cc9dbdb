"""``drover replay``: loads a running cluster with a workload."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.admin_client import AdminClient, CommandError
from cluster.flags import ConfigError, integer, number
from cluster.replay.client import CompletionClient, ServerError
from cluster.replay.results import Goals, format_summary, summarize
from cluster.replay.run import Replay, ReplaySettings
from cluster.simulation.workloads import jsonl, transform
from cluster.simulation.workloads.records import WorkloadError, WorkloadRequest
from cluster.simulation.workloads.sources import describe_sources, load_workload

COMMANDS = ("replay",)
EXAMPLES = f"""\
examples:
  drover replay "llumnix-s-s?rate=4&requests=200"    load the cluster on this machine
  drover replay "mooncake:trace.jsonl.gz?fit=scale&max-len=8192&duration=300" --json out.json
  drover replay "tenants-on-off?rates=2,6" --keys keys.yaml --url http://gpu-head:8000

Requests are sent when they are due, whatever became of those before them. --keys names a
YAML file of tenants and their keys ("tenant-1: KEY"). Ctrl-C ends the replay and shows what
was measured until then.

{describe_sources()}
"""
_REFRESH = 0.5


def add_commands(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the command; ``command`` takes name, summary and examples."""
    parser = command("replay", "load a running cluster with a workload", EXAMPLES)
    parser.add_argument("workload", metavar="WORKLOAD", help="what to send; see below")
    parser.add_argument(
        "--num-prompts", metavar="N", default="0", help="requests at most, the first ones; 0: all"
    )
    parser.add_argument(
        "--request-rate",
        metavar="PER_SECOND",
        default="0",
        help="let them come so often; inf: all at once; 0: as the workload has it",
    )
    parser.add_argument(
        "--burstiness",
        metavar="SHAPE",
        default="0",
        help="with --request-rate: draw intervals anew, by a Gamma law of this shape (1: Poisson, "
        "less is burstier); 0: keep their proportions",
    )
    parser.add_argument(
        "--url", help="base URL of the server (default: DROVER_URL, or the one on this machine)"
    )
    parser.add_argument("--model", help="its name there (default: the first one served)")
    parser.add_argument("--client-key", metavar="KEY", default="", help="API key of all requests")
    parser.add_argument("--keys", metavar="FILE", help="YAML file of tenants and their API keys")
    parser.add_argument("--seed", metavar="N", default="0", help="of whatever is drawn")
    parser.add_argument(
        "--max-concurrency", metavar="N", default="0", help="requests under way at most; 0: any"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", default="0", help="time that a request may take; 0: any"
    )
    parser.add_argument("--temperature", metavar="X", default="0", help="of the sampling")
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        default="0",
        help="make prompts of all token ids below N (default: of common tokens)",
    )
    parser.add_argument(
        "--goodput",
        metavar="KEY:MS",
        nargs="+",
        default=[],
        help="goals of a good request: ttft:MS, tpot:MS, e2el:MS",
    )
    parser.add_argument(
        "--write-workload", metavar="FILE", help="write the requests there and send nothing"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--save-detailed", action="store_true", help="with the figures of every request"
    )


def run(given: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        CommandError: if it cannot be done.
        ConfigError: if a value is out of range.
    """
    seed = _value("--seed", integer(0), given.seed)
    vocab_size = _value("--vocab-size", integer(0), given.vocab_size)
    settings = {
        "concurrency": _value("--max-concurrency", integer(0), given.max_concurrency),
        "timeout": _value("--timeout", number(0.0), given.timeout),
        "temperature": _value("--temperature", number(0.0), given.temperature),
    }
    goals = _goals(given.goodput)
    keys = _keys(given.keys)
    asked = {
        "limit": _value("--num-prompts", integer(0), given.num_prompts),
        "rate": _value("--request-rate", number(0.0), given.request_rate),
        "burstiness": _value("--burstiness", number(0.0), given.burstiness),
    }
    if asked["burstiness"] and not 0 < asked["rate"] < math.inf:
        raise ConfigError("--burstiness wants a --request-rate")
    if given.json and not Path(given.json).absolute().parent.is_dir():
        raise CommandError(f"--json: there is no folder for {given.json}")
    try:
        requests = _shaped(load_workload(given.workload, seed), seed, **asked)
        if given.write_workload:
            text = "".join(f"{line}\n" for line in jsonl.write(requests))
            _write("--write-workload", Path(given.write_workload), text)
            return
        url = AdminClient.find(given.url, None).url
        replay, interrupted = asyncio.run(
            _replay(given, url, requests, seed, vocab_size, keys, settings)
        )
    except WorkloadError as error:
        raise CommandError(str(error)) from None
    except ServerError as error:
        raise CommandError(str(error)) from None
    summary = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "drover",
        "model_id": replay.model,
        "workload": given.workload,
        "seed": seed,
        "interrupted": interrupted,
        **summarize(replay.results, replay.seconds, goals, given.save_detailed),
    }
    print(format_summary(summary), flush=True)
    if given.json:
        _write("--json", Path(given.json), json.dumps(summary, indent=2) + "\n")
    if interrupted:
        raise CommandError("interrupted: these are the figures until then")


def _shaped(
    requests: list[WorkloadRequest], seed: int, limit: int, rate: float, burstiness: float
) -> list[WorkloadRequest]:
    """As the options of ``vllm bench serve`` want a workload."""
    if limit:
        requests = transform.window(requests, limit=limit)
    if burstiness:
        return transform.drawn_anew(requests, rate, burstiness**-0.5, seed)
    return transform.at_rate(requests, rate) if rate else requests


async def _replay(
    given: argparse.Namespace,
    url: str,
    requests: list[WorkloadRequest],
    seed: int,
    vocab_size: int,
    keys: dict[str, str],
    settings: dict[str, Any],
) -> tuple[Replay, bool]:
    async with CompletionClient(url, given.client_key, settings["timeout"]) as client:
        model, context = await client.model()
        model = given.model or model
        vocabulary = range(vocab_size) if vocab_size else await client.vocabulary(model)
        longest = max(one.prompt_tokens + one.output_tokens for one in requests)
        if context and longest > context:
            _say(
                f"the longest request has {longest} tokens, {model} takes {context}: it will be "
                f"refused; ?max-len={context}&fit=scale makes all fit"
            )
        replay = Replay(
            client,
            requests,
            ReplaySettings(
                model,
                vocabulary,
                seed,
                keys,
                settings["concurrency"],
                {"temperature": settings["temperature"]},
            ),
        )
        watcher = asyncio.create_task(_watch(replay, len(requests)))
        try:
            await replay.run()
        except asyncio.CancelledError:
            # Ctrl-C: what was measured so far is wanted.
            return replay, True
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        return replay, False


async def _watch(replay: Replay, total: int) -> None:
    """Say how far the replay is: on one line of a terminal, else now and then."""
    live = sys.stderr.isatty()
    began = time.monotonic()
    try:
        while True:
            await asyncio.sleep(_REFRESH if live else 20 * _REFRESH)
            failed = sum(1 for one in replay.results if one.failure)
            line = (
                f"{time.monotonic() - began:6.0f} s  {replay.finished}/{total} ended, "
                f"{len(replay.results) - replay.finished} under way, {failed} failed"
            )
            print(f"\r{line}\033[K" if live else line, end="" if live else "\n", file=sys.stderr)
            sys.stderr.flush()
    finally:
        if live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _value(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _goals(given: list[str]) -> Goals | None:
    goals: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ConfigError(f"--goodput: {name!r} is not one of ttft, tpot, e2el")
        goals[name] = _value("--goodput", number(0.0), value) / 1000
    return Goals(**goals) if goals else None


def _keys(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # What was read may be a key: it is not shown.
        raise CommandError(f"--keys: {path} cannot be read as YAML") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content.values()):
        raise CommandError(f"--keys: {path} is not a mapping of tenants to keys")
    return {str(tenant): key for tenant, key in content.items()}


def _write(flag: str, path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise CommandError(f"{flag}: {error}") from None
