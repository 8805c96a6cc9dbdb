"""How long does a moved request pause?

Pause = the gap between the last token from the source and the first from the destination,
less the request's own median step (as the gateway sees the tokens arrive). Live migration
is compared with stop-and-copy (the same code told to copy everything in the last stage)
and with recompute (a replay from the prompt), on real instances in processes of their
own. Prefix caching is off: every move copies, or recomputes, the whole context.

    python -m bench.migration_downtime [--quick] [--json PATH] [--model MODEL]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from bench.instances import TOKEN, FixedPlacer, InstanceProcess
from bench.report import Target, finish, median, parser, percentile, print_table
from cluster.dispatcher.messages import PlaceRequest
from cluster.gateway.router import Router
from cluster.gateway.stream import RequestStream
from instance.config import EngineConfig, MigrationConfig, SchedulerConfig
from instance.request import Request, SamplingParams

CONTEXTS = (256, 1024, 2048, 4096, 7900)
DESTINATIONS = ("idle", "equal", "prefilling")
METHODS = ("live", "stop_and_copy", "recompute")
RESIDENTS = 3
STEPS_BETWEEN_MOVES = 6
PREFILL_TOKENS = 1536


@dataclass
class Client:
    """One streamed request: when each delta came, and from which instance."""

    stream: RequestStream
    tokens: int = 0
    arrivals: list[tuple[float, str, int]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    async def read(self) -> None:
        async for delta in self.stream:
            if delta.tokens:
                self.tokens += len(delta.tokens)
                self.arrivals.append(
                    (time.perf_counter(), self.stream.producer or "", len(delta.tokens))
                )

    async def reach(self, tokens: int) -> None:
        while self.tokens < tokens:
            if self.task is not None and self.task.done():
                await self.task
                raise RuntimeError("the request ended too soon")
            await asyncio.sleep(0.002)


class Pair:
    """Two instances and the gateway's router over them."""

    def __init__(self, config: EngineConfig) -> None:
        self.instances = {name: InstanceProcess(name, config) for name in ("a", "b")}
        self.target = "a"
        self.placer = FixedPlacer(self._choose)
        self.router = Router("bench", TOKEN, self.placer)
        self._numbers = itertools.count()
        self._pinned: dict[str, str] = {}
        self._random = random.Random(0)

    def _choose(self, request: PlaceRequest) -> str:
        return self._pinned[request.request_id]

    async def start(self) -> None:
        infos = [await instance.start() for instance in self.instances.values()]
        await self.router.start()
        self.placer.set_instances(infos)
        await self.router.wait_connected(2)

    def submit(self, context: int, max_tokens: int, where: str) -> Client:
        request_id = f"r{next(self._numbers)}"
        self._pinned[request_id] = where
        prompt = tuple(self._random.randrange(100, 40_000) for _ in range(context))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        stream = self.router.submit(Request(request_id, prompt, params, home="bench"))
        client = Client(stream)
        client.task = asyncio.create_task(client.read())
        return client

    async def end(self, client: Client) -> None:
        client.stream.cancel()
        if client.task is not None:
            client.task.cancel()
            await asyncio.gather(client.task, return_exceptions=True)

    async def move(self, client: Client, to: str, method: str) -> dict[str, Any]:
        request_id = client.stream.request_id
        source = client.stream.holder or ""
        if method == "recompute":
            self._pinned[request_id] = to
            self.router.replay(request_id)
            return {}
        report = await self.instances[source].migrate(request_id, self.instances[to], "bench")
        return dataclasses.asdict(report)

    async def close(self) -> None:
        await self.router.close()
        for instance in self.instances.values():
            instance.close()


async def prefill_load(pair: Pair, where: str, stop: asyncio.Event) -> None:
    """Keep an instance prefilling long prompts until told to stop."""
    while not stop.is_set():
        client = pair.submit(PREFILL_TOKENS, 1, where)
        waiting = asyncio.create_task(stop.wait())
        assert client.task is not None
        await asyncio.wait({client.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await pair.end(client)


async def measure(
    pair: Pair, context: int, destination: str, method: str, moves: int
) -> dict[str, Any]:
    """Move one request to and fro ``moves`` times; pauses in seconds and in steps."""
    budget = moves * (STEPS_BETWEEN_MOVES + 40) + 64
    room = 8192 - context - 1
    residents: list[Client] = []
    if destination == "equal":
        for name in pair.instances:
            residents += [pair.submit(256, 7000, name) for _ in range(RESIDENTS)]
        for resident in residents:
            await resident.reach(2)
    pauses: list[float] = []
    ratios: list[float] = []
    hitches: list[float] = []
    reports: list[dict[str, Any]] = []
    refused: list[str] = []
    client: Client | None = None
    here, there = "a", "b"
    while len(pauses) < moves:
        if client is None or client.tokens > min(budget, room) - 60:
            if client is not None:
                await pair.end(client)
            client = pair.submit(context, min(budget, room), here)
            await client.reach(STEPS_BETWEEN_MOVES + 4)
        stop = asyncio.Event()
        load: asyncio.Task[None] | None = None
        if destination == "prefilling":
            load = asyncio.create_task(prefill_load(pair, there, stop))
            await asyncio.sleep(0.3)
        first = len(client.arrivals)
        report = await pair.move(client, there, method)
        if report and report["outcome"] != "moved":
            refused.append(report["outcome"])
            if len(refused) > moves:
                raise RuntimeError(f"too many moves failed: {refused}")
            stop.set()
            if load is not None:
                await load
            continue
        if report:
            reports.append(report)
        await client.reach(client.tokens + 1)
        while client.arrivals[-1][1] != there:
            await client.reach(client.tokens + 1)
        switch = next(
            i for i in range(max(1, first), len(client.arrivals)) if client.arrivals[i][1] == there
        )
        # The request's own step, before the move began to compete with it.
        before = client.arrivals[max(0, first - 12) : first]
        steps = [(late[0] - soon[0]) / late[2] for soon, late in itertools.pairwise(before)]
        step = median(steps)
        gap = client.arrivals[switch][0] - client.arrivals[switch - 1][0]
        pauses.append(gap - step)
        ratios.append((gap - step) / step)
        # Nothing may hide before or after the switch: the largest gap from the order on.
        around = client.arrivals[max(0, first - 1) : switch + 3]
        worst = max(late[0] - soon[0] for soon, late in itertools.pairwise(around))
        hitches.append((worst - step) / step)
        stop.set()
        if load is not None:
            await load
        await client.reach(client.tokens + STEPS_BETWEEN_MOVES)
        here, there = there, here
    assert client is not None
    for one in (client, *residents):
        await pair.end(one)
    await asyncio.sleep(0.2)
    steps_all = [p / r for p, r in zip(pauses, ratios, strict=True) if r]
    return {
        "context": context,
        "destination": destination,
        "method": method,
        "moves": len(pauses),
        "refused": refused,
        "step_ms": 1e3 * median(steps_all),
        "pause_ms_p50": 1e3 * percentile(pauses, 50),
        "pause_ms_p90": 1e3 * percentile(pauses, 90),
        "pause_steps_p50": percentile(ratios, 50),
        "pause_steps_p90": percentile(ratios, 90),
        "worst_gap_steps_p50": percentile(hitches, 50),
        "stages_p50": median(one["stages"] for one in reports),
        "copies_p50": median(one["copies"] for one in reports),
        "mib_p50": median(one["bytes_copied"] / 2**20 for one in reports),
        "duration_ms_p50": 1e3 * median(one["duration"] for one in reports),
        "detached_ms_p50": 1e3 * median(one["detached"] for one in reports),
        "pauses_ms": [1e3 * pause for pause in pauses],
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    contexts = (256, 1024) if options.quick else tuple(options.contexts)
    destinations = ("idle", "equal") if options.quick else tuple(options.destinations)
    moves = 5 if options.quick else options.moves
    config = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        num_blocks=1536,
        # The smaller budget bounds a prefilling destination's steps.
        scheduler=SchedulerConfig(
            max_num_seqs=16, max_num_batched_tokens=128, enable_prefix_caching=False
        ),
    )
    stopped = dataclasses.replace(config, migration=MigrationConfig(max_stages=0))
    pairs = {"live": Pair(config), "stop_and_copy": Pair(stopped)}
    pairs["recompute"] = pairs["live"]
    rows: list[dict[str, Any]] = []
    try:
        for name in ("live", "stop_and_copy"):
            await pairs[name].start()
        for context in contexts:
            for destination in destinations:
                for method in options.methods:
                    count = moves
                    if method == "recompute":
                        # It takes seconds and depends little on the destination's load.
                        if destination != "idle":
                            continue
                        count = moves if context <= 1024 else min(moves, 5)
                    rows.append(await measure(pairs[method], context, destination, method, count))
                    shown = rows[-1]
                    print(
                        f"{context:5} {destination:10} {method:13} "
                        f"pause p50 {shown['pause_ms_p50']:8.1f} ms "
                        f"= {shown['pause_steps_p50']:6.2f} steps of {shown['step_ms']:.1f} ms",
                        file=sys.stderr,
                        flush=True,
                    )
    finally:
        for name in ("live", "stop_and_copy"):
            await pairs[name].close()
    return {"model": options.model, "dtype": options.dtype, "rows": rows}


def main() -> int:
    """Run the experiment, print its result, answer with the verdict."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--moves", type=int, default=30)
    arguments.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    arguments.add_argument("--destinations", nargs="+", choices=DESTINATIONS, default=DESTINATIONS)
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = arguments.parse_args()
    result = asyncio.run(run(options))
    rows = result["rows"]
    print_table(
        ("context", "destination", "method", "moves", "step ms", "pause p50 ms", "p90 ms",
         "p50 steps", "p90 steps", "worst gap", "stages", "copies", "MiB", "whole ms"),
        [
            (row["context"], row["destination"], row["method"], row["moves"], row["step_ms"],
             row["pause_ms_p50"], row["pause_ms_p90"], row["pause_steps_p50"],
             row["pause_steps_p90"], row["worst_gap_steps_p50"], row["stages_p50"],
             row["copies_p50"], row["mib_p50"], row["duration_ms_p50"])
            for row in rows
        ],
    )  # fmt: skip
    live = [row for row in rows if row["method"] == "live" and row["destination"] != "prefilling"]
    targets = [
        Target("worst live pause p50, in steps, idle and equal destinations",
               max(row["pause_steps_p50"] for row in live), 1.0),
    ]  # fmt: skip
    for destination in ("idle", "equal"):
        found = {row["context"]: row for row in live if row["destination"] == destination}
        low, high = found[min(found)], found[max(found)]
        # Pauses of a millisecond or less are below what the timing resolves.
        ratio = max(high["pause_ms_p50"], 1.0) / max(low["pause_ms_p50"], 1.0)
        targets.append(
            Target(f"pause at {max(found)} over {min(found)} tokens, {destination}", ratio, 1.5)
        )
    return finish(result, targets, options.json)


if __name__ == "__main__":
    sys.exit(main())
