"""``drover calibrate``: measures an instance and writes its cost profile."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.admin_client import CommandError
from cluster.config import MODEL_SETTINGS, ServeConfig
from cluster.flags import add_arguments, load_settings
from cluster.simulation.profile import CostProfile
from cluster.simulation.profile_check import Check, check_fit, format_checks
from cluster.simulation.profile_files import format_profile, load_profile
from instance.config import SwapConfig

if TYPE_CHECKING:  # it loads torch
    from instance.executor import Executor

COMMANDS = ("calibrate",)
_COPY_POOL = 256 << 20
"""Bytes of the host pool for measuring copies, where the settings have none."""
EXAMPLES = """\
examples:
  drover calibrate --quick                           the packaged small model, a minute
  drover calibrate Qwen/Qwen3-0.6B --output qwen.yaml --threads 4
  drover calibrate --url http://gpu-head:8000 --output cluster.yaml

The profile is for `drover simulate --profile FILE`. With --url a cluster that runs is
measured through its API: it should have nothing else to do meanwhile.
"""


_QUICK_CASES = 24


def add_commands(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the command; ``command`` takes name, summary and examples."""
    parser = command("calibrate", "measure an instance and write its cost profile", EXAMPLES)
    parser.add_argument(
        "--output", "-o", metavar="FILE", help="where the profile goes (default: print it)"
    )
    parser.add_argument("--name", help="name of the profile (default: that of the model)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes and repetitions: a rougher profile"
    )
    remote = parser.add_argument_group("measuring a cluster that runs")
    remote.add_argument("--url", help="base URL of the cluster; no model is loaded here")
    remote.add_argument("--admin-key", metavar="KEY", help="its admin key (DROVER_ADMIN_KEY)")
    remote.add_argument(
        "--client-key", metavar="KEY", default="", help="a key that its clients send"
    )
    remote.add_argument(
        "--like",
        metavar="PROFILE",
        default="llama-8b-a10",
        help="profile or file to take from what shows from inside only: copies to host memory, "
        "the link and the host pool (default: llama-8b-a10)",
    )
    add_arguments(parser, ServeConfig, MODEL_SETTINGS)


def run(given: argparse.Namespace) -> None:
    """Run the command; Ctrl-C leaves nothing behind.

    Raises:
        CommandError: if it cannot be done.
        ConfigError: if a setting is wrong.
    """
    output = None if given.output is None else Path(given.output)
    if output is not None and not output.parent.is_dir():
        raise CommandError(f"--output: there is no folder {output.parent}")
    from cluster.simulation.calibration import CalibrationError
    from instance.model.resolve import ModelNotFoundError

    try:
        if given.url:
            from cluster.simulation.remote_calibration import calibrate_cluster

            like = load_profile(given.like)
            profile, checks = calibrate_cluster(
                given.url, given.admin_key, given.client_key, given.name, given.quick, like, _say
            )
        else:
            settings = load_settings(ServeConfig, vars(given))
            profile, checks = calibrate(settings, given.name, given.quick, _say)
    except (CalibrationError, ModelNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from None
    _say(format_checks(checks))
    text = format_profile(profile)
    if output is None:
        print(text, end="")
    else:
        fresh = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(output)
        except OSError as error:
            raise CommandError(f"--output: {error}") from None
        _say(f"wrote {output}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def calibrate(
    settings: ServeConfig, name: str | None, quick: bool, progress: Callable[[str], None]
) -> tuple[CostProfile, list[Check]]:
    """Load a model here, measure it, and fit a profile.

    Args:
        settings: Model and limits of an instance.
        name: Of the profile; None for the model's.
        quick: Fewer shapes and repetitions.
        progress: Told what is at work, line by line.

    Returns:
        The profile, and how well each measurement is predicted by the others.

    Raises:
        CalibrationError: if something cannot be measured.
        ValueError: if there is no such model, or a setting makes no sense.
    """
    from instance.model.runner import make_executor

    device = "cpu" if settings.device == "auto" else settings.device
    config = settings.engine(device)
    swap = config.swap
    if not (swap.num_blocks or swap.space_bytes):
        # Copies are measured all the same, in a pool that the instance will not have.
        config = dataclasses.replace(config, swap=SwapConfig(space_bytes=_COPY_POOL))
    progress(f"loading {settings.model} on {device}")
    executor = make_executor(config, progress)
    try:
        return measure(executor, settings, name, quick, progress)
    finally:
        executor.close()


def measure(
    executor: Executor,
    settings: ServeConfig,
    name: str | None,
    quick: bool,
    progress: Callable[[str], None],
) -> tuple[CostProfile, list[Check]]:
    """Measure an idle executor with KV; see ``calibrate``."""
    from cluster.simulation import calibration, profile_fit

    model, kv, copier = executor.description, executor.kv, executor.copier
    if kv is None:
        raise calibration.CalibrationError("this executor has no KV to measure")
    if copier is None:
        raise calibration.CalibrationError("this executor copies no KV to host memory")
    repeats = 3 if quick else 7
    limits = settings.engine("cpu").scheduler
    cases = calibration.step_cases(
        limits, model.max_model_len, (executor.num_blocks - 1) * model.block_size
    )
    if quick and len(cases) > _QUICK_CASES:
        cases = cases[::2]
    measured = calibration.measure_steps(executor, cases, repeats, progress)
    steps = [one.sample for one in measured]
    outward, inward = (
        calibration.measure_copies(copier, executor.num_blocks, way, repeats, progress)
        for way in (True, False)
    )
    link, links = calibration.measure_link(kv, executor.num_blocks, repeats, progress)
    labels = [str(one.case) for one in measured]
    checks = check_fit(labels, steps, profile_fit.predict_step)
    for what, copies, predict in (
        ("to host memory", outward, profile_fit.predict_copy),
        ("from host memory", inward, profile_fit.predict_copy),
        ("over the link", links, profile_fit.predict_link),
    ):
        labels = [f"{one.num_bytes} bytes in {one.copies} runs {what}" for one in copies]
        checks += check_fit(labels, copies, predict)
    where = (
        f"drover calibrate: {model.name}, {settings.threads} threads, {platform.machine()}, "
        f"{os.cpu_count()} cores"
    )
    profile = CostProfile(
        name=name or model.name,
        model=model,
        step=profile_fit.fit_steps(steps),
        copy_out=profile_fit.fit_copies(outward),
        copy_in=profile_fit.fit_copies(inward),
        link=link,
        num_blocks=executor.num_blocks - 1,
        num_host_blocks=max(0, settings.engine("cpu").swap.blocks(copier.block_bytes) - 1),
        scatter=calibration.step_scatter(measured),
        sources={
            "step": f"{where}; {len(steps)} shapes, median of {repeats} steps each",
            "scatter": f"{where}; the same steps beside the median of their shape",
            "copy_out": where,
            "copy_in": where,
            "link": f"{where}; loopback, both ends in one process",
            "num_blocks": "settings of the instance",
        },
    )
    return profile, checks
