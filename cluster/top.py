"""``drover top``: a table of the cluster that refreshes itself."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from cluster import tables
from cluster.admin_client import AwayError

_ENTER = "\x1b[?1049h\x1b[?25l"
"""The terminal's other screen, without a cursor; what was there is back afterwards."""
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(
    ask: Callable[[], Mapping[str, Any]],
    url: str,
    interval: float,
    iterations: int,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the cluster again and again.

    Args:
        ask: Returns ``/admin/status``.
        url: Shown above.
        interval: Seconds between refreshes.
        iterations: Refreshes; 0 goes on until interrupted.
        out: Where to; standard output by default.

    Raises:
        AwayError: if the cluster does not answer the first time. Later it is said, and
            asked again.
    """
    before: tuple[float, Mapping[str, Any]] | None = None
    out = out or sys.stdout
    answer = ask()
    live = out.isatty()
    shown = 0
    try:
        if live:
            out.write(_ENTER)
        while True:
            now = time.monotonic()
            text = frame(answer, before, now, url, _lines() // 3 if live else None)
            before = now, answer
            while True:
                _draw(text, out, live)
                shown += 1
                if iterations and shown >= iterations:
                    return
                sleep(interval)
                try:
                    answer = ask()
                    break
                except AwayError as error:
                    text = f"{url}: {error}"
    finally:
        if live:
            out.write(_LEAVE)
            out.flush()


def _lines() -> int:
    return shutil.get_terminal_size().lines


def _draw(text: str, out: TextIO, live: bool) -> None:
    if not live:
        out.write(text + "\n\n")
    else:
        size = shutil.get_terminal_size()
        lines = [line[: size.columns] for line in text.splitlines()[: size.lines - 1]]
        out.write(_HOME + "".join(f"{line}{_TO_LINE_END}\n" for line in lines) + _TO_SCREEN_END)
    out.flush()


def frame(
    answer: Mapping[str, Any],
    before: tuple[float, Mapping[str, Any]] | None,
    now: float,
    url: str,
    most: int | None = None,
) -> str:
    """One screen.

    Args:
        answer: ``/admin/status``.
        before: When the last one was asked for, and it; rates are since then.
        now: When this one was.
        most: Requests listed at most; None for all.
    """
    found = answer.get("instances", [])
    running = sum(entry["running"] for entry in found)
    waiting = sum(entry["waiting"] for entry in found)
    ready = sum(entry["state"] == "ready" for entry in found)
    head = (
        f"{url}   "
        f"instances {ready}/{len(found)} ready   "
        f"requests {running} running, {waiting} waiting, {answer.get('held', 0)} held   "
        f"placement {answer.get('placement', '-')}, "
        f"rebalance {'on' if answer.get('rebalance') else 'off'}"
    )
    parts = [head, _decisions(answer, before, now), *tables.notes(answer)]
    parts += [tables.instances(answer), tables.tenants(answer), tables.migrations(answer)]
    parts.append(tables.requests(answer, most))
    return "\n\n".join(part for part in parts if part)


def _decisions(
    answer: Mapping[str, Any], before: tuple[float, Mapping[str, Any]] | None, now: float
) -> str:
    """What the dispatcher decided, by kind: how often, and how often a second of late."""
    texts = []
    for kind, name in (
        ("placements", "placed"),
        ("refusals", "refused"),
        ("migrations_started", "migrations"),
    ):
        counts: Mapping[str, int] = answer.get("counters", {}).get(kind, {})
        rate = ""
        # A restarted dispatcher counts from 0 again.
        if before is not None and before[1].get("started") == answer.get("started"):
            then = sum(before[1].get("counters", {}).get(kind, {}).values())
            rate = f" ({(sum(counts.values()) - then) / max(1e-9, now - before[0]):.1f}/s)"
        listed = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.items()))
        texts.append(f"{name}: {listed or 0}{rate}")
    return "   ".join(texts)
