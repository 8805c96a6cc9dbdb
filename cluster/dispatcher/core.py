"""The dispatcher's policy: events in, actions out.

``Dispatcher.handle`` is the whole of it: no I/O, no clock, no threads. The Ray actor
(``actor.py``) and the simulator drive the same object.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.events import (
    Action,
    AskPrefixes,
    DrainRequested,
    Event,
    Finished,
    Joined,
    LedgerCopied,
    Left,
    MigrationEnded,
    MigrationRequested,
    PlaceRequested,
    Reported,
    ResumeRequested,
    RoleRequested,
    ScalingEnded,
    Served,
    SetDraining,
    SetRole,
    Tick,
)
from cluster.dispatcher.fairness import FairnessLedger, Source
from cluster.dispatcher.ledger_feed import LedgerFeed
from cluster.dispatcher.load import InstanceLoad, LoadConfig, blocks_for
from cluster.dispatcher.members import Members
from cluster.dispatcher.messages import ClusterView, PlaceRequest
from cluster.dispatcher.migrations import Migrations
from cluster.dispatcher.overrides import DRAINING, LEAVING, POLICY, ROLE, TENANT, Overrides, key
from cluster.dispatcher.persistence import info_to_json, infos_from_json
from cluster.dispatcher.placement import POLICIES, NamedPolicy, Uniform
from cluster.dispatcher.policies import Policies
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig, Requests
from cluster.dispatcher.roles import Roles, RolesConfig
from cluster.dispatcher.scaling import Scaler, ScalingConfig
from cluster.dispatcher.tenants import TenantPolicy, policy_from_json, policy_to_json
from cluster.dispatcher.views import LoadView
from instance.load import InstanceInfo, LoadReport, Role, SequenceLoad


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """Settings of the dispatcher.

    Attributes:
        placement: Name of the placement policy.
        migration_timeout: Seconds after which a migration that nobody ended is forgotten.
        prefix_capacity: Pairs of prefix key and instance remembered.
        roles: Roles of instances by name, at their first start; those not named are mixed.
        role_changes: When they change with the load.
    """

    placement: str = "freeness"
    migration_timeout: float = 120.0
    prefix_capacity: int = 1 << 19
    roles: tuple[tuple[str, Role], ...] = ()
    requests: RequestConfig = field(default_factory=RequestConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    role_changes: RolesConfig = field(default_factory=RolesConfig)


class _TenantOrder:
    """The ledger, as rebalancing asks it."""

    def __init__(self, ledger: FairnessLedger) -> None:
        self.counter = ledger.counter
        self.apart = ledger.apart
        self._ledger = ledger

    def theta(self, info: InstanceInfo) -> float:
        return self._ledger.theta(Source(info.instance_id, info.incarnation))


class Dispatcher:
    """Knows the instances and their load, places requests and plans migrations.

    Args:
        config: Settings.
        rng: Source of numbers for the policies that draw.
        version: First version of the membership; must exceed those of earlier lives.
        policies: Placement policies besides those of the registry, by name.

    Attributes:
        members: Instances, loads and migrations under way.
        migrations: Which requests move.
        overrides: What operators have set at run time.
        ledger: What tenants have received.
        placing: Requests asked for, held and placed.
        policies: Which placement and rebalancing are in force.
        scaler: How many instances there should be.
        roles: Which of them compute prompts.
        counters: Events by kind and reason, for metrics.

    Raises:
        ValueError: if the placement policy is unknown.
    """

    def __init__(
        self,
        config: DispatcherConfig,
        rng: Uniform,
        version: int = 1,
        policies: Mapping[str, NamedPolicy] | None = None,
    ) -> None:
        self.config = config
        self.members = Members(config.load, version, config.prefix_capacity)
        self.overrides = Overrides(version)
        self.counters: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        settings = config.requests
        self.ledger = FairnessLedger(version, settings.tenants, settings.default_tenant)
        self.feed = LedgerFeed(self.ledger)
        self.placing = Requests(settings, self.members, self.ledger, self._choose, self._count)
        self._first_roles = dict(config.roles)
        self.migrations = Migrations(
            self.members,
            config.rebalance,
            config.migration_timeout,
            self._count,
            self.placing.is_over,
            _TenantOrder(self.ledger),
            self.placing,
        )
        known = {**POLICIES, **(policies or {})}
        self.scaler = Scaler(config.scaling, self._count)
        self.roles = Roles(config.role_changes, self._count)
        self.policies = Policies(config.placement, known, self.migrations, rng, self._count)
        self._apply_policies()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; returns what is to be done, in order.

        Args:
            event: What happened.
            now: Monotonic seconds; must not decrease from call to call.
        """
        match event:
            case PlaceRequested(request):
                return self.placing.asked(request, now)
            case Finished(request_id, epoch):
                actions = self.placing.finished(request_id, epoch, now)
                return actions + self.placing.release(now)
            case MigrationRequested(request_id, destination):
                return self.migrations.requested(request_id, destination, now)
            case MigrationEnded(ended):
                self.migrations.ended(ended, now)
                return []
            case Reported(report):
                actions = self._reported(report, now)
            case Joined(info):
                actions = self._joined(info, now)
            case Left(instance_id, incarnation):
                actions = []
                if self.members.leave(instance_id, incarnation):
                    self._count("membership", "left")
                    self._gone(instance_id, incarnation, now)
            case LedgerCopied(instance_id, incarnation, copy):
                actions = []
                self.feed.copied(Source(instance_id, incarnation), copy, now)
            case Served(gateway_id, instance_id, incarnation, charged):
                actions = []
                source = Source(instance_id, incarnation)
                self.ledger.homes_report(gateway_id, source, charged, now)
            case DrainRequested(instance_id):
                self.overrides.set(key(DRAINING, instance_id), True)
                actions = self._set_draining(instance_id, True)
            case ResumeRequested(instance_id):
                self.overrides.set(key(DRAINING, instance_id), None)
                actions = self._set_draining(instance_id, False)
            case RoleRequested(instance_id, role):
                self.overrides.set(key(ROLE, instance_id), role.value)
                actions = self._set_role(instance_id, role)
            case ScalingEnded(instance_id, outcome):
                actions = self._scaling_ended(instance_id, outcome, now)
            case Tick():
                actions = self._tick(now)
        actions.extend(self.placing.release(now))
        actions.extend(self.feed.send(now))
        self.members.update_version(now)
        return actions

    def _joined(self, info: InstanceInfo, now: float) -> list[Action]:
        before = self.members.loads.get(info.instance_id)
        if before is not None and before.info.incarnation != info.incarnation:
            self._gone(info.instance_id, before.info.incarnation, now)
        self._count("membership", self.members.join(info, now))
        if self.overrides.get(key(DRAINING, info.instance_id)):
            self.members.set_draining(info.instance_id, True)
        if self.members.loads[info.instance_id].draining:
            return [SetDraining(info.instance_id, True)]
        return []

    def _reported(self, report: LoadReport, now: float) -> list[Action]:
        outcome = self.members.report(report, now)
        self._count("reports", outcome)
        actions: list[Action] = [AskPrefixes(name) for name in self.members.ask_prefixes(now)]
        source = Source(report.instance_id, report.incarnation)
        # Sums count however late they come; what waits is told by the newest report alone.
        if report.service is not None and outcome == "accepted":
            actions.extend(self.feed.reported(source, report.service, now))
        elif report.service is not None and self.ledger.knows(source):
            self.ledger.report(source, report.service, now)
        if outcome == "accepted":
            self.placing.reported(report, now)
        # What an operator set goes before the settings at start, and a role that an instance
        # reports outlived a dispatcher that had set it.
        name = report.instance_id
        if outcome == "accepted" and self.members.loads[name].role is None:
            wanted = self.overrides.get(key(ROLE, name)) or self._first_roles.get(name)
            if wanted is not None and report.role is Role.MIXED:
                actions.extend(self._set_role(name, Role(wanted)))
        return actions

    def _gone(self, instance_id: str, incarnation: str, now: float) -> None:
        self.feed.gone(Source(instance_id, incarnation), now)
        self.placing.waiting.lost(instance_id, now)

    def _choose(self, request: PlaceRequest, candidates: Candidates) -> LoadView:
        view = self.policies.choose(request, candidates)
        if self.roles.config.enabled:
            self.roles.placed(candidates.missing_on(view.instance_id, request.num_tokens))
        return view

    # ---- policies

    def set_policies(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change policies, now and after a restart; see ``Policies.change``."""
        settings = self.policies.change(changes)
        for name, value in changes.items():
            self.overrides.set(key(POLICY, name), value)
        self._apply_policies()
        return settings

    def dry_run(self, changes: Mapping[str, Any], now: float) -> dict[str, Any]:
        """What other policies would decide; see ``Policies.dry_run``."""
        return self.policies.dry_run(changes, lambda r: self.members.candidates(r, now), now)

    def _apply_policies(self) -> None:
        self.placing.late_binding = self.policies.late_binding

    # ---- tenants

    def set_tenant(self, tenant: str, fields: Mapping[str, Any]) -> TenantPolicy:
        """Change what a tenant may have, now and after a restart.

        Args:
            fields: Of "weight", "max_queued" and "classes" those that change.

        Raises:
            ValueError: a field is unknown or out of range; the text says which.
        """
        policy = policy_from_json(fields, self.ledger.policy(tenant))
        self.overrides.set(key(TENANT, tenant), policy_to_json(policy))
        self._set_tenant(tenant, policy)
        return policy

    def _set_tenant(self, tenant: str, policy: TenantPolicy) -> None:
        self.ledger.set_tenant(tenant, policy)
        self.feed.all_due()

    # ---- operators and time

    def _set_draining(self, instance_id: str, on: bool) -> list[Action]:
        if instance_id not in self.members.loads:
            return []
        self.members.set_draining(instance_id, on)
        return [SetDraining(instance_id, on)]

    def _set_role(self, instance_id: str, role: Role) -> list[Action]:
        if instance_id not in self.members.loads:
            return []
        self.members.set_role(instance_id, role)
        return [SetRole(instance_id, role)]

    def _tick(self, now: float) -> list[Action]:
        expired = self.members.expire(now)
        if expired:
            self._count("charges", "expired", expired)
        lifetimes = self.config.load
        for load in self.members.gone(now):
            self._gone(load.info.instance_id, load.info.incarnation, now)
        self.ledger.expire(now, lifetimes.forget_after)
        actions = self.placing.expire(now, lifetimes.charge_lifetime)
        self._scale(now)
        return actions + self._change_roles(now) + self.migrations.tick(now)

    # ---- roles and scaling

    def _change_roles(self, now: float) -> list[Action]:
        if not self.roles.config.enabled:
            return []
        held = sum(one.request.num_tokens for one in self.placing.queues)
        found = self.roles.update(
            self.members.views(now),
            held,
            lambda name: self.overrides.get(key(ROLE, name)) is not None,
            now,
        )
        return self._set_role(*found) if found is not None else []

    def _scale(self, now: float) -> None:
        if not (self.config.scaling.enabled or self.scaler.leaving or self.scaler.orders()):
            return
        loads = self.members.loads
        views = self.members.views(now)
        demand = 0
        if self.config.scaling.enabled and views:
            size = views[0].info.model.block_size
            demand = sum(blocks_for(h.request.num_tokens, size) for h in self.placing.queues)
        empty = {
            name: not (loads[name].sequences or loads[name].charges or loads[name].moving)
            for name in self.scaler.leaving
            if name in loads
        }
        self.scaler.update(views, empty, demand, loads.__contains__, now)
        for name, load in loads.items():
            leaving = name in self.scaler.leaving
            if load.leaving != leaving:
                self.members.set_leaving(name, leaving)
                self.overrides.set(key(LEAVING, name), leaving or None)

    def _scaling_ended(self, instance_id: str, outcome: str, now: float) -> list[Action]:
        self.scaler.ended(instance_id, outcome, now)
        load = self.members.loads.get(instance_id)
        if outcome != "stopped" or load is None:
            return []
        self.overrides.set(key(LEAVING, instance_id), None)
        return self.handle(Left(instance_id, load.info.incarnation), now)

    # ---- what outlives the dispatcher

    def export_state(self, now: float) -> dict[str, Any]:
        """What a later dispatcher should begin with, ready for JSON, by section."""
        infos = [view.info for view in self.view(now).instances]
        return {
            "overrides": self.overrides.export(),
            "membership": [info_to_json(info) for info in infos],
            "ledger": self.ledger.export_state(),
        }

    def restore_state(self, state: Mapping[str, Any], now: float) -> list[Action]:
        """Take what an earlier dispatcher exported; what is known to be newer stays.

        Instances are suspect until they are heard of.
        """
        actions: list[Action] = []
        load = self.config.load
        silent = load.report_interval * load.suspect_intervals * 1.01
        for info in infos_from_json(state.get("membership")):
            if info.instance_id not in self.members.loads:
                self.members.join(info, now - silent)
        overrides = state.get("overrides")
        for name in self.overrides.merge(overrides if isinstance(overrides, dict) else {}):
            kind, _, rest = name.partition("/")
            if kind == DRAINING:
                actions.extend(self._set_draining(rest, bool(self.overrides.get(name))))
            elif kind == LEAVING and self.overrides.get(name):
                self.scaler.leaving.add(rest)
            elif kind == POLICY:
                with contextlib.suppress(ValueError):
                    self.policies.change({rest: self.overrides.get(name)})
                    self._apply_policies()
            elif kind == TENANT:
                with contextlib.suppress(ValueError):  # written by another version
                    self._set_tenant(rest, self._tenant_from(self.overrides.get(name)))
        ledger = state.get("ledger")
        if isinstance(ledger, dict):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self.ledger.restore_state(ledger, now)
        self.members.update_version(now)
        return actions

    def _tenant_from(self, fields: Any) -> TenantPolicy:
        settings = self.config.requests
        return policy_from_json(fields if isinstance(fields, dict) else {}, settings.default_tenant)

    # ---- what is known

    def view(self, now: float) -> ClusterView:
        """Membership and load, for gateways and operators."""
        view = self.members.cluster_view(now)
        return dataclasses.replace(
            view, overrides=self.overrides.export(), ledger=self.ledger.export_state()
        )

    def locate(self, request_id: str, now: float) -> tuple[InstanceLoad, SequenceLoad] | None:
        """The instance that holds a request under its newest epoch, and what is known of it.

        A request that was placed and not yet reported is found where it was placed.
        """
        return self.migrations.locate(request_id, now)

    def requests(self, now: float) -> Iterator[tuple[InstanceLoad, SequenceLoad]]:
        """Every request and where it is: reported ones, then those charged only."""
        return self.migrations.requests(now)

    @property
    def num_held(self) -> int:
        """Requests that wait for an instance with room."""
        return len(self.placing.queues)

    def _count(self, kind: str, reason: str, number: int = 1) -> None:
        self.counters[kind][reason] += number
