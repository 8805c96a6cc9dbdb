"""What the dispatcher counts, for ``/metrics``, as ``cluster/metrics.py`` declares it.

The core counts events by kind and reason (``Dispatcher.counters``). ``COUNTERS`` says which
series shows which kind; where a series has several labels, the reason holds their values,
separated by "/".
"""

from __future__ import annotations

from cluster.dispatcher.core import Dispatcher
from instance.load import Figure

COUNTERS = {
    "placements": "drover_placements_total",
    "refusals": "drover_refusals_total",
    "reports": "drover_load_reports_total",
    "membership": "drover_membership_changes_total",
    "charges": "drover_charges_total",
    "migrations_started": "drover_migrations_started_total",
    "migrations_ended": "drover_migrations_total",
    "migrated_bytes": "drover_migrated_bytes_total",
}
"""Series by kind of counter."""
LABELS = {"drover_migrations_total": 2}
"""Labels of the series that have more than one."""


def figures(core: Dispatcher) -> list[Figure]:
    """The dispatcher's own figures at this moment."""
    found = [
        Figure("drover_held_requests", core.num_held),
        Figure("drover_migrations_in_flight", len(core.members.transfers)),
    ]
    for kind, reasons in core.counters.items():
        name = COUNTERS[kind]
        splits = LABELS.get(name, 1) - 1
        found.extend(
            Figure(name, number, tuple(reason.split("/", splits)))
            for reason, number in reasons.items()
        )
    return found


def instance_figures(core: Dispatcher) -> dict[str, tuple[Figure, ...]]:
    """The figures that instances reported last, by instance id; without those that are gone."""
    return {
        name: load.report.figures
        for name, load in core.members.loads.items()
        if load.report is not None and not load.left
    }
