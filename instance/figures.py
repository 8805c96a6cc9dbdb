"""What an instance counts of itself, for ``/metrics``.

Names and labels are those declared in ``cluster/metrics.py`` with the source "instance",
without the labels that name the instance.
"""

from __future__ import annotations

from instance.engine import Engine
from instance.load import Figure


def figures(engine: Engine) -> tuple[Figure, ...]:
    """The figures of an engine at this moment."""
    return (Figure("drover_instance_steps_total", engine.steps),)
