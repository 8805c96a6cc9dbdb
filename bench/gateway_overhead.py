"""What does the path from instance to client add to a token, and how many can it carry?

The model is a modelled executor whose steps take 50 ms whatever is in them; all else is
real: HTTP and server-sent events, gateway processes, gRPC, an instance process with its
scheduler. Added to the time to first token is what goes beyond a request that joins the
first step to start after it was sent; added to the inter-token latency is what goes beyond
the step. Delivery is the time from the end of a step to the client's having its tokens.

Throughput is measured with short steps and many streams, through one gateway process and
through two that share a port. Load client, gateways and instance share the machine: tokens
per second of a gateway's own CPU time say what it would carry with a core to itself.

    python -m bench.gateway_overhead [--quick] [--json PATH] [--model MODEL]
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import dataclasses
import itertools
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench import http_load
from bench.gateways import GatewayProcess
from bench.http_load import SEEDS_PER_STREAM, Answer, Load
from bench.instances import InstanceProcess
from bench.report import Target, finish, parser, percentile, print_table
from instance.clock import RealClock
from instance.config import EngineConfig, SchedulerConfig
from instance.executor import Executor, ModelDescription, StepBatch, StepResult
from instance.load import InstanceInfo
from instance.model.modelled import ModelledExecutor
from instance.step_cost import StepCost

CONCURRENCY = (1, 32, 128)
STEP = 0.05
PROMPT = 32
OUTPUT = 24
FAST_STEP = 0.01
FAST_STREAMS = 512
FAST_OUTPUT = 128
SATURATED = 0.9
"""Share of a core (or of all, for the machine) from which on it counts as busy all the time."""

Steps = list[tuple[float, float, list[tuple[int, int]]]]
"""Start and end of each step, and the (seed, position) of the tokens that it drew."""


class RecordingExecutor(ModelledExecutor):
    """Writes its steps to a file when it is closed."""

    def __init__(self, path: str, description: ModelDescription, blocks: int, step: float) -> None:
        super().__init__(description, blocks, RealClock(), StepCost(step, 0.0, 0.0, 0.0))
        self._path = path
        self._steps: Steps = []

    def launch(self, batch: StepBatch, done: Callable[[StepResult | BaseException], None]) -> None:
        began = time.monotonic()

        def ended(result: StepResult | BaseException) -> None:
            seeds = (params.seed for params in batch.sampling)
            drawn = list(zip(seeds, batch.sample_positions.tolist(), strict=True))
            self._steps.append((began, time.monotonic(), drawn))
            done(result)

        super().launch(batch, ended)

    def close(self) -> None:
        super().close()
        Path(self._path).write_bytes(pickle.dumps(self._steps))


def recorded(path: str) -> Steps:
    steps: Steps = pickle.loads(Path(path).read_bytes())
    return steps


@dataclasses.dataclass(frozen=True)
class Modelled:
    """Makes the executor in the instance's process; it draws from ``drawable`` only.

    Every token drawn is text of its own, so that each makes an event.
    """

    drawable: tuple[int, ...]
    step: float
    record: str | None

    def __call__(self, config: EngineConfig, _: Callable[[str], None]) -> Executor:
        size = max(self.drawable) + 1
        description = ModelDescription(
            name=config.model,
            dtype="bfloat16",
            block_size=config.block_size,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            vocab_size=size,
            max_model_len=config.scheduler.max_model_len,
            # The executor never draws these.
            eos_token_ids=tuple(sorted(set(range(size)) - set(self.drawable))),
        )
        if self.record is not None:
            return RecordingExecutor(self.record, description, config.num_blocks, self.step)
        cost = StepCost(self.step, 0.0, 0.0, 0.0)
        return ModelledExecutor(description, config.num_blocks, RealClock(), cost)


def drawable_tokens(model: str, limit: int = 2048) -> tuple[int, ...]:
    """Tokens below ``limit`` whose text is ASCII and not empty."""
    from cluster.gateway.tokenizer import ModelTokenizer
    from instance.model.resolve import resolve_model

    tokenizer = ModelTokenizer.load(resolve_model(model))
    texts = {token: tokenizer.decode([token]) for token in range(limit)}
    tokenizer.close()
    return tuple(token for token, text in texts.items() if text and text.isascii())


class Client:
    """The load client's process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self.process = context.Process(target=http_load.serve, args=(child,), daemon=True)
        self.process.start()
        child.close()

    def run(self, load: Load) -> list[Answer]:
        self._pipe.send(load)
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        answers: list[Answer] = result
        return answers

    def close(self) -> None:
        self._pipe.close()
        self.process.join(5)


class Cluster:
    """One instance, some gateways on one port, and the client, each a process."""

    def __init__(self, model: str, drawable: tuple[int, ...], step: float, record: str | None):
        self.model = model
        self.prompt = tuple(itertools.islice(itertools.cycle(drawable), PROMPT))
        config = EngineConfig(
            model=model,
            num_blocks=16384,
            scheduler=SchedulerConfig(
                max_num_seqs=FAST_STREAMS,
                # A burst of arrivals shares a step.
                max_num_batched_tokens=FAST_STREAMS * PROMPT,
                enable_prefix_caching=False,
            ),
        )
        self.instance = InstanceProcess("i0", config, Modelled(drawable, step, record))
        self.gateways: list[GatewayProcess] = []
        self.loads = 0
        self.client = Client()

    async def start(self) -> None:
        await self.instance.start()
        await self.set_gateways(1)

    async def set_gateways(self, count: int) -> None:
        info = self.instance.info
        assert isinstance(info, InstanceInfo)
        while len(self.gateways) < count:
            port = urlsplit(self.gateways[0].url).port if self.gateways else 0
            name = f"g{len(self.gateways)}"
            self.gateways.append(
                await asyncio.to_thread(GatewayProcess, name, [info], model=self.model, port=port)
            )
            await asyncio.sleep(0.5)  # its stream to the instance comes up

    async def load(self, **settings: Any) -> tuple[list[Answer], dict[str, float]]:
        """Run a load; its answers, and the share of a core that each process used, and of
        all cores that anybody used ("machine")."""
        url = urlsplit(self.gateways[0].url)
        assert url.hostname is not None
        assert url.port is not None
        self.loads += 1
        load = Load(url.hostname, url.port, prompt=self.prompt, number=self.loads, **settings)
        pids = {
            "client": self.client.process.pid,
            "instance": self.instance.process.pid,
            **{f"gateway {i}": one.process.pid for i, one in enumerate(self.gateways)},
        }
        watched = {name: psutil.Process(pid) for name, pid in pids.items()}
        before = {name: _cpu(process) for name, process in watched.items()}
        began = time.monotonic()
        psutil.cpu_percent()  # begins the span of the next call
        answers = await asyncio.to_thread(self.client.run, load)
        elapsed = time.monotonic() - began
        busy = {name: (_cpu(process) - before[name]) / elapsed for name, process in watched.items()}
        return answers, {**busy, "machine": psutil.cpu_percent() / 100}

    async def close(self) -> None:
        for gateway in self.gateways:
            gateway.close()
        await self.instance.call("stop")
        self.instance.close()
        self.client.close()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def latencies(answers: list[Answer], steps: Steps) -> dict[str, Any]:
    """Added times in seconds of the answers whose every token was an event."""
    spans = {drawn: (start, end) for start, end, draws in steps for drawn in draws}
    starts = [start for start, _, _ in steps]
    first: list[float] = []
    between: list[float] = []
    delivery: list[float] = []
    for answer in answers:
        if len(answer.arrivals) != OUTPUT:
            continue
        last = bisect.bisect_right(starts, answer.sent) - 1
        begin = max(answer.sent, steps[last][1]) if last >= 0 else answer.sent
        own = [spans[answer.seed, PROMPT + index] for index in range(OUTPUT)]
        # Timers are late by up to a millisecond: what a step really took counts.
        took = [end - start for start, end in own]
        first.append(answer.arrivals[0] - begin - took[0])
        gaps = itertools.pairwise(answer.arrivals)
        between += [late - soon - step for (soon, late), step in zip(gaps, took[1:], strict=True)]
        delivery += [late - end for late, (_, end) in zip(answer.arrivals, own, strict=True)]
    return {
        "requests": len(answers),
        "coalesced_requests": len(answers) - len(first),
        **{
            f"{name}_{label}": percentile(values, share)
            for name, values in (
                ("added_ttft", first),
                ("added_itl", between),
                ("delivery", delivery),
            )
            for label, share in (("p50", 50), ("p99", 99))
        },
    }


def rate(answers: list[Answer], tokens: int) -> tuple[float, float]:
    """Tokens and events per second, in the span in which all streams were at work."""
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    for answer in sorted(answers, key=lambda answer: answer.sent):
        stream = answer.seed // SEEDS_PER_STREAM
        begins.setdefault(stream, answer.first)
        ends[stream] = answer.last
    begin, end = max(begins.values()), min(ends.values())
    got_tokens = got_events = 0.0
    for answer in answers:
        # The tokens of an answer came evenly, near enough, between its first and its last.
        span = max(answer.last - answer.first, 1e-9)
        share = max(0.0, min(end, answer.last) - max(begin, answer.first)) / span
        got_tokens += tokens * share
        got_events += answer.events * share
    return got_tokens / (end - begin), got_events / (end - begin)


async def measure_latency(
    model: str, drawable: tuple[int, ...], seconds: float, concurrencies: tuple[int, ...]
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        record = str(Path(folder) / "steps")
        cluster = Cluster(model, drawable, STEP, record)
        await cluster.start()
        runs = []
        await cluster.load(concurrency=8, seconds=1.0, max_tokens=OUTPUT, pause=STEP)  # warm up
        for concurrency in concurrencies:
            answers, busy = await cluster.load(
                concurrency=concurrency, seconds=seconds, max_tokens=OUTPUT, pause=STEP
            )
            runs.append((concurrency, answers, busy))
        await cluster.close()
        steps = recorded(record)
    return [
        {"concurrency": concurrency, **latencies(answers, steps), "busy": busy}
        for concurrency, answers, busy in runs
    ]


async def measure_throughput(
    model: str, drawable: tuple[int, ...], seconds: float
) -> list[dict[str, Any]]:
    cluster = Cluster(model, drawable, FAST_STEP, None)
    await cluster.start()
    rows = []
    for count in (1, 2):
        await cluster.set_gateways(count)
        await cluster.load(
            concurrency=64, seconds=1.0, max_tokens=OUTPUT, pause=FAST_STEP, arrivals=False
        )
        answers, busy = await cluster.load(
            concurrency=FAST_STREAMS,
            seconds=seconds,
            max_tokens=FAST_OUTPUT,
            pause=FAST_OUTPUT * FAST_STEP / 4,
            arrivals=False,
        )
        tokens, events = rate(answers, FAST_OUTPUT)
        gateways = [busy[f"gateway {index}"] for index in range(count)]
        rows.append(
            {
                "gateways": count,
                "tokens_per_second": tokens,
                "events_per_second": events,
                "tokens_per_gateway_cpu_second": tokens / sum(gateways),
                "busy": busy,
                "saturated": sorted(name for name, share in busy.items() if share > SATURATED),
            }
        )
    await cluster.close()
    return rows


async def run(args: argparse.Namespace) -> int:
    drawable = drawable_tokens(args.model)
    seconds = 7.0 if args.quick else 20.0
    concurrencies = (32,) if args.quick else CONCURRENCY
    latency = await measure_latency(args.model, drawable, seconds, concurrencies)
    keys = ("added_ttft", "added_itl", "delivery")
    names = [f"{key}_{label}" for key in keys for label in ("p50", "p99")]
    head = [f"{name.replace('_', ' ')} ms" for name in names]
    print_table(
        ["streams", "requests", *head],
        [
            [row["concurrency"], row["requests"], *(1e3 * row[name] for name in names)]
            for row in latency
        ],
    )
    print()
    throughput = await measure_throughput(args.model, drawable, seconds)
    print_table(
        ["gateways", "tokens/s", "events/s", "tokens/gateway CPU s", "CPU", "saturated"],
        [
            [
                row["gateways"],
                row["tokens_per_second"],
                row["events_per_second"],
                row["tokens_per_gateway_cpu_second"],
                ", ".join(f"{name} {share:.2f}" for name, share in row["busy"].items()),
                ", ".join(row["saturated"]) or "none",
            ]
            for row in throughput
        ],
    )
    at_32 = next(row for row in latency if row["concurrency"] == 32)
    return finish(
        {"bench": "gateway_overhead", "latency": latency, "throughput": throughput},
        [
            Target("added ITL p50 at 32 streams, ms", 1e3 * at_32["added_itl_p50"], 2.0),
            Target("added TTFT p50 at 32 streams, ms", 1e3 * at_32["added_ttft_p50"], 5.0),
            Target(
                "tokens/s of one gateway process",
                throughput[0]["tokens_per_second"],
                5000.0,
                at_most=False,
            ),
        ],
        args.json,
    )


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--model", default="smollm2", help="whose tokenizer is used")
    return asyncio.run(run(options.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
