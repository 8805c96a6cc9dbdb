"""What operators see of the dispatcher, ready for JSON."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.messages import InstanceView
from cluster.dispatcher.tenants import policy_to_json
from instance.request import RequestClass


def instances(core: Dispatcher, now: float) -> list[dict[str, Any]]:
    """Every instance that is not gone."""
    return [_instance(core, view, now) for view in core.view(now).instances]


def _instance(core: Dispatcher, view: InstanceView, now: float) -> dict[str, Any]:
    load = core.members.loads[view.info.instance_id]
    report = load.report
    return {
        "instance_id": view.info.instance_id,
        "incarnation": view.info.incarnation,
        "address": view.info.address,
        "node": view.info.node,
        "pid": view.info.pid,
        "state": view.state,
        "role": core.members.view(load, now).role.value,
        "freeness": view.freeness if math.isfinite(view.freeness) else None,
        "load": view.load,
        "total_blocks": view.info.total_blocks,
        "free_blocks": view.free_blocks,
        "running": view.running,
        "waiting": view.waiting,
        "charged": len(load.charges),
        "step_seconds": view.step_seconds,
        "migrations_in": 0 if report is None else report.migrations_in,
        "migrations_out": 0 if report is None else report.migrations_out,
        "report_age": now - load.heard,
        "model": dataclasses.asdict(view.info.model),
        "max_num_seqs": view.info.max_num_seqs,
    }


def requests(
    core: Dispatcher, now: float, limit: int, instance_id: str = "", tenant: str = ""
) -> dict[str, Any]:
    """Requests on instances, or on their way to one.

    Args:
        limit: Listed at most; "num_requests" counts all that match.
        instance_id: Only those of this instance; "" for all.
        tenant: Only those of this tenant; "" for all.
    """
    found = [
        (load, sequence)
        for load, sequence in core.requests(now)
        if instance_id in ("", load.info.instance_id) and tenant in ("", sequence.tenant)
    ]
    return {
        "num_requests": len(found),
        "requests": [
            {
                "request_id": sequence.request_id,
                "epoch": sequence.epoch,
                "instance_id": load.info.instance_id,
                "state": "running" if sequence.running else "waiting",
                "migrating": sequence.migrating or sequence.request_id in core.members.transfers,
                "class": sequence.request_class.name.lower(),
                "tenant": sequence.tenant,
                "gateway_id": sequence.home,
                "tokens": sequence.num_tokens,
                "blocks": sequence.blocks,
            }
            for load, sequence in itertools.islice(found, limit)
        ],
    }


def migrating(core: Dispatcher, now: float) -> list[dict[str, Any]]:
    """Migrations under way."""
    return [
        {
            "request_id": transfer.sequence.request_id,
            "source": transfer.source,
            "destination": transfer.destination,
            "reason": transfer.reason,
            "seconds": now - transfer.since,
        }
        for transfer in core.members.transfers.values()
    ]


def tenants(core: Dispatcher, now: float) -> dict[str, Any]:
    """Tenants that are known or have requests, and how far apart those are who wait.

    A tenant's "counter" is its service by weight in all classes; "behind" is how far it is
    behind the one furthest ahead among those who wait in the same class, at most.
    """
    ledger = core.ledger
    held = Counter(one.request.tenant for one in core.placing.queues)
    running: Counter[str] = Counter()
    waiting = Counter(held)
    for _, sequence in core.requests(now):
        (waiting if sequence.waits else running)[sequence.tenant] += 1
    gaps = {cls: ledger.gap(cls) for cls in RequestClass}
    leads = {
        cls: max(map(ledger.counter, ledger.waiting(cls)), default=0.0) for cls in RequestClass
    }
    classes: dict[str, dict[RequestClass, float]] = {}
    for (tenant, cls), book in ledger.accounts.items():
        classes.setdefault(tenant, {})[cls] = book.counter
    behind: dict[str, float] = {}
    for cls in RequestClass:
        for account in ledger.waiting(cls):
            lag = leads[cls] - ledger.counter(account)
            behind[account[0]] = max(behind.get(account[0], 0.0), lag)
    names = sorted({*ledger.tenants, *classes, *running, *waiting})
    return {
        "tenants": [
            {
                "tenant": name,
                **policy_to_json(ledger.policy(name)),
                "running": running[name],
                "waiting": waiting[name],
                "held": held[name],
                "counter": sum(classes.get(name, {}).values()),
                "counters": {
                    cls.name.lower(): counter for cls, counter in classes.get(name, {}).items()
                },
                "behind": behind.get(name, 0.0),
            }
            for name in names
        ],
        "gaps": {
            cls.name.lower(): {
                "gap": gap.gap,
                "bound": gap.bound if math.isfinite(gap.bound) else None,
                "tenants": gap.tenants,
            }
            for cls, gap in gaps.items()
        },
    }
