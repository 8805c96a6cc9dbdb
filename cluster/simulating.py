"""``drover simulate``: a workload against a simulated cluster, under several policies."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.admin_client import CommandError
from cluster.flags import add_arguments, load_settings
from cluster.simulation.decisions import DecisionLog, mean_regret
from cluster.simulation.profile_files import profile_names
from cluster.simulation.report import FIGURES, html_report
from cluster.simulation.results import summarize
from cluster.simulation.settings import Plan, SimulateConfig, make_plan, writable
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.sources import describe_sources
from cluster.tables import table
from instance.step_cost import StepCost

COMMANDS = ("simulate",)
_REFRESH = 0.5


def _examples() -> str:
    return f"""\
examples:
  drover simulate "llumnix-m-m?requests=3000" --instances 16 --rate 7.5 --html report.html
  drover simulate "tenants-on-off?rates=2,6" --policies freeness,llumnix,infaas --json out.json
  drover simulate mooncake:trace.jsonl.gz --profile llama-8b-a10*4 --profile mine.yaml*2
  drover simulate sharegpt --kill 1@60+30 --set max-num-seqs=256 --log decisions.jsonl

The dispatcher's policy, the instances' schedulers and the migration protocol are those that
`drover serve` runs; devices, links and clients are modelled, and time is virtual. No policy
sees how long an answer will be. The same seed gives the same figures.

packaged profiles: {", ".join(profile_names())}; `drover calibrate` makes one of a model

{describe_sources()}
"""


def add_commands(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the command; ``command`` takes name, summary and examples."""
    parser = command("simulate", "run a workload on a simulated cluster", _examples())
    add_arguments(parser, SimulateConfig)


def run(given: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        CommandError: it was interrupted, or a result cannot be written.
        ConfigError: a flag is wrong.
    """
    settings = load_settings(SimulateConfig, vars(given))
    writable(settings)
    plan = make_plan(settings)
    _say(
        f"{len(plan.workload)} requests in {plan.workload[-1].arrival:.0f} s, "
        f"{len(plan.profiles)} instances of {', '.join(dict.fromkeys(_names(plan)))}"
    )
    result: dict[str, Any] = {
        "version": _version(),
        "workload": settings.workload,
        "seed": settings.seed,
        "config": _described(settings, plan),
        "policies": {},
        "speed": {},
    }
    log: list[str] = []
    interrupted = False
    for name in plan.scenarios:
        try:
            figures, speed, lines = _simulate(name, plan, bool(settings.log))
        except KeyboardInterrupt:
            interrupted = True
            break
        result["policies"][name] = figures
        result["speed"][name] = speed
        log += lines
    if result["policies"]:
        print(_summary(result["policies"]), flush=True)
        _write("--json", settings.json, lambda: json.dumps(result, indent=1) + "\n")
        _write("--html", settings.html, lambda: html_report(result))
        _write("--log", settings.log, lambda: "".join(f"{line}\n" for line in log))
    if interrupted:
        done = len(result["policies"])
        raise CommandError(f"interrupted: {done} of {len(plan.scenarios)} policies were run")


def _simulate(
    name: str, plan: Plan, logged: bool
) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """One run: its figures, how fast it was, and its decisions as lines."""
    log = DecisionLog(lambda instance: _cost_of(instance, plan)) if logged else None
    simulation = Simulation(
        plan.scenarios[name], plan.workload, log, None if log is None else log.policies()
    )
    total = len(plan.workload)
    began = shown = time.monotonic()
    live = sys.stderr.isatty()

    def progress(now: float, still_open: int) -> bool:
        nonlocal shown
        wall = time.monotonic()
        if wall - shown >= (_REFRESH if live else 20 * _REFRESH):
            shown = wall
            line = (
                f"{name}: {now:.0f} s simulated, {total - still_open}/{total} requests ended, "
                f"{now / (wall - began):.0f} times real time"
            )
            print(f"\r{line}\033[K" if live else line, end="" if live else "\n", file=sys.stderr)
            sys.stderr.flush()
        return True

    try:
        outcome = simulation.run(progress)
    finally:
        if live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    wall = time.monotonic() - began
    figures = summarize(outcome)
    lines: list[str] = []
    if log is not None:
        entries = log.entries(outcome)
        figures["decisions"] = mean_regret(entries)
        lines = [json.dumps({"run": name, **entry}) for entry in entries]
    speed = {"seconds": wall, "times_real_time": outcome.seconds / max(wall, 1e-9)}
    return figures, speed, lines


def _cost_of(instance: str, plan: Plan) -> StepCost:
    number = int(instance.rpartition("-")[2])
    return plan.profiles[number % len(plan.profiles)].step


def _names(plan: Plan) -> list[str]:
    return [profile.name for profile in plan.profiles]


def _described(settings: SimulateConfig, plan: Plan) -> dict[str, Any]:
    """The flags, and what the run made of them, ready for JSON."""
    hidden = {"workload", "json", "html", "log"}
    flags = {key: value for key, value in dataclasses.asdict(settings).items() if key not in hidden}
    first = next(iter(plan.scenarios.values()))
    return {
        **flags,
        "instances": len(plan.profiles),
        "num_requests": len(plan.workload),
        "scheduler": dataclasses.asdict(first.engine.scheduler),
        "migration": dataclasses.asdict(first.engine.migration),
    }


def _summary(policies: dict[str, Any]) -> str:
    """The table that the report begins with, for a terminal."""
    rows = []
    for name, find, form in FIGURES:
        values = [find(figures) for figures in policies.values()]
        if any(value is not None for value in values):
            rows.append([name, *("-" if one is None else form.format(one) for one in values)])
    return table(("", *policies), rows, "")


def _write(flag: str, path: str, text: Callable[[], str]) -> None:
    if not path:
        return
    try:
        Path(path).write_text(text(), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{flag} {path}: {error.strerror}") from None
    _say(f"wrote {path}")


def _version() -> str:
    try:
        return importlib.metadata.version("drover")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
