"""Under which names Ray knows the actors of a cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClusterRef:
    """How to find a cluster's actors: named Ray actors in one namespace."""

    dispatcher: str = "drover-dispatcher"
    namespace: str = "drover"

    @staticmethod
    def actor_name(member_id: str) -> str:
        """The Ray name of the instance or gateway actor with this id."""
        return f"drover-{member_id}"
