"""What operators set at run time, in a form that outlives the dispatcher.

Each entry has a version, and of two values of a key the one with the higher version holds,
wherever it comes from: a store, or a gateway that was told it before a restart. So an old
snapshot that arrives late undoes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DRAINING = "draining"
"""Key of an instance that is drained: ``draining/INSTANCE``; see :func:`key`."""

ROLE = "role"
"""Key of what an instance is for: ``role/INSTANCE``."""

TENANT = "tenant"
"""Key of what a tenant may have: ``tenant/NAME``."""

POLICY = "policy"
"""Key of a setting of the policies: ``policy/SETTING``."""

LEAVING = "leaving"
"""Key of an instance that is emptied to be stopped: ``leaving/INSTANCE``."""


def key(kind: str, name: str) -> str:
    """The key of a setting that each ``name`` has its own of."""
    return f"{kind}/{name}"


class Overrides:
    """A map whose newest value of a key holds (a last-writer-wins register per key).

    Values are anything that JSON can say; None means that the default holds again.

    Args:
        version: First version given out; should exceed those of earlier lives.
    """

    def __init__(self, version: int) -> None:
        self._next = version
        self._entries: dict[str, tuple[int, Any]] = {}

    def get(self, name: str) -> Any:
        """The value of a key, or None."""
        return self._entries.get(name, (0, None))[1]

    def set(self, name: str, value: Any) -> None:
        """Give a key a value that is newer than any known one."""
        self._entries[name] = self._next, value
        self._next += 1

    def items(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Names and values of the keys ``kind/NAME`` that have a value."""
        for name, (_, value) in self._entries.items():
            prefix, found, rest = name.partition("/")
            if found and prefix == kind and value is not None:
                yield rest, value

    def export(self) -> dict[str, list[Any]]:
        """All entries, ready for JSON: ``[version, value]`` by key."""
        return {name: [version, value] for name, (version, value) in self._entries.items()}

    def merge(self, exported: Mapping[str, Any]) -> list[str]:
        """Take what is newer in another export; returns the keys whose value changed.

        What is not of an export's form is left out.
        """
        changed = []
        for name, entry in exported.items():
            match entry:
                case [int(version), value] if version >= 0:
                    pass
                case _:
                    continue
            self._next = max(self._next, version + 1)
            known, before = self._entries.get(name, (-1, None))
            if version > known:
                self._entries[name] = version, value
                if value != before:
                    changed.append(name)
        return changed
