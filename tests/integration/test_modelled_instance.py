"""An instance and a gateway as processes run them, with modelled steps: every token arrives."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from bench.http_load import Load, run_load
from instance.step_cost import StepCost
from tests.integration.modelled_gateway import modelled_gateway


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cost = StepCost(0.002, 0.0, 0.0, 0.0)
    with modelled_gateway(tmp_path_factory.mktemp("model"), cost) as url:
        yield url


def test_same_seed_same_text(url: str) -> None:
    body = {"prompt": "abc", "max_tokens": 40, "seed": 7, "ignore_eos": True}
    first, second = (httpx.post(f"{url}/v1/completions", json=body).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] == 40
    assert len(first["choices"][0]["text"]) == 40
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


async def test_every_token_is_an_event(url: str) -> None:
    """Streams side by side, one request after another on each connection."""
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    load = Load(
        address.hostname,
        address.port,
        concurrency=12,
        seconds=1.0,
        prompt=tuple(range(65, 90)),
        max_tokens=30,
        pause=0.01,
    )
    answers = await run_load(load)
    assert len(answers) >= 12
    assert len({answer.seed for answer in answers}) == len(answers)
    for answer in answers:
        # A gateway that lags behind its instance sends tokens that came together as one event.
        assert 0 < answer.events <= 30
        assert len(answer.arrivals) == answer.events
        times = [answer.sent, answer.first, *answer.arrivals, answer.last]
        assert all(soon <= late for soon, late in itertools.pairwise(times))
    assert sum(answer.events for answer in answers) > 0.5 * 30 * len(answers)


async def test_the_load_client_says_what_it_met(url: str) -> None:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    load = Load(address.hostname, address.port, 1, 0.2, (65,), 10**6, 0.0)
    with pytest.raises(RuntimeError, match="400"):
        await asyncio.wait_for(run_load(load), 30)
