"""The dispatcher as an actor: serialises events, executes actions.

Runs as a named, detached Ray actor that restarts by itself. After a restart the instances'
reports and the gateways' last views bring its state back, and so does Redis, if it was named;
until then gateways place by the last view they were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from cluster.dispatcher.audit import AuditLog
from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    Action,
    AskPrefixes,
    Event,
    FetchLedger,
    Finished,
    Joined,
    LedgerCopied,
    Left,
    MigrationEnded,
    Place,
    PlaceRequested,
    Refuse,
    RejectMigration,
    Reported,
    ScalingEnded,
    SendLedger,
    Served,
    SetDraining,
    SetRole,
    StartMigration,
    Tick,
)
from cluster.dispatcher.messages import (
    ClusterView,
    Placement,
    PlaceRequest,
    Refusal,
)
from cluster.dispatcher.operators import OperatorCalls, first_line
from cluster.dispatcher.overrides import POLICY, key
from cluster.dispatcher.store import RedisStore, StateKeeper
from cluster.names import ClusterRef
from cluster.user_policy import FileRefused, file_policies
from instance.heap import freeze_heap
from instance.load import InstanceInfo, LoadReport, MigrationReport
from instance.request import Account

logger = logging.getLogger(__name__)

Answer = Placement | Refusal
TICK = 0.1
"""Seconds between ticks of the core."""
OUTBOX_LIFETIME = 60.0
"""Seconds after which answers that their gateway does not fetch are forgotten."""


class _Outbox:
    """Answers that a gateway has not fetched yet, by request id and epoch."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[str, int], Answer] = {}
        self.ready = asyncio.Event()
        self.used = time.monotonic()


class DispatcherActor(OperatorCalls):
    """The cluster's one dispatcher.

    Args:
        config: Settings.
        cluster: Where the instances' actors are found.
        redis_url: Where the state is kept; "" keeps it in memory only.
        policy_dir: Where files of policies may be that are named while serving; "" for none.
    """

    def __init__(
        self,
        config: DispatcherConfig,
        cluster: ClusterRef,
        redis_url: str = "",
        policy_dir: str = "",
    ) -> None:
        # Versions grow across restarts, so that a gateway never takes an old view for new.
        version = time.time_ns() // 1_000_000
        policies = file_policies(config.placement)
        self._core = Dispatcher(config, random.Random(), version, policies)
        self._version = version
        self._cluster = cluster
        self._outboxes: dict[str, _Outbox] = {}
        self._moves = {}
        self._migrations = deque(maxlen=64)
        self._audit = AuditLog()
        self._policy_dir = policy_dir
        self._changed = asyncio.Event()
        self._handles: dict[tuple[str, str], Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: list[asyncio.Task[None]] = []
        self._started = time.time()
        self._keeper = None
        if redis_url:
            store = RedisStore(redis_url, f"{cluster.namespace}:{cluster.dispatcher}")
            self._keeper = StateKeeper(store, self._export, self._restore, version)
        freeze_heap()

    # ---- instances

    async def join(self, info: InstanceInfo) -> None:
        """An instance started, or was told that it is not known here."""
        logger.info("instance %s joined at %s", info.instance_id, info.address)
        self._handle(Joined(info))

    async def report(self, report: LoadReport) -> bool:
        """Take a load report; false if the instance must join again."""
        if not self._core.members.knows(report.instance_id, report.incarnation):
            return False
        self._handle(Reported(report))
        return True

    async def leave(self, instance_id: str, incarnation: str) -> None:
        """An instance is about to stop."""
        self._handle(Left(instance_id, incarnation))

    # ---- gateways

    async def place(
        self, requests: list[PlaceRequest], ended: Sequence[tuple[str, int]] = ()
    ) -> list[Answer | None]:
        """Where each request shall run, in the same order; None while it is held.

        Of several requests the higher class is placed first, then the older. What is held is
        answered by ``answers``; asking again now and then keeps it alive.

        Args:
            requests: To place.
            ended: As for ``finished``, and taken in before: one call is cheaper than two.
        """
        await self.finished(ended)
        for request in sorted(requests, key=lambda r: (r.request_class, r.arrival)):
            self._handle(PlaceRequested(request))
        return [
            self._outbox(request.gateway_id).waiting.pop((request.request_id, request.epoch), None)
            for request in requests
        ]

    async def answers(self, gateway_id: str, timeout: float) -> list[Answer]:
        """Answers to requests of a gateway that were held, as soon as there are any.

        An answer that is lost on its way is had again by asking for the request again.
        """
        outbox = self._outbox(gateway_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                # What is answered at once is out of the box again before this wakes.
                while not outbox.waiting:
                    outbox.ready.clear()
                    await outbox.ready.wait()
        found = list(outbox.waiting.values())
        outbox.waiting.clear()
        return found

    async def served(
        self,
        gateway_id: str,
        instance_id: str,
        incarnation: str,
        charged: list[tuple[Account, float]],
    ) -> None:
        """A gateway lost its stream to an instance, and what service it got from it."""
        self._handle(Served(gateway_id, instance_id, incarnation, tuple(charged)))

    def _outbox(self, gateway_id: str) -> _Outbox:
        outbox = self._outboxes.setdefault(gateway_id, _Outbox())
        outbox.used = time.monotonic()
        return outbox

    async def finished(self, ended: Sequence[tuple[str, int]]) -> None:
        """Requests ended at their home, each with its last epoch."""
        for request_id, epoch in ended:
            self._handle(Finished(request_id, epoch))

    async def watch(
        self, version: int, timeout: float, known: Mapping[str, Any] | None = None
    ) -> ClusterView:
        """The view once its version differs from ``version``, or after ``timeout`` seconds.

        Args:
            known: Overrides and ledger of the last view that the caller had, where it was told
                it by a dispatcher that may since have been restarted and have forgotten them.
        """
        self._start_tasks()
        if known:
            self._restore(known)
        deadline = time.monotonic() + timeout
        while self._core.members.version == version:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                break
        return self._core.view(time.monotonic())

    async def flush(self) -> None:
        """Write what is not stored yet; the dispatcher is about to be stopped."""
        if self._keeper is not None:
            await self._keeper.close()

    # ---- what outlives the dispatcher

    def _export(self) -> dict[str, Any]:
        return {**self._core.export_state(time.monotonic()), "audit": self._audit.export()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._audit.restore(state.get("audit"))
        self._restore_policy(state)
        self._do(self._core.restore_state(state, time.monotonic()))

    # ---- whoever runs the instances

    async def scaling_orders(self) -> dict[str, str]:
        """Instances to "start" and to "stop", by instance id."""
        self._start_tasks()
        return self._core.scaler.orders()

    async def scaling_ended(self, instance_id: str, outcome: str) -> None:
        """An order was carried out ("started", "stopped"), or why it was not."""
        self._handle(ScalingEnded(instance_id, outcome))

    def _restore_policy(self, state: Mapping[str, Any]) -> None:
        """Load the file of the placement policy that an earlier dispatcher was given."""
        overrides = state.get("overrides")
        entry = overrides.get(key(POLICY, "placement")) if isinstance(overrides, dict) else None
        name = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None
        if isinstance(name, str) and not self._core.policies.knows(name):
            try:
                self._load_policy(name)
            except (FileRefused, ValueError) as error:
                logger.warning("placement policy %s is not used: %s", name, error)

    # ---- events and actions

    def _handle(self, event: Event) -> list[Action]:
        self._start_tasks()
        actions = self._core.handle(event, time.monotonic())
        self._do(actions)
        return actions

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self._execute(action)
        if self._core.members.version != self._version:
            self._version = self._core.members.version
            self._changed.set()
            self._changed = asyncio.Event()

    def _execute(self, action: Action) -> None:
        match action:
            case Place(answer, gateway_id) | Refuse(answer, gateway_id):
                outbox = self._outboxes.setdefault(gateway_id, _Outbox())
                outbox.waiting[answer.request_id, answer.epoch] = answer
                outbox.ready.set()
            case StartMigration():
                self._spawn(self._migrate(action))
            case SetDraining(instance_id, on):
                self._spawn(self._tell(instance_id, "drain", on))
            case SetRole(instance_id, role):
                self._spawn(self._tell(instance_id, "set_role", role))
            case AskPrefixes(instance_id):
                self._spawn(self._tell(instance_id, "tell_prefixes"))
            case SendLedger(instance_id, incarnation, update):
                self._spawn(self._tell(instance_id, "take_ledger", incarnation, update))
            case FetchLedger(instance_id):
                self._spawn(self._fetch_ledger(instance_id))
            case RejectMigration():
                pass  # the caller of `migrate` sees it

    async def _fetch_ledger(self, instance_id: str) -> None:
        try:
            incarnation, copy = await self._instance(instance_id).copy_ledger.remote()
        except Exception as error:
            logger.warning("instance %s: no ledger: %s", instance_id, first_line(error))
            return
        self._handle(LedgerCopied(instance_id, incarnation, copy))

    async def _migrate(self, action: StartMigration) -> None:
        try:
            report = await self._instance(action.source).migrate.remote(
                action.request_id, action.destination, action.reason
            )
        except Exception as error:
            report = MigrationReport(
                request_id=action.request_id,
                attempt="",
                source=action.source,
                destination=action.destination.instance_id,
                reason=action.reason,
                outcome=f"error: {first_line(error)}",
            )
        self._migrations.append(report)
        logger.info(
            "migration of %s from %s to %s (%s): %s",
            *(report.request_id, report.source, report.destination),
            *(report.reason, report.outcome),
        )
        self._handle(MigrationEnded(report))
        for future in self._moves.get(report.request_id, []):
            if not future.done():
                future.set_result(report)

    async def _tell(self, instance_id: str, method: str, *args: Any) -> None:
        try:
            await getattr(self._instance(instance_id), method).remote(*args)
        except Exception as error:
            logger.warning("instance %s: %s%s: %s", instance_id, method, args, first_line(error))

    def _instance(self, instance_id: str) -> Any:
        """The handle of an instance's actor, which stays valid when the actor restarts."""
        key = instance_id, self._core.members.loads[instance_id].info.incarnation
        if key not in self._handles:
            self._handles = {k: h for k, h in self._handles.items() if k[0] != instance_id}
            self._handles[key] = ray.get_actor(
                self._cluster.actor_name(instance_id), namespace=self._cluster.namespace
            )
        return self._handles[key]

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_tasks(self) -> None:
        # An actor's constructor runs outside its event loop, hence not there.
        if not self._running:
            create = asyncio.get_running_loop().create_task
            self._running.append(create(self._tick()))
            if self._keeper is not None:
                self._running.append(create(self._keeper.run()))

    def _forget_gateways(self) -> None:
        oldest = time.monotonic() - OUTBOX_LIFETIME
        self._outboxes = {k: box for k, box in self._outboxes.items() if box.used > oldest}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                self._handle(Tick())
                self._forget_gateways()
            except Exception:
                logger.exception("tick failed")
