"""Who changed what at run time."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """One change.

    Attributes:
        time: When, in seconds of Unix time.
        who: Who, as the caller says it.
        what: What was changed: "placement", or "tenant/NAME".
        before: Its value until then, ready for JSON.
        after: Its value since.
    """

    time: float
    who: str
    what: str
    before: Any
    after: Any


class AuditLog:
    """The latest changes, newest first.

    Args:
        size: Changes kept.
    """

    def __init__(self, size: int = 256) -> None:
        self._changes: deque[Change] = deque(maxlen=size)

    def note(self, change: Change) -> None:
        """Keep a change; one that changes nothing is none."""
        if change.before != change.after:
            self._changes.appendleft(change)

    def export(self) -> list[dict[str, Any]]:
        """All that are kept, ready for JSON."""
        return [asdict(change) for change in self._changes]

    def restore(self, exported: Any) -> None:
        """Add the changes of an earlier life behind one's own; what does not fit is left out."""
        if not isinstance(exported, list):
            return
        known = set(map(repr, self._changes))
        for fields in exported[: self._changes.maxlen]:
            try:
                change = Change(**fields)
            except TypeError:
                continue
            if repr(change) not in known and len(self._changes) < (self._changes.maxlen or 0):
                self._changes.append(change)
