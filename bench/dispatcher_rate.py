"""How many placements a second does the dispatcher decide, and how long does one take?

The core alone at several cluster sizes: a steady population of requests from several tenants,
each with the keys of its prompt's blocks, is placed, reported, and ended, with load reports and
ticks at their real pace of virtual time. The time in the core counts, not that of what is made up
around it. Then the Ray actor, asked by a gateway's own client, which coalesces what is waiting into
one call.

Run ``python -m bench.dispatcher_rate [--quick] [--json PATH] [--no-ray]``.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from bench.report import Target, finish, median, parser, percentile, print_table
from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    Action,
    Event,
    Finished,
    Joined,
    Place,
    PlaceRequested,
    Reported,
    Tick,
)
from cluster.dispatcher.messages import Placement, PlaceRequest
from cluster.names import ClusterRef
from instance.executor import ModelDescription
from instance.kv.prefix_events import KEY_BYTES, PrefixDelta
from instance.load import InstanceInfo, LoadReport, SequenceLoad
from instance.request import RequestClass

SIZES = (16, 64, 256, 1024)
TARGET_SIZE = 64
TARGET_RATE = 10_000.0
TARGET_P99 = 1e-3
BLOCKS, SLOTS, BLOCK_SIZE = 2000, 64, 16
POPULATION = 24
"""Requests per instance at a time."""
PROMPT_BLOCKS, PREFIXES = 32, 256
REPORT_INTERVAL, TICK = 0.1, 0.1
TENANTS = tuple(f"tenant-{number}" for number in range(8))
MODEL = ModelDescription("bench", "float16", BLOCK_SIZE, 16, 8, 64, 32_000, 8192)


def info(number: int) -> InstanceInfo:
    """One of the instances."""
    name = f"instance-{number}"
    return InstanceInfo(name, "1", f"{name}:1", f"node-{number // 8}", MODEL, BLOCKS, SLOTS)


def keys(prefix: int) -> bytes:
    """Keys of the blocks of one of the prompts."""
    base = prefix * PROMPT_BLOCKS
    blocks = range(base, base + PROMPT_BLOCKS)
    return b"".join(number.to_bytes(KEY_BYTES, "little") for number in blocks)


def request(number: int, rng: random.Random, prompts: list[bytes]) -> PlaceRequest:
    """A request with one of the prompts."""
    return PlaceRequest(
        request_id=f"request-{number}",
        epoch=1,
        gateway_id="gateway-0",
        tenant=rng.choice(TENANTS),
        request_class=RequestClass.STANDARD,
        num_tokens=PROMPT_BLOCKS * BLOCK_SIZE + rng.randrange(1, 256),
        max_tokens=256,
        arrival=float(number),
        model=MODEL.name,
        prefix=rng.choice(prompts),
    )


@dataclass
class Load:
    """A cluster in a steady state around a dispatcher's core.

    Attributes:
        spent: Seconds in the core; what makes up the cluster around it is not its work.
    """

    size: int
    policy: str
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    now: float = 0.0
    placed: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        config = DispatcherConfig(placement=self.policy)
        self.core = Dispatcher(config, random.Random(1))
        self.prompts = [keys(prefix) for prefix in range(PREFIXES)]
        self.held: list[dict[str, SequenceLoad]] = [{} for _ in range(self.size)]
        self.numbers = [0] * self.size
        self.order: deque[tuple[str, int]] = deque()
        self.due: deque[tuple[float, int]] = deque()
        self.ticked = 0.0
        for number in range(self.size):
            self.handle(Joined(info(number)))
            self.report(number, first=True)
            self.due.append((REPORT_INTERVAL * number / self.size, number))
        for _ in range(self.size * POPULATION):
            self.place()

    def handle(self, event: Event) -> list[Action]:
        """Let the core do its work."""
        start = time.perf_counter()
        actions = self.core.handle(event, self.now)
        self.spent += time.perf_counter() - start
        return actions

    def place(self) -> float:
        """Place one request; returns the seconds that the decision took."""
        asked = PlaceRequested(request(self.placed, self.rng, self.prompts))
        self.placed += 1
        before = self.spent
        actions = self.handle(asked)
        took = self.spent - before
        for action in actions:
            if isinstance(action, Place):
                self.take(action.placement, asked.request)
        return took

    def take(self, placement: Placement, asked: PlaceRequest) -> None:
        """The instance runs the request from now on."""
        number = int(placement.instance_id.rpartition("-")[2])
        self.order.append((asked.request_id, number))
        self.held[number][asked.request_id] = SequenceLoad(
            asked.request_id,
            1,
            asked.tenant,
            asked.request_class,
            asked.gateway_id,
            True,
            asked.num_tokens // BLOCK_SIZE + 1,
            asked.num_tokens,
            uncomputed=1,
        )

    def report(self, number: int, first: bool = False) -> None:
        """An instance says how it is; at first also which prefixes it holds."""
        self.numbers[number] += 1
        sequences = tuple(self.held[number].values())
        delta = None
        if first:
            chosen = self.rng.sample(self.prompts, 16)
            delta = PrefixDelta(0, 1, b"".join(chosen), b"")
        used = sum(sequence.blocks for sequence in sequences)
        told = LoadReport(
            f"instance-{number}",
            "1",
            self.numbers[number],
            BLOCKS,
            BLOCKS - used,
            0,
            0.02,
            sequences,
            prefix=delta,
        )
        self.handle(Reported(told))

    def step(self, pace: float) -> float:
        """One request ends, one is placed, and so much virtual time passes."""
        self.now += pace
        while self.due[0][0] <= self.now:
            at, number = self.due.popleft()
            self.report(number)
            self.due.append((at + REPORT_INTERVAL, number))
        if self.now - self.ticked >= TICK:
            self.ticked = self.now
            self.handle(Tick())
        ended, where = self.order.popleft()
        del self.held[where][ended]
        self.handle(Finished(ended, 1))
        return self.place()


def measure_core(size: int, policy: str, steps: int) -> dict[str, float]:
    """Placements per second, everything the core does for them included, and a decision's time."""
    load = Load(size, policy)
    pace = 1.0 / TARGET_RATE
    for _ in range(min(steps, 500)):
        load.step(pace)
    gc.collect()
    begun, cpu, before = time.perf_counter(), time.process_time(), load.spent
    times = [load.step(pace) for _ in range(steps)]
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    spent = load.spent - before
    return {
        "rate": steps / spent,
        "rate_cpu": steps / (cpu * spent / wall),
        "p50": percentile(times, 50),
        "p99": percentile(times, 99),
        "held": float(load.core.num_held),
    }


# ---- through Ray


async def _drive(handle: Any, steps: int, concurrency: int) -> tuple[float, list[float]]:
    from cluster.gateway.dispatching import DispatcherClient

    client = DispatcherClient("gateway-0", lambda: handle, timeout=60.0)
    client.start()
    label = f"{concurrency}-{time.monotonic_ns()}"
    rng, prompts = random.Random(5), [keys(prefix) for prefix in range(PREFIXES)]
    times: list[float] = []
    numbers = iter(range(steps))

    async def work() -> None:
        for number in numbers:
            asked = replace(request(number, rng, prompts), request_id=f"{label}-{number}")
            start = time.perf_counter()
            await client.place(asked)
            times.append(time.perf_counter() - start)
            client.finished(asked.request_id, 1)

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    wall = time.perf_counter() - begun
    await client.close()
    return steps / wall, times


def measure_actor(
    size: int, steps: int, concurrencies: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """The same asked of the real actor, by one gateway with so many requests at a time."""
    from cluster import launch, ray_setup

    folder = ray_setup.short_temp_dir()
    ray_setup.prepare_ray("", folder)
    import ray

    cluster = ClusterRef(namespace="bench-dispatcher")
    try:
        ray.init(
            address="local",
            namespace=cluster.namespace,
            include_dashboard=False,
            object_store_memory=launch.OBJECT_STORE_BYTES,
            log_to_driver=False,
            _temp_dir=folder,
        )
        handle = launch.start_dispatcher(DispatcherConfig(), cluster)
        for number in range(size):
            ray.get(handle.join.remote(info(number)))
            report = LoadReport(f"instance-{number}", "1", 1, BLOCKS, BLOCKS, 0, 0.02, ())
            ray.get(handle.report.remote(report))
        found = {}
        for concurrency in concurrencies:
            # One at a time is a matter of latency: a few are enough.
            count = max(200, min(steps, 100 * concurrency))
            rate, times = asyncio.run(_drive(handle, count, concurrency))
            found[str(concurrency)] = {
                "rate": rate,
                "p50": percentile(times, 50),
                "p99": percentile(times, 99),
            }
        ray.kill(handle)
    finally:
        ray_setup.shut_down_ray(folder)
    return found


def main() -> int:
    """Measure, print, and judge."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--no-ray", action="store_true", help="the core alone")
    given = options.parse_args()
    steps, rounds = (2_000, 2) if given.quick else (20_000, 5)
    core: dict[str, dict[str, float]] = {}
    for size in SIZES:
        runs = [measure_core(size, "freeness", steps) for _ in range(rounds)]
        core[str(size)] = {name: median(run[name] for run in runs) for name in runs[0]}
    print_table(
        ["instances", "placements/s", "per CPU second", "P50 us", "P99 us", "held"],
        [
            [size, one["rate"], one["rate_cpu"], one["p50"] * 1e6, one["p99"] * 1e6, one["held"]]
            for size, one in core.items()
        ],
    )
    result: dict[str, Any] = {"core": core}
    judged = core[str(TARGET_SIZE)]
    targets = [
        Target(f"placements/s at {TARGET_SIZE}", judged["rate"], TARGET_RATE, at_most=False),
        Target(f"P99 of a placement at {TARGET_SIZE}, s", judged["p99"], TARGET_P99),
    ]
    if not given.no_ray:
        actor = measure_actor(TARGET_SIZE, steps, (1, 64, 512))
        print_table(
            ["in flight", "placements/s", "P50 ms", "P99 ms"],
            [
                [concurrency, one["rate"], one["p50"] * 1e3, one["p99"] * 1e3]
                for concurrency, one in actor.items()
            ],
        )
        result["actor"] = actor
    return finish(result, targets, given.json)


if __name__ == "__main__":
    sys.exit(main())
