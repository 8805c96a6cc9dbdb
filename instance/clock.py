"""The one clock interface: real for servers, virtual for simulation and tests."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol


class TimerHandle(Protocol):
    """A call due later."""

    def cancel(self) -> None:
        """Forget the call; no effect once it has run."""


class Clock(Protocol):
    """Monotonic seconds and delayed calls."""

    def now(self) -> float:
        """Monotonic time in seconds."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` once, ``delay`` seconds from now."""


class RealClock:
    """The machine's monotonic clock; delayed calls run on the current event loop."""

    def now(self) -> float:
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        return asyncio.get_running_loop().call_later(delay, callback)


class _VirtualTimer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """Time that moves only when told; calls due at the same instant keep their order."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._order = itertools.count()
        self._queue: list[tuple[float, int, _VirtualTimer]] = []

    def now(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        return self.call_at(self._now + delay, callback)

    def call_at(self, due: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` once, at exactly that time, or now if that is past."""
        timer = _VirtualTimer(callback)
        heapq.heappush(self._queue, (max(self._now, due), next(self._order), timer))
        return timer

    def run_next(self) -> bool:
        """Jump to the next due call and run it; false when none is left."""
        while self._queue:
            due, _, timer = heapq.heappop(self._queue)
            callback = timer.callback
            if callback is not None:
                self._now = due
                timer.callback = None
                callback()
                return True
        return False

    def run_until(self, deadline: float) -> None:
        """Run every call due up to ``deadline``, then set the time to it."""
        while self._queue and self._queue[0][0] <= deadline:
            self.run_next()
        self._now = max(self._now, deadline)
