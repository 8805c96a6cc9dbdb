"""``drover`` on GPUs that are only declared: instances claim them and compute on the CPU.

Ray counts what ``RAY_OVERRIDE_RESOURCES`` declares, so that a test can say how many instances
find room.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from cluster import cli, fleet
from cluster.reporter import DispatcherReporter
from instance.config import EngineConfig


class CpuProcess(fleet.InstanceProcess):
    """An instance that was given a GPU and does without."""

    def __init__(
        self,
        instance_id: str,
        config: EngineConfig,
        token: str,
        host: str | Callable[[], str],
        reporter: DispatcherReporter,
    ) -> None:
        super().__init__(
            instance_id, dataclasses.replace(config, device="cpu"), token, host, reporter
        )


if __name__ == "__main__":
    fleet.InstanceProcess = CpuProcess  # type: ignore[misc]
    sys.exit(cli.main())
