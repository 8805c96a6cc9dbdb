"""Where the dispatcher's state outlives it: Redis, if it was named, and nowhere else.

The state is a few sections of JSON (ledger, membership, overrides). They lie in one Redis
hash, with the number of the dispatcher's *life* that wrote them: a dispatcher that was
replaced and does not know it can no longer write. Nothing waits for the store: a task reads
it once and writes what changed, and while Redis is away the state in memory goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import orjson
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from instance.load import Figure

logger = logging.getLogger(__name__)

State = Mapping[str, Any]
_LIFE = "life"
_OK, _SUPERSEDED, _EMPTY = "ok", "superseded", "empty"

# KEYS[1] the hash; ARGV: life, then names and texts of sections. Without sections it only
# looks. A hash without a life was lost, with whatever had been written before.
_SAVE = """
local life = redis.call('HGET', KEYS[1], 'life')
if life and tonumber(life) > tonumber(ARGV[1]) then return 'superseded' end
if #ARGV == 1 and not life then return 'empty' end
redis.call('HSET', KEYS[1], 'life', ARGV[1])
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 'ok'
"""


class StoreError(Exception):
    """The store does not answer, or answers nonsense; the text is for operators."""


class Store(Protocol):
    """Sections of text that outlive the dispatcher.

    Attributes:
        address: Where it is, without secrets.
    """

    address: str

    async def load(self) -> tuple[int, dict[str, bytes]]:
        """The last writer's life, 0 if there was none, and the sections; raises StoreError."""

    async def save(self, life: int, sections: Mapping[str, bytes]) -> str:
        """Write sections, or only look where there are none; raises StoreError.

        Returns:
            "ok", "superseded" where a later life has written (nothing is written then), or
            "empty" where there are no sections to write and none in the store.
        """

    async def close(self) -> None:
        """Let go of the connection."""


class RedisStore:
    """A :class:`Store` in one hash of a Redis server.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py takes it.
        key: Name of the hash.
        timeout: Seconds for a connection, and for an answer.
    """

    def __init__(self, url: str, key: str, timeout: float = 2.0) -> None:
        parts = urlsplit(url)
        self.address = f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path
        self._key = key
        # Trying again is the keeper's: it must know of a failure, and at once.
        self._redis = redis.asyncio.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )
        self._save = self._redis.register_script(_SAVE)

    async def load(self) -> tuple[int, dict[str, bytes]]:
        found = await _asked(self._redis.hgetall(self._key))
        sections = {name.decode(): text for name, text in found.items()}
        try:
            return int(sections.pop(_LIFE, b"0")), sections
        except ValueError:
            raise StoreError(f"{self._key} holds something else") from None

    async def save(self, life: int, sections: Mapping[str, bytes]) -> str:
        arguments: list[Any] = [life]
        for name, text in sections.items():
            arguments += [name, text]
        answer = await _asked(self._save(keys=[self._key], args=arguments))
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    async def close(self) -> None:
        await self._redis.aclose()


async def _asked(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreError(str(error) or type(error).__name__) from error


class StateKeeper:
    """Restores the state from a store once, then writes what changes, some times a second.

    Args:
        store: Where it is kept.
        export: Returns the state; each value is a section.
        restore: Takes sections that were stored; must not undo what is newer.
        life: Number of this dispatcher's life, greater than those before; raised if the
            store has seen a greater one.
        interval: Seconds between looks at what changed.
        check: Seconds after which the store is asked though nothing changed, so that its
            failure, or the loss of what it held, is noticed.
        last_retry: Seconds between attempts at most while it is away.
    """

    def __init__(
        self,
        store: Store,
        export: Callable[[], State],
        restore: Callable[[State], None],
        life: int,
        interval: float = 0.5,
        check: float = 5.0,
        last_retry: float = 5.0,
    ) -> None:
        self.up = True
        self.superseded = False
        self.restored = False
        self.error = ""
        self.writes: Counter[str] = Counter(ok=0, failed=0, superseded=0)
        self._store = store
        self._export = export
        self._restore = restore
        self._life = life
        self._interval = interval
        self._check = check
        self._last_retry = last_retry
        self._written: dict[str, bytes] = {}
        self._behind_since: float | None = None
        self._asked = float("-inf")
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Restore, then write, for ever; or until a later dispatcher has taken over."""
        retry = self._interval
        while not self.superseded:
            try:
                await self.flush()
                retry = self._interval
            except StoreError:
                retry = min(2 * retry, self._last_retry)
            except Exception:
                logger.exception("keeping the dispatcher's state failed")
                retry = self._last_retry
            await asyncio.sleep(retry)

    async def flush(self) -> None:
        """Write what changed; before the first time, restore. Raises StoreError."""
        async with self._lock:
            try:
                if not self.restored:
                    await self._load()
                await self._save()
            except StoreError as error:
                self._failed(error)
                raise
            self._answered()

    async def close(self, timeout: float = 2.0) -> None:
        """Write what is left, if the store answers in time."""
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(timeout):
                await self.flush()
        with contextlib.suppress(Exception):
            await self._store.close()

    async def _load(self) -> None:
        life, texts = await self._store.load()
        self._life = max(self._life, life + 1)
        sections = {}
        for name, text in texts.items():
            try:
                sections[name] = orjson.loads(text)
            except orjson.JSONDecodeError:
                logger.warning("section %r of the stored state is not JSON; left out", name)
        self.restored = True
        if sections:
            logger.info("restoring %s from %s", ", ".join(sections), self._store.address)
            self._restore(sections)

    async def _save(self) -> None:
        now = time.monotonic()
        sections = {
            name: orjson.dumps(section, option=orjson.OPT_SORT_KEYS)
            for name, section in self._export().items()
        }
        changed = {name: text for name, text in sections.items() if self._written.get(name) != text}
        if changed and self._behind_since is None:
            self._behind_since = now
        if not changed and now - self._asked < self._check:
            return
        outcome = await self._store.save(self._life, changed)
        if outcome == _EMPTY:
            outcome = await self._store.save(self._life, sections)
        self._asked = now
        if outcome == _SUPERSEDED:
            self.superseded = True
            self.writes[_SUPERSEDED] += 1
            logger.error(
                "another dispatcher writes to %s; this one keeps its state in memory only",
                self._store.address,
            )
            return
        if changed:
            self.writes[_OK] += 1
        self._written = sections
        self._behind_since = None

    def _failed(self, error: StoreError) -> None:
        # What a server held may be gone when it is back.
        self._written = {}
        self._behind_since = self._behind_since or time.monotonic()
        self.writes["failed"] += 1
        if self.up:
            logger.warning(
                "no state is written to %s until it answers again: %s", self._store.address, error
            )
        self.up = False
        self.error = str(error)

    def _answered(self) -> None:
        if not self.up:
            logger.warning("%s answers again; the state is written", self._store.address)
        self.up = True
        self.error = ""

    @property
    def lag(self) -> float:
        """Age in seconds of the oldest change that the store lacks; 0 if it has all."""
        return 0.0 if self._behind_since is None else time.monotonic() - self._behind_since

    def status(self) -> dict[str, Any]:
        """For operators, ready for JSON."""
        return {
            "kind": "redis",
            "address": self._store.address,
            "up": self.up,
            "superseded": self.superseded,
            "lag_seconds": self.lag,
            "writes": dict(self.writes),
            "error": self.error,
        }

    def figures(self) -> list[Figure]:
        """For ``/metrics``."""
        return [
            Figure("drover_store_up", self.up and not self.superseded),
            Figure("drover_store_lag_seconds", self.lag),
            *(
                Figure("drover_store_writes_total", count, (outcome,))
                for outcome, count in self.writes.items()
            ),
        ]
