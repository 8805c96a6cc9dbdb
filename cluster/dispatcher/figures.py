"""What the dispatcher counts, for ``/metrics``, as ``cluster/metrics.py`` declares it.

The core counts events by kind and reason (``Dispatcher.counters``). ``COUNTERS`` says which
series shows which kind; where a series has several labels, the reason holds their values,
separated by "/".
"""

from __future__ import annotations

from cluster.dispatcher.core import Dispatcher
from instance.load import Figure
from instance.request import RequestClass

COUNTERS = {
    "placements": "drover_placements_total",
    "refusals": "drover_refusals_total",
    "reports": "drover_load_reports_total",
    "membership": "drover_membership_changes_total",
    "charges": "drover_charges_total",
    "migrations_started": "drover_migrations_started_total",
    "migrations_ended": "drover_migrations_total",
    "migrated_bytes": "drover_migrated_bytes_total",
    "scaling": "drover_scaling_total",
    "roles": "drover_role_changes_total",
    "policy_fallbacks": "drover_policy_fallbacks_total",
}
"""Series by kind of counter."""
MAX_TENANTS, OTHER = 100, "other"
"""Tenants with a series of their own, those with most service; the rest are one."""
LABELS = {"drover_migrations_total": 2}
"""Labels of the series that have more than one."""


def figures(core: Dispatcher) -> list[Figure]:
    """The dispatcher's own figures at this moment."""
    found = [
        Figure("drover_held_requests", core.num_held),
        Figure("drover_migrations_in_flight", len(core.members.transfers)),
        *_fairness(core),
    ]
    for kind, reasons in core.counters.items():
        name = COUNTERS[kind]
        splits = LABELS.get(name, 1) - 1
        found.extend(
            Figure(name, number, tuple(reason.split("/", splits)))
            for reason, number in reasons.items()
        )
    return found


def _fairness(core: Dispatcher) -> list[Figure]:
    ledger = core.ledger
    found = [
        Figure("drover_lease_reports_total", ledger.lease_reports),
        Figure("drover_system_tokens_total", ledger.system),
    ]
    for request_class in RequestClass:
        gap, labels = ledger.gap(request_class), (request_class.name.lower(),)
        found += [
            Figure("drover_fairness_gap", gap.gap, labels),
            Figure("drover_fairness_bound", gap.bound, labels),
            Figure("drover_fairness_waiting_tenants", gap.tenants, labels),
        ]
    served: dict[str, float] = {}
    for (tenant, _), book in ledger.accounts.items():
        served[tenant] = served.get(tenant, 0.0) + book.service
    order = sorted(served, key=lambda tenant: (-served[tenant], tenant))
    rest = sum(served[tenant] for tenant in order[MAX_TENANTS:])
    shown = {tenant: served[tenant] for tenant in order[:MAX_TENANTS]}
    if rest:
        shown[OTHER] = shown.get(OTHER, 0.0) + rest
    name = "drover_tenant_service_total"
    return found + [Figure(name, service, (tenant,)) for tenant, service in shown.items()]


def instance_figures(core: Dispatcher) -> dict[str, tuple[Figure, ...]]:
    """The figures that instances reported last, by instance id; without those that are gone."""
    return {
        name: load.report.figures
        for name, load in core.members.loads.items()
        if load.report is not None and not load.left
    }
