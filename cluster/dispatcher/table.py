"""Loads of all instances as columns, so that a decision costs a few array operations.

A placement changes one instance's load. Its row is written anew when the next decision
needs it, and policies compare columns (``candidates``) instead of walking over instances.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.dispatcher.load import Book, InstanceLoad, LoadConfig
from cluster.dispatcher.predicted import block_seconds
from cluster.dispatcher.speeds import Speeds
from cluster.dispatcher.views import InstanceState
from instance.load import Role

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

STATES = (
    InstanceState.GONE,
    InstanceState.READY,
    InstanceState.SUSPECT,
    InstanceState.DRAINING,
)
_GONE, _READY, _SUSPECT, _DRAINING = range(4)
_ROUNDING = 1e-6
"""Seconds by which a sum of times may be off."""


class _Open(NamedTuple):
    """Instances that most requests choose from; see ``LoadTable.all_ready``.

    Attributes:
        rows: [n] their rows.
        until: When the first of them would be suspect.
        fresh: When the first report of them would be late.
        model: The number of the model that all serve, or -1 if they differ.
        capacity: Tokens that the smallest one's KV holds.
    """

    rows: NDArray[np.intp]
    until: float
    fresh: float
    model: int
    capacity: int


class LoadTable:
    """One row per instance; a row's number is kept as long as its instance is known.

    Args:
        config: How long reports are trusted.
        book: Tells which loads changed.
    """

    def __init__(self, config: LoadConfig, book: Book) -> None:
        self.config = config
        self._book = book
        self.rows: dict[str, int] = {}
        self._facts: dict[int, tuple[bool, bool, bool, int, int, int]] = {}
        self._loads: list[InstanceLoad | None] = []
        self._vacant: list[int] = []
        self._models: dict[str, int] = {}
        size = 16
        self.heard = np.full(size, -math.inf)
        self.alive = np.zeros(size, np.bool_)
        self.draining = np.zeros(size, np.bool_)
        self.prompts = np.zeros(size, np.bool_)
        self.model = np.zeros(size, np.int64)
        self.capacity = np.zeros(size, np.int64)
        self.freeness = np.zeros(size)
        self.occupancy = np.zeros(size)
        self.requests = np.zeros(size, np.int64)
        self.turn = np.zeros(size, np.int64)
        self.slack = np.zeros(size, np.int64)
        self.headroom = np.zeros(size, np.int64)
        self.shared_room = np.zeros(size, np.int64)
        self.backlog = np.zeros(size, np.int64)
        self.full_batch = np.zeros(size, np.bool_)
        self.total = np.zeros(size)
        self.block_size = np.zeros(size, np.int64)
        self.block_seconds = np.zeros(size)
        self.prompts_ahead = np.zeros(size, np.int64)
        self._speeds = Speeds()
        self._speed: Floats | None = None
        self._uniform = True
        self._prompt_pace = 0.0
        # Of the instances last asked for: their rows, and the duration.
        self._usual: tuple[NDArray[np.intp], float] | None = None
        self._open: _Open | None = None
        self._states: NDArray[np.int8] | None = None
        self._states_until = -math.inf

    @property
    def size(self) -> int:
        """Rows, those in use and those that are not."""
        return len(self.heard)

    def put(self, name: str, load: InstanceLoad) -> int:
        """Add an instance, or replace the load of one that has a row; returns the row."""
        row = self.rows.get(name)
        if row is None:
            row = self._vacant.pop() if self._vacant else len(self._loads)
            if row == len(self._loads):
                self._loads.append(None)
            if row == len(self.heard):
                self._grow()
            self.rows[name] = row
        self._loads[row] = load
        self._forget_speed(row)
        load.touch()
        return row

    def model_number(self, name: str) -> int:
        """What ``model`` holds where this model is served; -1 if nowhere."""
        return self._models.get(name, -1)

    def remove(self, name: str) -> int:
        """Forget an instance; returns its row, which may be another's next."""
        row = self.rows.pop(name)
        self._loads[row] = None
        self._facts.pop(row, None)
        self.alive[row] = False
        self.heard[row] = -math.inf
        self._vacant.append(row)
        self._open = self._states = None
        self._forget_speed(row)
        return row

    def load(self, row: int) -> InstanceLoad:
        """The instance in a row that is in use."""
        load = self._loads[row]
        if load is None:
            raise KeyError(row)
        return load

    def _grow(self) -> None:
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                more = np.zeros_like(column)
                setattr(self, name, np.concatenate((column, more)))
        self._speed = self._states = None

    def refresh(self, now: float) -> None:
        """Write the rows of the loads that changed."""
        changed = self._book.changed
        while changed:
            load = changed.pop()
            row = self.rows.get(load.info.instance_id)
            if row is not None and self._loads[row] is load:
                self._write(row, load, now)

    def _write(self, row: int, load: InstanceLoad, now: float) -> None:
        view = load.view(now, self.config)
        model = view.info.model
        number = self._models.setdefault(model.name, len(self._models))
        size = model.block_size
        facts = not load.left, load.drains, view.role is not Role.DECODE, number, view.total, size
        if facts != self._facts.get(row) or now - self.heard[row] > self.config.suspect_after:
            self._facts[row] = facts
            self._open = self._states = None
            self.alive[row], self.draining[row], self.prompts[row], self.model[row], *_ = facts
            self.total[row], self.block_size[row] = view.total, size
            self.capacity[row] = view.total * size
        self.heard[row] = load.heard
        self.freeness[row] = view.placement_freeness()
        self.occupancy[row] = view.occupancy
        seconds = block_seconds(view)
        if seconds != self.block_seconds[row]:
            self.block_seconds[row] = seconds
            self._usual = None
        self.prompts_ahead[row] = view.backlog
        self.requests[row] = view.num_requests
        self.turn[row] = view.last_placed
        self.slack[row], self.backlog[row], self.full_batch[row] = load.room(view)
        if view.reserve:
            self.headroom[row] = view.headroom * size
            self.shared_room[row] = view.shared_room * size
        if self._speeds.observe(row, view.costs):
            self._speed = None

    def _forget_speed(self, row: int) -> None:
        self._speeds.forget(row)
        self._speed = None

    def states(self, now: float) -> NDArray[np.int8]:
        """Per row the index in ``STATES``; of a vacant row GONE.

        The same array until a state may have changed: a fact about an instance has, or one of
        them has been silent for long.
        """
        self.refresh(now)
        if self._states is None or now >= self._states_until:
            self._states = self._find_states(now)
        return self._states

    def gone(self, now: float) -> list[InstanceLoad]:
        """The instances that are gone."""
        found = (
            self._loads[row]
            for row in np.flatnonzero(self.states(now)[: len(self._loads)] == _GONE)
        )
        return [load for load in found if load is not None]

    def _find_states(self, now: float) -> NDArray[np.int8]:
        suspect, gone = self.config.suspect_after, self.config.gone_after
        silent = now - self.heard
        # What counts is when silence exceeds a limit: a little before, in rounded seconds.
        left = [limit - silent[self.alive & (silent <= limit)] for limit in (suspect, gone)]
        self._states_until = now + min(
            (float(one.min()) for one in left if len(one)), default=math.inf
        )
        self._states_until -= _ROUNDING
        return np.where(
            ~self.alive | (silent > gone),
            np.int8(_GONE),
            np.where(
                self.draining,
                np.int8(_DRAINING),
                np.where(silent > suspect, np.int8(_SUSPECT), np.int8(_READY)),
            ),
        )

    def most_slack(self, now: float) -> int:
        """The most slack of an instance that may take requests, in tokens, with the headroom;
        -1 if there is none."""
        rows = self._usable_rows(now)
        return int(np.maximum.reduce((self.slack + self.headroom)[rows], initial=-1))

    def any_waits_below(self, most: int, full: bool, now: float) -> bool:
        """Whether fewer than ``most`` wait at any instance that may take requests, and, with
        ``full``, for a slot of its batch."""
        rows = self._usable_rows(now)
        found = self.backlog[rows] < most
        if full:
            found &= self.full_batch[rows]
        return bool(found.any())

    def any_usable(self, now: float) -> bool:
        """Whether any instance may take requests."""
        return len(self._usable_rows(now)) > 0

    def _usable_rows(self, now: float) -> NDArray[np.intp]:
        self.refresh(now)
        ready = self.all_ready(now)
        return ready.rows if ready is not None else np.flatnonzero(self.usable(now - self.heard))

    def usable(self, silent: Floats) -> Bools:
        """[rows] those that may take requests; ``silent`` [rows] are seconds without a report."""
        return self.alive & ~self.draining & (silent <= self.config.gone_after)

    def speed(self) -> Floats:
        """Per row the speed relative to the median instance; 1 where they do not differ."""
        if self._speed is None:
            found = self._speeds.relative()
            self._speed = np.ones(self.size)
            self._speed[list(found)] = list(found.values())
            self._uniform = not found
            self._prompt_pace = self._speeds.prompt_pace()
        return self._speed

    def usual_block_seconds(self, rows: NDArray[np.intp]) -> float:
        """Seconds in which a sequence fills a block on the median instance of those in
        ``rows``, which may not change afterwards."""
        if self._usual is None or self._usual[0] is not rows:
            half = len(rows) // 2
            self._usual = rows, float(np.partition(self.block_seconds[rows], half)[half])
        return self._usual[1]

    def prompt_pace(self) -> float:
        """Seconds that a position of a prompt takes on the median instance."""
        self.speed()
        return self._prompt_pace

    @property
    def uniform(self) -> bool:
        """Whether all instances count as equally fast."""
        self.speed()
        return self._uniform

    def all_ready(self, now: float) -> _Open | None:
        """The ready instances that take prompts, if these are all that there are to choose from.

        Kept until a fact about an instance changes, or one of them may have become suspect.
        """
        found = self._open
        if found is None or now >= found.until:
            usable = self.usable(now - self.heard) & self.prompts
            rows = np.flatnonzero(usable)
            if not len(rows):
                return None
            oldest = float(self.heard[rows].min())
            if now - oldest > self.config.suspect_after:
                return None
            found = self._open = _Open(
                rows=rows,
                until=oldest + self.config.suspect_after,
                fresh=oldest + self.config.report_interval,
                model=int(self.model[rows[0]])
                if (self.model[rows] == self.model[rows[0]]).all()
                else -1,
                capacity=int(self.capacity[rows].min()),
            )
        return found
