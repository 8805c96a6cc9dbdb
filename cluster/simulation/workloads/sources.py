"""Workloads by name: what ``drover simulate`` and ``drover replay`` are given.

A workload is written NAME, NAME:FILE or either with ?key=value&key=value behind it, such as
``llumnix-m-m?rate=7.5&requests=1000`` or ``mooncake:trace.jsonl.gz?fit=scale&max-len=8192``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.flags import ConfigError, integer, number, one_of
from cluster.simulation.workloads import transform
from cluster.simulation.workloads.catalogue import ABOVE_ZERO, SOURCES, Parameter, Values
from cluster.simulation.workloads.records import WorkloadError, WorkloadRequest
from instance.request import RequestClass

COMMON: dict[str, Parameter] = {
    "scale": Parameter(ABOVE_ZERO, 1.0, "multiplies prompt and output lengths"),
    "scale-output": Parameter(ABOVE_ZERO, 1.0, "multiplies output lengths once more"),
    "start": Parameter(number(0.0), 0.0, "second at which to begin"),
    "duration": Parameter(number(0.0), 0.0, "seconds to take; 0: all"),
    "limit": Parameter(integer(0), 0, "requests to take; 0: all"),
    "rate": Parameter(number(0.0), 0.0, "arrivals per second; 0: as recorded"),
    "speed": Parameter(ABOVE_ZERO, 1.0, "multiplies the rate of arrivals"),
    "max-len": Parameter(integer(0), 0, "prompt and output tokens that the model takes; 0: any"),
    "fit": Parameter(
        one_of("scale", "drop", "cut"), "drop", "what to do about longer ones: scale, drop or cut"
    ),
    "tenants": Parameter(integer(0), 0, "deal requests out to so many tenants; 0: leave them"),
    "skew": Parameter(number(0.0), 1.0, "tenant n gets a share like n to the power of -skew"),
    "high": Parameter(number(0.0, 1.0), 0.0, "share of requests of class interactive, group high"),
}
"""Parameters of every workload; applied in this order."""


def load_workload(text: str, seed: int = 0) -> list[WorkloadRequest]:
    """Read or make the workload that ``text`` describes.

    Args:
        text: NAME, NAME:FILE, with ?key=value&... behind it; see ``describe_sources``.
        seed: Of everything that is drawn.

    Returns:
        Requests by arrival, at least one.

    Raises:
        WorkloadError: with a text that says what is wrong, and in which file and line.
    """
    place, _, behind = text.partition("?")
    name, _, file = place.partition(":")
    source = SOURCES.get(name)
    if source is None:
        close = difflib.get_close_matches(name, list(SOURCES), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise WorkloadError(f"no workload is called {name!r}{hint}")
    if source.file and not file:
        raise WorkloadError(f"{name} wants a file: {name}:FILE")
    if file and not source.file:
        raise WorkloadError(f"{name} takes no file")
    own, common = _parse(behind, name, source.parameters)
    try:
        requests = _common(source.make(Path(file), own, seed), common, seed)
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{file}: not text: {error}") from None
    if not requests:
        raise WorkloadError(f"{text}: no request is left")
    return requests


def _parse(
    text: str, name: str, own: Mapping[str, Parameter]
) -> tuple[dict[str, Any], dict[str, Any]]:
    # A source that draws its arrivals has a rate of its own.
    known = {**COMMON, **own}
    values = {key: parameter.default for key, parameter in known.items()}
    for part in filter(None, text.split("&")):
        key, equals, value = part.partition("=")
        if key not in known:
            close = difflib.get_close_matches(key, list(known), 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise WorkloadError(f"{name}: unknown parameter {key!r}{hint}")
        if not equals:
            raise WorkloadError(f"{name}: {key}: a value is wanted: {key}=...")
        try:
            values[key] = known[key].parse(value)
        except ConfigError as error:
            raise WorkloadError(f"{name}: {key}: {error}") from None
    common = {key: values[key] for key in COMMON if key not in own}
    return {key: values[key] for key in own}, common


def _common(requests: list[WorkloadRequest], values: Values, seed: int) -> list[WorkloadRequest]:
    scale, output = values["scale"], values["scale"] * values["scale-output"]
    if (scale, output) != (1.0, 1.0):
        requests = transform.scale_lengths(requests, scale, output)
    if values["start"] or values["duration"] or values["limit"]:
        requests = transform.window(
            requests, values["start"], values["duration"] or None, values["limit"] or None
        )
    if values.get("rate"):
        requests = transform.at_rate(requests, values["rate"])
    if values["speed"] != 1.0:
        requests = transform.speed_up(requests, values["speed"])
    if values["max-len"]:
        requests = transform.fit(requests, max(2, values["max-len"]), values["fit"])
    if values["tenants"]:
        requests = transform.with_tenants(requests, values["tenants"], values["skew"], seed)
    if values["high"]:
        requests = transform.with_class(
            requests, values["high"], RequestClass.INTERACTIVE, "high", seed
        )
    return requests


def describe_sources() -> str:
    """What can be written for a workload, for ``--help``."""
    lines = ["workloads: NAME, or NAME:FILE, with ?key=value&key=value behind it", ""]
    for name, source in SOURCES.items():
        lines.append(f"  {name}{':FILE' if source.file else ''}")
        lines.append(f"      {source.help}")
        lines += _describe(source.parameters)
    lines += ["", "parameters of all workloads, applied in this order:"]
    lines += _describe(COMMON)
    return "\n".join(lines)


def _describe(parameters: Mapping[str, Parameter]) -> list[str]:
    lines = []
    for key, parameter in parameters.items():
        default = parameter.default
        if isinstance(default, tuple):
            default = ",".join(f"{one:g}" for one in default)
        shown = f" (default: {default})" if default not in ("", 0, 0.0) else ""
        lines.append(f"        {key}: {parameter.help}{shown}")
    return lines
