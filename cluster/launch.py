"""Starting and stopping a cluster: Ray, dispatcher, instances and gateways."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.config import ServeConfig
from cluster.dispatcher.core import DispatcherConfig
from cluster.fleet import ACTOR_CPUS, Fleet, environment
from cluster.gateway.config import GatewayConfig
from cluster.local import write_state
from cluster.names import ClusterRef
from cluster.ray_setup import (
    LaunchError,
    check_port,
    free_port,
    gist,
    prepare_ray,
    short_temp_dir,
    shut_down_ray,
)
from instance.load import InstanceInfo

# Ray is imported within functions: it reads its environment when it is imported, so
# `prepare_ray` must come first.

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100_000_000
"""Nothing large passes through Ray's object store; by default it takes 30% of memory."""
CALL_TIMEOUT = 60.0
OBSERVE_INTERVAL = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A started cluster.

    Attributes:
        url: Base URL of the HTTP API, reachable from this machine.
        model: Name under which clients know the model.
        admin_key: Key of the admin API.
        instances: The instances as they started.
        seconds: What the start took.
    """

    url: str
    model: str
    admin_key: str
    instances: tuple[InstanceInfo, ...]
    seconds: float


class GatewayProcess:
    """``cluster.gateway.actor.GatewayActor``, imported only in its own process, likewise."""

    def __init__(self, gateway_id: str, config: GatewayConfig, cluster: ClusterRef) -> None:
        from cluster.gateway.actor import GatewayActor

        self._actor = GatewayActor(gateway_id, config, cluster)

    def start(self) -> str:
        return self._actor.start()

    def stop(self) -> None:
        self._actor.stop()


def start_dispatcher(
    config: DispatcherConfig, cluster: ClusterRef, redis_url: str = "", policy_dir: str = ""
) -> Any:
    """Create the named, detached, restartable dispatcher actor; returns its handle once up."""
    import ray

    from cluster.dispatcher.actor import DispatcherActor

    handle = (
        ray.remote(DispatcherActor)
        .options(
            name=cluster.dispatcher,
            namespace=cluster.namespace,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=10_000,
            num_cpus=0,
        )
        .remote(config, cluster, redis_url, policy_dir)
    )
    ray.get(handle.status.remote(), timeout=CALL_TIMEOUT)
    return handle


class Cluster:
    """A cluster being started, running, or being stopped, from the launcher's side.

    Args:
        config: Settings; missing secrets and a port of 0 are filled in.
        say: Told of progress, a line at a time.
    """

    def __init__(self, config: ServeConfig, say: Callable[[str], None] = logger.info) -> None:
        self.config = dataclasses.replace(
            config,
            port=config.port or free_port(config.host),
            admin_key=config.admin_key or secrets.token_urlsafe(24),
            cluster_token=config.cluster_token or secrets.token_urlsafe(24),
        )
        self.ref: ClusterRef = self.config.ref
        self.running: Running | None = None
        self._say = say
        self._temp_dir: str | None = None
        self._prepared = False
        self._dispatcher: Any = None
        self._fleet = Fleet(self.config, say)
        self._gateways: dict[str, Any] = {}
        self._state_file: Path | None = None
        # Incarnations by instance id; "" for one that is gone.
        self._seen: dict[str, str] = {}

    # ---- start

    def start(self) -> Running:
        """Start everything and wait until requests are served.

        Raises:
            LaunchError: if that fails; what was started is stopped then.
        """
        begun = time.monotonic()
        try:
            check_port(self.config.host, self.config.port)
            dispatcher = self.config.dispatcher()  # reads a file, which may be wrong
            self._start_ray()
            self._start_dispatcher(dispatcher)
            infos = self._fleet.start()
            urls = self._start_gateways(min(info.model.max_model_len for info in infos))
            self._await_members(infos)
        except BaseException as error:
            self.stop(graceful=False)
            if isinstance(error, LaunchError | KeyboardInterrupt | SystemExit):
                raise
            raise LaunchError(gist(error)) from error
        self.running = Running(
            url=urls[0],
            model=self.config.served_model_name or self.config.model,
            admin_key=self.config.admin_key,
            instances=tuple(infos),
            seconds=time.monotonic() - begun,
        )
        self._seen = {info.instance_id: info.incarnation for info in infos}
        self._state_file = write_state(self.running.url, self.config.port, self.config.admin_key)
        return self.running

    def _start_ray(self) -> None:
        address = self.config.address
        if not address:
            self._temp_dir = short_temp_dir()
        prepare_ray(address, self._temp_dir or "")
        self._prepared = True
        import ray

        common: dict[str, Any] = {
            "namespace": self.ref.namespace,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if address:
            self._say(f"Connecting to the Ray cluster at {address}")
            ray.init(address=address, **common)
            return
        self._say("Starting Ray on this machine")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._temp_dir,
            **common,
        )

    def _start_dispatcher(self, config: DispatcherConfig) -> None:
        self._clear_abandoned()
        self._dispatcher = start_dispatcher(
            config, self.ref, self.config.redis_url, self.config.policy_dir
        )

    def _clear_abandoned(self) -> None:
        """Remove the dispatcher of a cluster of our name whose launcher was killed."""
        import ray

        try:
            old = ray.get_actor(self.ref.dispatcher, namespace=self.ref.namespace)
        except ValueError:
            return
        status = ray.get(old.status.remote(), timeout=CALL_TIMEOUT)
        if status["instances"]:
            raise LaunchError(
                f"a cluster named {self.config.cluster_name!r} runs in this Ray cluster already; "
                "choose another --cluster-name"
            )
        ray.kill(old)
        deadline = time.monotonic() + CALL_TIMEOUT
        while time.monotonic() < deadline:
            try:
                ray.get_actor(self.ref.dispatcher, namespace=self.ref.namespace)
            except ValueError:
                return
            time.sleep(0.1)
        raise LaunchError("an abandoned dispatcher does not stop")

    def _start_gateways(self, max_model_len: int) -> list[str]:
        import ray

        remote = ray.remote(GatewayProcess)
        # A loopback address means this machine; any other may be served from every node.
        here: Any = "SPREAD"
        if self.config.host in ("127.0.0.1", "::1", "localhost"):
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            )
        for number in range(self.config.gateways):
            gateway_id = f"gateway-{number}"
            self._gateways[gateway_id] = remote.options(
                name=self.ref.actor_name(gateway_id),
                namespace=self.ref.namespace,
                max_restarts=-1,
                max_concurrency=16,
                num_cpus=0 if here != "SPREAD" else ACTOR_CPUS,
                scheduling_strategy=here,
                runtime_env=environment(self.config),
            ).remote(gateway_id, self.config.gateway(gateway_id, max_model_len), self.ref)
        urls = []
        for name, handle in self._gateways.items():
            try:
                urls.append(str(ray.get(handle.start.remote(), timeout=2 * CALL_TIMEOUT)))
            except Exception as error:
                raise LaunchError(f"{name} did not start: {gist(error)}") from error
            self._say(f"{name}: listening on {urls[-1]}")
        return urls

    def _await_members(self, infos: list[InstanceInfo]) -> None:
        """Wait until the dispatcher has heard of every instance."""
        import ray

        wanted = {info.incarnation for info in infos}
        deadline = time.monotonic() + CALL_TIMEOUT
        while time.monotonic() < deadline:
            status = ray.get(self._dispatcher.status.remote(), timeout=CALL_TIMEOUT)
            if wanted <= {instance["incarnation"] for instance in status["instances"]}:
                return
            time.sleep(0.05)
        raise LaunchError("the instances do not reach the dispatcher")

    def observe(self) -> None:
        """Say which instances went or came back since the last call, and follow the load."""
        import ray

        with contextlib.suppress(Exception):
            # While the dispatcher is away nothing is known; it says so when it is back.
            status = ray.get(self._dispatcher.status.remote(0), timeout=1.0)
            found = {one["instance_id"]: one["incarnation"] for one in status["instances"]}
            for name in self._fleet.handles:
                before, now = self._seen.get(name), found.get(name, "")
                if before and not now:
                    self._say(f"{name}: gone; its requests go on elsewhere")
                elif before is not None and now != before:
                    self._say(f"{name}: {'restarted' if before else 'back'}")
            known = {name: "" for name in self._seen if name in self._fleet.handles}
            self._seen = known | found
        if self.config.max_instances:
            self._scale()

    def _scale(self) -> None:
        """Start and stop instances as the dispatcher orders."""
        import ray

        with contextlib.suppress(Exception):
            orders = ray.get(self._dispatcher.scaling_orders.remote(), timeout=1.0)
            ended = self._fleet.follow(orders)
            calls = [
                self._dispatcher.scaling_ended.remote(name, outcome)
                for name, outcome in ended.items()
            ]
            ray.get(calls, timeout=CALL_TIMEOUT)

    # ---- stop

    def stop(self, graceful: bool = True) -> None:
        """Stop everything that was started; safe to call again.

        Args:
            graceful: Let running requests end, for at most ``drain_grace`` seconds.
        """
        if self._state_file is not None:
            self._state_file.unlink(missing_ok=True)
            self._state_file = None
        try:
            if graceful:
                self._stop_members()
        finally:
            self._kill_members()

    def _stop_members(self) -> None:
        import ray

        for members, patience in (
            (self._gateways, self.config.drain_grace + 5.0),
            (self._fleet.handles, 5.0),
        ):
            ending = [handle.stop.remote() for handle in members.values()]
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=patience)
        if self._dispatcher is not None and self.config.redis_url:
            ray.wait([self._dispatcher.flush.remote()], timeout=5.0)

    def _kill_members(self) -> None:
        if not self._prepared:
            return
        import ray

        if ray.is_initialized():
            members = [*self._gateways.values(), *self._fleet.handles.values(), self._dispatcher]
            for handle in filter(None, members):
                with contextlib.suppress(Exception):
                    ray.kill(handle, no_restart=True)
        shut_down_ray(self._temp_dir)
        self._fleet.handles.clear()
        self._gateways, self._dispatcher = {}, None
        self._temp_dir = None


def serve(
    config: ServeConfig, say: Callable[[str], None], ready: Callable[[Running], None]
) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second signal stops at once.

    Args:
        config: Settings.
        say: Told of progress, a line at a time.
        ready: Called once, when requests are served.

    Raises:
        LaunchError: if the cluster does not start.
    """
    cluster = Cluster(config, say)
    stopping = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def finish(number: int, frame: FrameType | None) -> None:
        stopping.set()

    with _signals(interrupt):
        try:
            ready(cluster.start())
        except KeyboardInterrupt:
            say("Interrupted")
            cluster.stop(graceful=False)
            return
        with _signals(finish):
            while not stopping.wait(OBSERVE_INTERVAL):
                cluster.observe()
        say("Stopping; once more to stop at once")
        try:
            cluster.stop()
        except KeyboardInterrupt:
            cluster.stop(graceful=False)
    say("Stopped")


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``handler`` within the block."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
