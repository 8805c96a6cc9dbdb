"""The instances' Ray actors: created, awaited, and stopped; by order also while serving."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.config import ServeConfig
from cluster.dispatcher.scaling import START, STOP, instance_name
from cluster.ray_setup import LaunchError, gist, node_address
from cluster.reporter import DispatcherReporter
from instance.config import EngineConfig
from instance.leases import LedgerUpdate
from instance.load import InstanceInfo, MigrationReport, Role

# Ray is imported within functions: it reads its environment when it is imported.

ACTOR_CPUS = 0.01
"""Ray's CPU share of an actor: keeps actors off nodes that declare none, reserves little."""
STOP_TIMEOUT = 5.0


class InstanceProcess:
    """``instance.actor.InstanceActor``, imported only in its own process.

    The launcher would otherwise load the whole model stack to name the class.
    """

    def __init__(
        self,
        instance_id: str,
        config: EngineConfig,
        token: str,
        host: str | Callable[[], str],
        reporter: DispatcherReporter,
    ) -> None:
        from instance.actor import InstanceActor

        self._actor = InstanceActor(instance_id, config, token, host, reporter)

    def start(self) -> InstanceInfo:
        return self._actor.start()

    def progress(self) -> str:
        return self._actor.progress()

    def migrate(self, request_id: str, destination: InstanceInfo, reason: str) -> MigrationReport:
        return self._actor.migrate(request_id, destination, reason)

    def drain(self, on: bool) -> None:
        self._actor.drain(on)

    def set_role(self, role: Role) -> None:
        self._actor.set_role(role)

    def tell_prefixes(self) -> None:
        self._actor.tell_prefixes()

    def take_ledger(self, incarnation: str, update: LedgerUpdate) -> None:
        self._actor.take_ledger(incarnation, update)

    def copy_ledger(self) -> tuple[str, LedgerUpdate]:
        return self._actor.copy_ledger()

    def check(self) -> dict[str, Any]:
        return self._actor.check()

    def stop(self) -> None:
        self._actor.stop()


@dataclasses.dataclass(slots=True)
class _Starting:
    """An instance that was added and is not ready.

    Attributes:
        ready: Answers when it is.
        placed: Answers once its process runs.
        since: When it was asked for.
    """

    ready: Any
    placed: Any
    since: float
    runs: bool = False


class Fleet:
    """The instances of one cluster, from the launcher's side.

    Args:
        config: Settings.
        say: Told of progress, a line at a time.
        clock: Monotonic seconds.

    Attributes:
        handles: Ray actors by instance id.
    """

    def __init__(
        self,
        config: ServeConfig,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.handles: dict[str, Any] = {}
        self._config = config
        self._say = say
        self._clock = clock
        self._device = config.device
        self._starting: dict[str, _Starting] = {}
        self._stopping: dict[str, tuple[Any, float]] = {}

    def start(self) -> list[InstanceInfo]:
        """Start the configured number and wait until all are ready; raises LaunchError."""
        import ray

        config = self._config
        if self._device == "auto":
            gpus = ray.cluster_resources().get("GPU", 0)
            self._device = "cuda" if gpus >= config.instances else "cpu"
        self._say(
            f"Starting {config.instances} instance{'s' * (config.instances > 1)} of "
            f"{config.model} on {self._device}"
        )
        for number in range(config.instances):
            name = instance_name(number)
            self.handles[name] = self._create(name)
        return self._await_all()

    def _create(self, name: str) -> Any:
        import ray

        config = self._config
        host: str | Callable[[], str] = config.instance_host or "127.0.0.1"
        if config.address and not config.instance_host:
            host = node_address
        return (
            ray.remote(InstanceProcess)
            .options(
                name=config.ref.actor_name(name),
                namespace=config.ref.namespace,
                max_restarts=-1,
                max_concurrency=16,
                num_cpus=ACTOR_CPUS,
                num_gpus=1 if self._device == "cuda" else 0,
                scheduling_strategy="SPREAD",
                runtime_env=environment(config),
            )
            .remote(
                name,
                config.engine(self._device),
                config.cluster_token,
                host,
                DispatcherReporter(config.ref),
            )
        )

    def _await_all(self) -> list[InstanceInfo]:
        import ray

        starting = {handle.start.remote(): name for name, handle in self.handles.items()}
        asked: dict[Any, str] = {}
        shown: dict[str, str] = {}
        infos: dict[str, InstanceInfo] = {}
        deadline = time.monotonic() + self._config.startup_timeout
        while starting:
            if time.monotonic() > deadline:
                late = ", ".join(sorted(starting.values()))
                raise LaunchError(f"{late}: not ready within {self._config.startup_timeout:g} s")
            done, _ = ray.wait(list(starting), num_returns=1, timeout=0.5)
            for reference in done:
                name = starting.pop(reference)
                try:
                    infos[name] = ray.get(reference)
                except Exception as error:
                    raise LaunchError(f"{name} did not start: {gist(error)}") from error
                self._say(f"{name}: ready, {infos[name].total_blocks} KV blocks")
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for reference in ready:
                name = asked.pop(reference)
                with contextlib.suppress(Exception):
                    stage = ray.get(reference)
                    if stage != shown.get(name) and name in starting.values():
                        shown[name] = stage
                        self._say(f"{name}: {stage}")
            for name in set(starting.values()) - set(asked.values()):
                asked[self.handles[name].progress.remote()] = name
        return [infos[name] for name in self.handles]

    # ---- by order, while serving

    def follow(self, orders: Mapping[str, str]) -> dict[str, str]:
        """Do what the dispatcher's scaling orders, without waiting for it.

        Args:
            orders: "start" or "stop" by instance id; what is under way goes on.

        Returns:
            How those ended that have: "started", "stopped", or why not, by instance id.
        """
        ended: dict[str, str] = {}
        for name, what in orders.items():
            if what == START and name not in self.handles:
                self._say(f"{name}: starting, as the load asks for it")
                self._begin_start(name)
            elif what == STOP and name not in self.handles:
                ended[name] = "stopped"
            elif what == STOP and name not in self._stopping:
                self._starting.pop(name, None)
                self._stopping[name] = self.handles[name].stop.remote(), self._clock()
        for name in list(self._starting):
            outcome = self._started(name)
            if outcome:
                ended[name] = outcome
        for name in list(self._stopping):
            if self._stopped(name):
                ended[name] = "stopped"
        return ended

    def _begin_start(self, name: str) -> None:
        handle = self.handles[name] = self._create(name)
        self._starting[name] = _Starting(
            handle.start.remote(), handle.progress.remote(), self._clock()
        )

    def _started(self, name: str) -> str:
        """How a start ended; "" while it has not."""
        one = self._starting[name]
        if _answered(one.ready):
            import ray

            del self._starting[name]
            try:
                info = ray.get(one.ready)
            except Exception as error:
                return self._give_up(name, gist(error))
            self._say(f"{name}: ready, {info.total_blocks} KV blocks")
            return "started"
        one.runs = one.runs or _answered(one.placed)
        waited = self._clock() - one.since
        patience = self._config.scale_out_timeout
        if not one.runs and waited > patience:
            del self._starting[name]
            return self._give_up(name, f"no machine had room for {patience:g} s")
        return ""

    def _give_up(self, name: str, why: str) -> str:
        self._say(f"{name}: not started: {why}")
        self._kill(name)
        return why

    def _stopped(self, name: str) -> bool:
        reference, since = self._stopping[name]
        if not _answered(reference) and self._clock() - since <= STOP_TIMEOUT:
            return False
        del self._stopping[name]
        self._kill(name)
        self._say(f"{name}: stopped, as the load no longer needs it")
        return True

    def _kill(self, name: str) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self.handles.pop(name), no_restart=True)


def _answered(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=0)[0])


def environment(config: ServeConfig) -> dict[str, Any] | None:
    """What workers on other nodes do not inherit from this process."""
    if not config.address:
        return None
    passed = ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    names = (*passed, "TOKENIZERS_PARALLELISM")
    return {"env_vars": {name: os.environ[name] for name in names if name in os.environ}}
