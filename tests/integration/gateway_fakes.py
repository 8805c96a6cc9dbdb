"""A tiny model's tokenizer, and a router that plays a script instead of running a model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from cluster.dispatcher.messages import ClusterView, InstanceView
from cluster.gateway.stream import Delta, RequestFailed
from cluster.gateway.tokenizer import ModelTokenizer
from instance.executor import ModelDescription
from instance.load import InstanceInfo
from instance.request import FinishReason, Request
from tests.unit.byte_tokenizer import EOS, byte_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse' %}{{ raise_exception('refused') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_tokenizer(template: str | None = CHAT_TEMPLATE) -> ModelTokenizer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="</s>")
    tokenizer.chat_template = template
    return ModelTokenizer(tokenizer)


@dataclass
class Hold:
    """A step of a script: wait until the test goes on."""

    event: asyncio.Event = field(default_factory=asyncio.Event)


Step = Delta | RequestFailed | Exception | Hold


def tokens(
    data: bytes | Sequence[int],
    finish: FinishReason = FinishReason.NOT_FINISHED,
    cached: int = 0,
) -> Delta:
    return Delta(list(data), finish, "", cached)


def text(
    data: str | bytes, finish: FinishReason = FinishReason.LENGTH, size: int = 1
) -> list[Step]:
    """Deltas of ``size`` bytes each; an end by STOP adds the end-of-sequence token."""
    raw = data.encode() if isinstance(data, str) else data
    parts: list[Sequence[int]] = [raw[at : at + size] for at in range(0, len(raw), size)] or [[]]
    if finish is FinishReason.STOP:
        parts.append([EOS])
    return [*(tokens(part) for part in parts[:-1]), tokens(parts[-1], finish)]


class FakeStream:
    """Plays a script; ends at once when cancelled."""

    def __init__(self, request: Request, script: Sequence[Step]) -> None:
        self.request_id = request.request_id
        self.request = request
        self.holder: str | None = "instance-0"
        self.epoch = 1
        self.migrations = 0
        self.replays = 0
        self.pauses: list[float] = []
        self.stalls: list[float] = []
        self.finished = False
        self.cancelled = asyncio.Event()
        self._script = list(script)

    def cancel(self) -> None:
        if not self.finished:
            self.cancelled.set()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._play()

    async def _play(self) -> AsyncIterator[Delta]:
        for step in self._script:
            await asyncio.sleep(0)
            if isinstance(step, Hold):
                await step.event.wait()
            elif isinstance(step, Delta):
                self.finished = step.finish_reason is not FinishReason.NOT_FINISHED
                yield step
            else:
                self.finished = True
                raise step


def cluster_view(*states: str, context: int = 512) -> ClusterView:
    """Instances in these states that hold ``context`` tokens each."""
    model = ModelDescription("tiny", "float64", 16, 2, 2, 8, 262, context, (EOS,))
    return ClusterView(
        1,
        tuple(
            InstanceView(
                InstanceInfo(f"instance-{n}", "a", "127.0.0.1:1", "node", model, context // 16, 8),
                state, 3.5, 0.25, 24, 2, 1, 0.01,
            )
            for n, state in enumerate(states)
        ),
    )  # fmt: skip


class FakeRouter:
    """Answers every request with what ``script`` gives for it."""

    def __init__(self, script: Callable[[Request], Sequence[Step]] | None = None) -> None:
        self.home_id = "gateway-0-1f"
        self.view = cluster_view("ready", "ready")
        self.script = script or (lambda request: text("hello"))
        self.streams: list[FakeStream] = []
        self.arrival = asyncio.Event()
        self.calls: list[tuple[Any, ...]] = []
        self.answer: Any = {}
        self.figures: dict[str, Any] = {"dispatcher": [], "instances": {}}
        self.submit_error: Exception | None = None

    @property
    def active(self) -> int:
        return sum(1 for s in self.streams if not s.finished and not s.cancelled.is_set())

    @property
    def last(self) -> FakeStream:
        return self.streams[-1]

    def submit(self, request: Request, deadline: float = math.inf) -> FakeStream:
        if self.submit_error is not None:
            raise self.submit_error
        stream = FakeStream(request, self.script(request))
        self.streams.append(stream)
        self.arrival.set()
        return stream

    def describe_requests(self) -> list[dict[str, Any]]:
        return [{"request_id": s.request_id, "instance": s.holder} for s in self.streams]

    async def dispatcher_call(self, method: str, *args: Any, timeout: float = 60.0) -> Any:
        if method == "figures":
            return self.figures
        self.calls.append((method, *args))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def start(self) -> None:
        self.calls.append(("start",))

    async def close(self) -> None:
        self.calls.append(("close",))
