"""The operators' calls of the dispatcher actor."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from typing import Any

from cluster.dispatcher import status
from cluster.dispatcher.audit import AuditLog, Change
from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.events import (
    Action,
    DrainRequested,
    Event,
    MigrationRequested,
    RejectMigration,
    ResumeRequested,
    RoleRequested,
    Tick,
)
from cluster.dispatcher.figures import figures, instance_figures
from cluster.dispatcher.store import StateKeeper
from cluster.dispatcher.tenants import policy_to_json
from cluster.user_policy import FileRefused, file_policies, is_file_policy, permitted
from instance.load import Figure, MigrationReport, Role

CHECK_TIMEOUT = 10.0


class OrderError(Exception):
    """An order that cannot be followed.

    Attributes:
        code: "unknown_request", "unknown_instance", "conflict", "invalid_value" or "forbidden".
        param: The value at fault, if it is one.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.code = code
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class OperatorCalls:
    """What operators may ask of the dispatcher; a part of its actor."""

    _core: Dispatcher
    _keeper: StateKeeper | None
    _audit: AuditLog
    _moves: dict[str, list[asyncio.Future[MigrationReport]]]
    _migrations: deque[MigrationReport]
    _started: float
    _policy_dir: str

    def _handle(self, event: Event) -> list[Action]:
        raise NotImplementedError

    def _instance(self, instance_id: str) -> Any:
        raise NotImplementedError

    def _start_tasks(self) -> None:
        raise NotImplementedError

    # ---- orders

    async def migrate(self, request_id: str, destination: str | None = None) -> MigrationReport:
        """Move a request; to the freest other instance where ``destination`` is None.

        Returns:
            How the attempt ended; its outcome is "moved" or why the request stayed.

        Raises:
            OrderError: if it cannot be tried.
        """
        future: asyncio.Future[MigrationReport] = asyncio.get_running_loop().create_future()
        waiting = self._moves.setdefault(request_id, [])
        waiting.append(future)
        try:
            actions = self._handle(MigrationRequested(request_id, destination))
            for action in actions:
                if isinstance(action, RejectMigration):
                    raise OrderError(action.code, action.message)
            return await future
        finally:
            waiting.remove(future)
            if not waiting and self._moves.get(request_id) is waiting:
                del self._moves[request_id]

    async def drain(self, instance_id: str, until_restart: bool = False) -> None:
        """Give an instance no more requests and move away those it has.

        Args:
            instance_id: Which.
            until_restart: Only this incarnation: its process is about to end, and the one
                that takes its place takes requests.

        Raises:
            OrderError: if there is no such instance, or it does not answer.
        """
        self._require(instance_id)
        if until_restart:
            await self._drain_incarnation(instance_id)
        else:
            self._handle(DrainRequested(instance_id))

    async def _drain_incarnation(self, instance_id: str) -> None:
        """Have an instance say in its reports that it is draining; ends once one said so."""
        load = self._core.members.loads[instance_id]
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                await self._instance(instance_id).drain.remote(True)
                if load.draining is False:
                    # An earlier drain was ended here, which outweighs the reports.
                    self._core.members.set_draining(instance_id, None)
                while not load.drains:
                    await asyncio.sleep(0.02)
        except Exception as error:
            why = "no answer" if isinstance(error, TimeoutError) else first_line(error)
            raise OrderError("conflict", f"{instance_id} cannot be drained: {why}") from None

    async def resume(self, instance_id: str) -> None:
        """End a drain.

        Raises:
            OrderError: if there is no such instance.
        """
        self._require(instance_id)
        self._handle(ResumeRequested(instance_id))

    async def set_role(self, instance_id: str, role: str) -> None:
        """Change what an instance is for: "mixed", "prefill" or "decode".

        Raises:
            OrderError: if there is no such instance.
            ValueError: if there is no such role.
        """
        self._require(instance_id)
        self._handle(RoleRequested(instance_id, Role(role)))

    async def policies(self) -> dict[str, Any]:
        """The policies in force, those there are, and who changed what; ready for JSON."""
        return {**self._core.policies.describe(), "audit": self._audit.export()}

    async def set_policies(
        self, changes: dict[str, Any], dry_run: bool, who: str
    ) -> dict[str, Any]:
        """Change policies, or say what changed ones would decide; ready for JSON.

        Raises:
            OrderError: a name or value is unknown, or a file must not be loaded.
        """
        core = self._core
        before = core.policies.settings()
        try:
            if "placement" in changes:
                changes = {**changes, "placement": self._load_policy(changes["placement"])}
            if dry_run:
                return core.dry_run(changes, time.monotonic())
            after = core.set_policies(changes)
        except FileRefused as error:
            raise OrderError("forbidden", str(error), "placement") from None
        except ValueError as error:
            raise OrderError("invalid_value", str(error)) from None
        for field in changes:
            self._note(who, field, before[field], after[field])
        self._handle(Tick())
        return after

    def _load_policy(self, name: Any) -> Any:
        """Read a placement policy's file, if it has one; returns the name that it is known by.

        The one of ``--placement`` is known already, wherever it is.

        Raises:
            FileRefused: the file must not be loaded.
            ValueError: it cannot be.
        """
        policies = self._core.policies
        if not isinstance(name, str) or not is_file_policy(name) or name == policies.first:
            return name
        name = permitted(name, self._policy_dir)
        for known, policy in file_policies(name).items():
            policies.add(known, policy)
        return name

    async def check(self) -> dict[str, Any]:
        """What every instance says of its block pool, ready for JSON; or its "error"."""

        async def ask(instance_id: str) -> dict[str, Any]:
            try:
                found = await asyncio.wait_for(
                    self._instance(instance_id).check.remote(), CHECK_TIMEOUT
                )
            except TimeoutError:
                found = {"error": f"no answer within {CHECK_TIMEOUT:g} s"}
            except Exception as error:
                found = {"error": first_line(error)}
            return {"instance_id": instance_id, **found}

        view = self._core.view(time.monotonic())
        names = sorted(instance.info.instance_id for instance in view.instances)
        return {"instances": list(await asyncio.gather(*map(ask, names)))}

    def _require(self, instance_id: str) -> None:
        if instance_id not in self._core.members.loads:
            raise OrderError("unknown_instance", f"there is no instance {instance_id!r}")

    async def set_tenant(self, tenant: str, changes: dict[str, Any], who: str) -> dict[str, Any]:
        """Change what a tenant may have; returns what holds now.

        Raises:
            OrderError: if a value is out of range.
        """
        before = policy_to_json(self._core.ledger.policy(tenant))
        try:
            after = policy_to_json(self._core.set_tenant(tenant, changes))
        except ValueError as error:
            raise OrderError("invalid_value", str(error)) from None
        self._note(who, f"tenant/{tenant}", before, after)
        return {"tenant": tenant, **after}

    def _note(self, who: str, what: str, before: Any, after: Any) -> None:
        self._audit.note(Change(time.time(), who, what, before, after))

    # ---- questions

    async def figures(self) -> dict[str, Any]:
        """For ``/metrics``: "dispatcher", its own, and "instances", theirs by instance id."""
        own = [
            Figure("drover_dispatcher_start_time_seconds", self._started),
            *figures(self._core),
            *([] if self._keeper is None else self._keeper.figures()),
        ]
        return {"dispatcher": own, "instances": instance_figures(self._core)}

    async def status(self, limit: int = 256) -> dict[str, Any]:
        """Everything an operator may want to see, ready for JSON.

        Args:
            limit: Requests listed at most; their number is in "num_requests".
        """
        self._start_tasks()
        now = time.monotonic()
        return {
            "version": self._core.members.version,
            "started": self._started,
            **self._core.policies.settings(),
            "instances": status.instances(self._core, now),
            **status.requests(self._core, now, limit),
            "held": self._core.num_held,
            "migrating": status.migrating(self._core, now),
            "migrations": [dataclasses.asdict(report) for report in reversed(self._migrations)],
            "counters": {kind: dict(counts) for kind, counts in self._core.counters.items()},
            "tenants": status.tenants(self._core, now)["tenants"],
            "scaling": self._core.scaler.describe(now),
            "store": {"kind": "memory"} if self._keeper is None else self._keeper.status(),
        }

    async def requests(
        self, limit: int = 256, instance_id: str = "", tenant: str = ""
    ) -> dict[str, Any]:
        """Requests of the whole cluster, ready for JSON; see :func:`status.requests`."""
        return status.requests(self._core, time.monotonic(), limit, instance_id, tenant)

    async def instances(self) -> list[dict[str, Any]]:
        """Every instance that is not gone, ready for JSON."""
        return status.instances(self._core, time.monotonic())

    async def tenants(self) -> dict[str, Any]:
        """Tenants and how far apart they are; see :func:`status.tenants`."""
        return status.tenants(self._core, time.monotonic())


def first_line(error: BaseException) -> str:
    """The gist of an error; Ray's carry whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
