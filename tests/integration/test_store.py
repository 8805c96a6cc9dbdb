"""The dispatcher's state in a real server that stops and comes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from cluster.dispatcher.store import RedisStore, StateKeeper, StoreError
from tests.integration.valkey import Valkey, running

KEY = "drover:test"


@pytest.fixture
def server() -> Iterator[Valkey]:
    with running() as server:
        yield server


class Holder:
    """Something whose state is kept."""

    def __init__(self, server: Valkey, life: int, **state: Any) -> None:
        self.state: dict[str, Any] = state
        self.taken: list[dict[str, Any]] = []
        self.store = RedisStore(server.url, KEY, timeout=20.0)
        self.keeper = StateKeeper(
            self.store, lambda: self.state, self.take, life, interval=0.01, check=0.0,
            last_retry=0.05,
        )  # fmt: skip

    def take(self, state: Any) -> None:
        self.taken.append(dict(state))

    async def stored(self) -> dict[str, bytes]:
        return (await self.store.load())[1]


@pytest.fixture
async def holders() -> AsyncIterator[list[Holder]]:
    made: list[Holder] = []
    yield made
    for holder in made:
        await holder.keeper.close()


async def test_what_one_life_wrote_the_next_restores(server: Valkey, holders: list[Holder]) -> None:
    first = Holder(server, 1, ledger={"a": 1.5}, overrides={})
    holders.append(first)
    await first.keeper.flush()
    assert first.taken == []
    first.state["overrides"] = {"x": [1, "y"]}
    await first.keeper.flush()
    assert (await first.stored())["ledger"] == b'{"a":1.5}'
    second = Holder(server, 2, ledger={})
    holders.append(second)
    await second.keeper.flush()
    assert second.taken == [{"ledger": {"a": 1.5}, "overrides": {"x": [1, "y"]}}]


async def test_only_what_changed_is_written(server: Valkey, holders: list[Holder]) -> None:
    holder = Holder(server, 1, a=1, b=2)
    holders.append(holder)
    await holder.keeper.flush()
    await holder.store.save(1, {"a": b"99"})
    holder.state["b"] = 3
    await holder.keeper.flush()
    assert await holder.stored() == {"a": b"99", "b": b"3"}
    assert holder.keeper.writes["ok"] == 2
    assert holder.keeper.lag == 0.0


async def test_a_replaced_dispatcher_writes_no_more(server: Valkey, holders: list[Holder]) -> None:
    old, new = Holder(server, 1, a="old"), Holder(server, 2, a="new")
    holders += [old, new]
    await old.keeper.flush()
    await new.keeper.flush()
    old.state["a"] = "late"
    await old.keeper.flush()
    assert await new.stored() == {"a": b'"new"'}
    assert old.keeper.superseded
    assert {f.name: f.value for f in old.keeper.figures()}["drover_store_up"] == 0
    await old.keeper.run()  # has nothing to do any more


async def test_a_clock_behind_the_last_life_is_no_reason_to_be_refused(
    server: Valkey, holders: list[Holder]
) -> None:
    first, second = Holder(server, 1000, a=1), Holder(server, 5, a=2)
    holders += [first, second]
    await first.keeper.flush()
    await second.keeper.flush()
    assert await first.stored() == {"a": b"2"}
    assert not second.keeper.superseded


async def until(condition: Any) -> None:
    """The test's own timeout is the bound."""
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("keep", [True, False], ids=["with its data", "empty"])
async def test_a_server_that_stops_and_comes_back(
    server: Valkey, holders: list[Holder], keep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    holder = Holder(server, 1, a=1, b=2)
    holders.append(holder)
    keeper = holder.keeper
    with caplog.at_level(logging.WARNING):
        task = asyncio.create_task(keeper.run())
        await until(lambda: keeper.writes["ok"])
        if keep:
            await asyncio.to_thread(server.save)
        await asyncio.to_thread(server.stop)
        holder.state["a"] = 10
        failed = keeper.writes["failed"]
        await until(lambda: keeper.writes["failed"] > failed + 2)
        assert not keeper.up
        assert keeper.lag > 0
        assert keeper.status()["error"]
        await asyncio.to_thread(server.start, keep)
        await until(lambda: keeper.up and not keeper.lag)
        # What did not change since is there as well, whatever the server lost.
        assert await holder.stored() == {"a": b"10", "b": b"2"}
        task.cancel()
    said = [record.message for record in caplog.records if "valkey.sock" in record.message]
    assert len(said) == 2, said


async def test_a_server_that_lost_everything_unnoticed(
    server: Valkey, holders: list[Holder]
) -> None:
    holder = Holder(server, 1, a=1)
    holders.append(holder)
    await holder.keeper.flush()
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start, False)
    # The broken connection is noticed, or not; either way everything is written again.
    for _ in range(2):
        try:
            await holder.keeper.flush()
        except StoreError:
            continue
    assert await holder.stored() == {"a": b"1"}


async def test_a_server_that_is_away_at_the_start_is_read_once_it_is_there(
    server: Valkey, holders: list[Holder]
) -> None:
    first = Holder(server, 1, a=1)
    holders.append(first)
    await first.keeper.flush()
    await asyncio.to_thread(server.save)
    await asyncio.to_thread(server.stop)
    second = Holder(server, 2, b=2)
    holders.append(second)
    task = asyncio.create_task(second.keeper.run())
    await until(lambda: second.keeper.writes["failed"])
    assert second.taken == []
    await asyncio.to_thread(server.start)
    await until(lambda: second.keeper.writes["ok"])
    assert second.taken == [{"a": 1}]
    task.cancel()


async def test_nonsense_in_the_store(server: Valkey, holders: list[Holder]) -> None:
    holder = Holder(server, 1, a=1)
    holders.append(holder)
    await holder.store.save(0, {"a": b"{", "b": b"[1]"})
    await holder.keeper.flush()
    assert holder.taken == [{"b": [1]}]
    assert (await holder.stored())["a"] == b"1"


def test_an_address_has_no_secrets() -> None:
    assert RedisStore("redis://user:secret@host:7000/2", KEY).address == "host:7000"
    assert RedisStore("rediss://host", KEY).address == "host:6379"
    assert RedisStore("unix:///run/redis.sock", KEY).address == "/run/redis.sock"
