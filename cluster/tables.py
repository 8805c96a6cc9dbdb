"""What operators see in a terminal: tables made of the admin API's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LISTED = 10
"""Migrations and tenants shown."""


def status(answer: Mapping[str, Any]) -> str:
    """``/admin/status`` as tables."""
    parts = [instances(answer), requests(answer), tenants(answer), migrations(answer)]
    return "\n\n".join(part for part in (*parts, *notes(answer)) if part)


def notes(answer: Mapping[str, Any]) -> list[str]:
    """What an operator should know beside the tables."""
    found = []
    if answer.get("held"):
        found.append(f"{answer['held']} requests wait in the dispatcher for an instance")
    found += _scaling(answer.get("scaling", {}))
    store = answer.get("store", {})
    if store.get("superseded"):
        found.append(f"another dispatcher writes to {store['address']}; this one does not")
    elif store.get("up") is False:
        found.append(f"the store {store['address']} is away: {store['error']}")
    return found


def _scaling(scaling: Mapping[str, Any]) -> list[str]:
    """Instances that come and go, and the one that could not come."""
    found = [
        f"{name} is being started for {seconds:.0f} s"
        for name, seconds in scaling.get("starting", {}).items()
    ]
    found += [
        f"{name} is being emptied, then stopped"
        for name in scaling.get("leaving", [])
        if name not in scaling.get("stopping", {})
    ]
    failure = scaling.get("failure")
    if failure:
        again = failure["retry_in"]
        found.append(
            f"{failure['instance_id']} was not started {failure['age']:.0f} s ago: "
            f"{failure['why']}" + (f"; not tried again for {again:.0f} s" if again else "")
        )
    return found


def instances(answer: Mapping[str, Any]) -> str:
    """Instances and their load."""
    return table(
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
            for entry in answer.get("instances", [])
        ],
        "no instance is known",
    )


def requests(answer: Mapping[str, Any], most: int | None = None) -> str:
    """Requests and where they are; ``most`` of them."""
    listed = answer.get("requests", [])
    shown = listed[:most]
    text = table(
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
            for entry in shown
        ],
        "no request runs",
    )
    more = answer.get("num_requests", len(listed)) - len(shown)
    return f"{text}\nand {more} more" if more > 0 else text


def tenants(answer: Mapping[str, Any]) -> str:
    """Tenants and the service they had; "" where none is known."""
    listed = sorted(
        answer.get("tenants", []), key=lambda one: (-one["waiting"], -one["running"], one["tenant"])
    )
    return table(
        ("TENANT", "WEIGHT", "RUNNING", "WAITING", "COUNTER", "BEHIND"),
        [
            (
                entry["tenant"],
                f"{entry['weight']:g}",
                str(entry["running"]),
                str(entry["waiting"]),
                f"{entry['counter']:.0f}",
                f"{entry['behind']:.0f}",
            )
            for entry in listed[:_LISTED]
        ],
        "",
    )


def migrations(answer: Mapping[str, Any]) -> str:
    """The latest migrations; "" where there was none."""
    return table(
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
            for entry in answer.get("migrations", [])[:_LISTED]
        ],
        "",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> str:
    """Columns as wide as their widest cell; ``empty`` where there are no rows."""
    if not rows:
        return empty
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
