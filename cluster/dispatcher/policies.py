"""The policies in force: which decide, how they are changed, and what others would decide."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.migrations import Migrations
from cluster.dispatcher.placement import POLICIES, NamedPolicy, Uniform, freeness
from cluster.dispatcher.views import LoadView

_SHOWN = 64
"""Decisions of a dry run that are listed one by one."""


class PolicyFailed(Exception):
    """A policy of the user's did not decide.

    Attributes:
        reason: "raised", "late", "rests" or "nonsense".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EvenSequence:
    """Numbers in [0, 1) that cover it evenly (van der Corput's), for dry runs."""

    def __init__(self) -> None:
        self._count = 0

    def random(self) -> float:
        """The next number."""
        self._count += 1
        number, share, value = self._count, 0.5, 0.0
        while number:
            value += share * (number & 1)
            number >>= 1
            share /= 2
        return value


class Policies:
    """Chooses instances by the policy in force, and falls back where that fails.

    Args:
        placement: Name of the placement policy at start.
        known: The policies there are, by name.
        migrations: Its rules follow the policy.
        rng: Source of numbers for the policies that draw.
        count: Counts an event of a kind under a reason.

    Attributes:
        first: Name of the policy at start.

    Raises:
        ValueError: the policy is unknown.
    """

    def __init__(
        self,
        placement: str,
        known: Mapping[str, NamedPolicy],
        migrations: Migrations,
        rng: Uniform,
        count: Callable[[str, str, int], None],
    ) -> None:
        self.first = placement
        self._known = dict(known)
        self._migrations = migrations
        self._rng = rng
        self._count = count
        self._recent: deque[tuple[PlaceRequest, str]] = deque(maxlen=512)
        self._name = ""
        self._policy = POLICIES["freeness"]
        self._use(self._require(placement))

    def add(self, name: str, policy: NamedPolicy) -> None:
        """Make a policy of the user's known; one of that name is replaced."""
        self._known[name] = policy
        if name == self._name:
            self._use(name)

    def knows(self, name: str) -> bool:
        """Whether a placement policy has this name."""
        return name in self._known

    @property
    def late_binding(self) -> bool:
        """Whether requests wait in the dispatcher while no instance has room."""
        return self._policy.late_binding

    def choose(self, request: PlaceRequest, candidates: Candidates) -> LoadView:
        """One of the candidates, for a request that is placed now."""
        view = self._decide(self._name, self._policy, request, candidates, self._rng)
        self._recent.append((request, view.instance_id))
        return view

    def _decide(
        self,
        name: str,
        policy: NamedPolicy,
        request: PlaceRequest,
        candidates: Candidates,
        rng: Uniform,
    ) -> LoadView:
        if name in POLICIES:
            return policy.choose(request, candidates, rng)
        try:
            view = policy.choose(request, candidates, rng)
            if not isinstance(view, LoadView) or not candidates.offers(view.instance_id):
                raise PolicyFailed("nonsense")
            return view
        except Exception as error:
            reason = error.reason if isinstance(error, PolicyFailed) else "raised"
            self._count("policy_fallbacks", reason, 1)
            return freeness(request, candidates, rng)

    # ---- changes

    def settings(self) -> dict[str, Any]:
        """What is in force, ready for JSON."""
        return {
            "placement": self._name,
            "rebalance": self._migrations.config.enabled,
            "rules": self._migrations.rules,
            "late_binding": self.late_binding,
        }

    def describe(self) -> dict[str, Any]:
        """What is in force, and the placement policies there are; ready for JSON."""
        return {**self.settings(), "known": sorted(self._known)}

    def check(self, changes: Mapping[str, Any]) -> None:
        """Raises ValueError, with what is wrong, if the changes cannot be made."""
        for field, value in changes.items():
            if field == "placement":
                self._require(value)
            elif field != "rebalance":
                raise ValueError(f"there is no policy setting {field!r}")
            elif not isinstance(value, bool):
                raise ValueError("rebalance is true or false")

    def change(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change "placement", "rebalance" or both; returns what is in force then.

        Raises:
            ValueError: a name or value is unknown; nothing is changed then.
        """
        self.check(changes)
        for field, value in changes.items():
            if field == "placement":
                self._use(value)
            else:
                self._migrations.config = dataclasses.replace(
                    self._migrations.config, enabled=value
                )
        return self.settings()

    def _require(self, name: str) -> str:
        if name not in self._known:
            raise ValueError(
                f"unknown placement policy {name!r}; known: {', '.join(sorted(self._known))}"
            )
        return name

    def _use(self, name: str) -> None:
        self._name = name
        self._policy = self._known[name]
        self._migrations.rules = self._policy.rebalancing

    # ---- what if

    def dry_run(
        self,
        changes: Mapping[str, Any],
        candidates: Callable[[PlaceRequest], Candidates | None],
        now: float,
    ) -> dict[str, Any]:
        """What other policies would decide on the recent requests and the present loads.

        Each request is decided by itself, as if the others were not placed.

        Args:
            changes: As for ``change``; nothing is changed.
            candidates: Finds the instances that a request may go to.
            now: The instant of the loads.

        Returns:
            Ready for JSON: the settings there would be, how many of the recent requests
            would go elsewhere than by the policy in force, how many would go to each
            instance, some decisions one by one, and the moves that would start.

        Raises:
            ValueError: as for ``change``.
        """
        self.check(changes)
        name = changes.get("placement", self._name)
        policy = self._known[name]
        enabled = changes.get("rebalance", self._migrations.config.enabled)
        decisions: list[dict[str, str]] = []
        goes: Counter[str] = Counter()
        differ = 0
        present, other = EvenSequence(), EvenSequence()
        for request, chosen in reversed(self._recent):
            offered = candidates(request)
            if offered is None:
                continue
            holds = self._decide(self._name, self._policy, request, offered, present).instance_id
            would = self._decide(name, policy, request, offered, other).instance_id
            differ += holds != would
            goes[would] += 1
            decisions.append(
                {
                    "request_id": request.request_id,
                    "chosen": chosen,
                    "in_force": holds,
                    "would": would,
                }
            )
        moves = self._migrations.preview(policy.rebalancing if enabled else "off", now)
        return {
            "settings": {
                "placement": name,
                "rebalance": enabled,
                "rules": policy.rebalancing,
                "late_binding": policy.late_binding,
            },
            "requests": len(decisions),
            "differ": differ,
            "instances": dict(goes),
            "decisions": decisions[:_SHOWN],
            "moves": [
                {
                    "request_id": move.sequence.request_id,
                    "source": move.source,
                    "destination": move.destination,
                    "reason": move.reason,
                }
                for move in moves
            ],
        }
