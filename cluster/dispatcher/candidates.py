"""Instances that a request may go to, and the columns that policies compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.predicted import memory_seconds
from cluster.dispatcher.table import Bools, Floats, Ints, LoadTable
from cluster.dispatcher.views import LoadView

_STALE_WEIGHT = 0.5
"""What is left of a freeness whose report is about to make its instance suspect."""


class Candidates(Sequence[LoadView]):
    """Instances that a policy may choose from, as views and as columns in the same order.

    Attributes:
        rows: [n] their rows in the table, ascending.
        cached: [n] leading blocks of the prompt that each holds already.
    """

    def __init__(
        self, table: LoadTable, rows: NDArray[np.intp], now: float, cached: Ints | None = None
    ) -> None:
        self.rows = rows
        self.cached = np.zeros(len(rows), np.int64) if cached is None else cached
        self._table = table
        self._now = now

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> LoadView: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoadView]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._view(row) for row in self.rows[index]]
        return self._view(self.rows[index])

    def __iter__(self) -> Iterator[LoadView]:
        return (self._view(row) for row in self.rows)

    def _view(self, row: int) -> LoadView:
        return self._table.load(row).view(self._now, self._table.config)

    def offers(self, name: str) -> bool:
        """Whether an instance is among them."""
        row = self._table.rows.get(name)
        return row is not None and bool((self.rows == row).any())

    def missing_on(self, name: str, num_tokens: int) -> int:
        """Tokens of a prompt of ``num_tokens`` that must be computed on one of them."""
        row = self._table.rows[name]
        cached = int(self.cached[self.rows.searchsorted(row)])
        return max(1, num_tokens - cached * self._table.load(row).info.model.block_size)

    def where(self, keep: Bools) -> Candidates:
        """Those for which ``keep`` [n] is true."""
        return Candidates(self._table, self.rows[keep], self._now, self.cached[keep])

    @property
    def freeness(self) -> Floats:
        """[n] placement freeness, times speed, less what a late report no longer proves.

        On an instance twice as fast room for a block is worth two, since it is used and
        given back in half the time; a shortage weighs half as much.
        """
        table = self._table
        free = table.freeness[self.rows]
        if not table.uniform:
            speed = table.speed()[self.rows]
            free = np.where(free > 0, free * speed, free / speed)
        config = table.config
        ready = table.all_ready(self._now)
        if ready is not None and self._now <= ready.fresh:
            return free
        late = self._now - table.heard[self.rows] - config.report_interval
        if late.max() > 0:
            span = max(config.suspect_after - config.report_interval, 1e-9)
            weight = 1 - (1 - _STALE_WEIGHT) * np.clip(late / span, 0, 1)
            free = np.where(free > 0, free * weight, free)
        return free

    @property
    def memory_seconds(self) -> Floats:
        """[n] seconds that a request is expected to lose by want of memory.

        The duration of a step is taken to be the cluster's: a short one would make an
        instance look the fuller, whose KV is given back the sooner.
        """
        table = self._table
        seconds = table.usual_block_seconds(self.rows)
        return memory_seconds(self.freeness, seconds, table.total[self.rows])

    @property
    def prompt_seconds(self) -> Floats:
        """[n] seconds until the prompts that are there, or on their way, are computed."""
        return self._table.prompts_ahead[self.rows] * self._token_seconds

    @property
    def block_prompt_seconds(self) -> Floats:
        """[n] seconds that a block of prompt takes to compute."""
        return self._table.block_size[self.rows] * self._token_seconds

    @property
    def _token_seconds(self) -> Floats | np.float64:
        """[n] seconds that a position of a prompt takes: the cluster's figure, by speed; one
        number where they do not differ."""
        table = self._table
        pace = np.float64(table.prompt_pace())
        return pace if table.uniform else pace / table.speed()[self.rows]

    @property
    def occupancy(self) -> Floats:
        """[n] share of KV blocks used, promised or waited for."""
        return self._table.occupancy[self.rows]

    @property
    def slack(self) -> Ints:
        """[n] tokens that a request may have to run at once; negative where none would."""
        return self._table.slack[self.rows]

    @property
    def headroom(self) -> Ints:
        """[n] tokens of KV that are kept free for the interactive class, not in ``slack``."""
        return self._table.headroom[self.rows]

    @property
    def shared_room(self) -> Ints:
        """[n] tokens that interactive requests may yet share; see ``LoadView.shared_room``."""
        return self._table.shared_room[self.rows]

    @property
    def backlog(self) -> Ints:
        """[n] requests that wait there, or will when they arrive."""
        return self._table.backlog[self.rows]

    @property
    def full_batch(self) -> Bools:
        """[n] whether all slots of the batch are taken."""
        return self._table.full_batch[self.rows]

    @property
    def last_placed(self) -> Ints:
        """[n] number of the last placement made on each."""
        return self._table.turn[self.rows]

    def best(self, score: Floats) -> LoadView:
        """The one of highest ``score`` [n]; ties by fewest requests, then by turn."""
        top = int(score.argmax())
        tied_with = score == score[top]
        if np.count_nonzero(tied_with) == 1:
            return self[top]
        at = np.flatnonzero(tied_with)
        for column in (self._table.requests, self._table.turn):
            if len(at) == 1:
                break
            tied = column[self.rows[at]]
            at = at[tied == tied.min()]
        return self[int(at[0])]


def find_candidates(
    table: LoadTable, request: PlaceRequest, now: float, since: float | None = None
) -> Candidates | None:
    """The instances that may take a request, or None if none may now.

    An instance to avoid is taken only if it has been heard of after ``since``: then it
    lives. A suspect instance is better than none, and so is one of another model, one
    too small, and one that is there for decoding.
    """
    table.refresh(now)
    ready = None if request.avoid else table.all_ready(now)
    # One model is all there is, or the request does not say; and all are large enough.
    if ready is not None and ready.model >= 0 and ready.capacity > request.num_tokens:
        return Candidates(table, ready.rows, now)
    silent = now - table.heard
    usable = table.usable(silent)
    avoided = [table.rows[name] for name in request.avoid if name in table.rows]
    for row in avoided:
        if since is None or table.heard[row] <= since:
            usable[row] = False
    preferences = [
        silent <= table.config.suspect_after,
        table.prompts,
        table.model == table.model_number(request.model),
        table.capacity > request.num_tokens,
    ]
    if avoided:
        other = np.ones(len(usable), np.bool_)
        other[avoided] = False
        preferences.append(other)
    if not usable.any():
        return None
    for preferred in preferences:
        kept = usable & preferred
        if kept.any():
            usable = kept
    return Candidates(table, np.flatnonzero(usable), now)
