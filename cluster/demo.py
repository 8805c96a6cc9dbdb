"""The main job in a minute: several chats stream, one of them moves, its text stays the same.

Run as ``python -m cluster.demo``; with ``--url`` and ``--admin-key`` it uses a running cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.ray_setup import free_port

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Tell me a short story about a shepherd and a river.",
    "List five uses of a pencil, one sentence each.",
)
MOVED = 1
TOKENS_BEFORE_MOVE = 24


@dataclass
class Chat:
    """One streamed chat as its client sees it."""

    prompt: str
    request_id: str = ""
    text: str = ""
    times: list[float] = field(default_factory=list)

    def gaps(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]


@contextlib.contextmanager
def cluster(model: str, admin_key: str) -> Iterator[str]:
    """Run ``drover serve`` with two instances until the block ends; yields its URL."""
    port = free_port("127.0.0.1")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cluster.cli",
            "serve",
            model,
            "--port",
            str(port),
            "--instances",
            "2",
        ],
        env={**os.environ, "DROVER_ADMIN_KEY": admin_key, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None:
                sys.exit(f"drover serve ended with status {process.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def stream(client: httpx.AsyncClient, chat: Chat, tokens: int) -> None:
    """Stream one greedy chat into ``chat``."""
    body = {
        "messages": [{"role": "user", "content": chat.prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            chat.request_id = chunk["id"]
            piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
            if piece:
                chat.text += piece
                chat.times.append(time.monotonic())


async def where(client: httpx.AsyncClient, key: str) -> dict[str, str]:
    """The instance of every running request, by request id."""
    answer = await client.get("/admin/requests", headers={"authorization": f"Bearer {key}"})
    answer.raise_for_status()
    return {one["request_id"]: one["instance"] for one in answer.json()["requests"]}


async def show(url: str, key: str, tokens: int) -> bool:
    """Stream, move, compare; true if the moved text equals the unmoved one."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        chats = [Chat(prompt) for prompt in PROMPTS]
        running = [asyncio.create_task(stream(client, chat, tokens)) for chat in chats]
        moved = chats[MOVED]
        while len(moved.times) < TOKENS_BEFORE_MOVE:
            if running[MOVED].done():
                await running[MOVED]
                raise RuntimeError("the chat ended before it could be moved")
            await asyncio.sleep(0.005)
        places = await where(client, key)
        print(f"\n{len(chats)} chats are streaming:")
        for chat in chats:
            print(f"  {chat.request_id}  on {places.get(chat.request_id, '?'):4}  {chat.prompt}")
        print(f"\nMoving {moved.request_id} off {places[moved.request_id]}, in mid-stream ...")
        answer = await client.post(
            "/admin/migrate",
            json={"request_id": moved.request_id},
            headers={"authorization": f"Bearer {key}"},
        )
        if answer.status_code != 200:
            raise RuntimeError(answer.text)
        report: dict[str, Any] = answer.json()
        at = len(moved.times)
        await asyncio.gather(*running)
        gaps = moved.gaps()
        step = statistics.median(gaps)
        # The first token from the destination comes within a few of the call's return.
        pause = max(gaps[max(0, at - 4) : at + 4]) - step
        print(
            f"  {report['outcome']}: {report['source']} -> {report['destination']}, "
            f"{report['blocks']} blocks, {report['bytes_copied'] / 2**20:.1f} MiB in "
            f"{report['copies']} copies and {report['stages']} stages, "
            f"{report['duration'] * 1e3:.0f} ms in all, decoding all the while"
        )
        print(
            f"  longest gap between its tokens around the move: {(pause + step) * 1e3:.0f} ms; "
            f"its median step: {step * 1e3:.0f} ms; pause: {pause / step:.2f} steps"
        )
        again = Chat(moved.prompt)
        others = [Chat(prompt) for index, prompt in enumerate(PROMPTS) if index != MOVED]
        await asyncio.gather(*(stream(client, chat, tokens) for chat in (again, *others)))
        same = again.text == moved.text
        print(f"\nThe moved chat's text:\n  {moved.text.strip()}")
        print(
            "\nThe same chat again, not moved: "
            + ("the text is the same." if same else f"the text differs:\n  {again.text.strip()}")
        )
        return same


def main() -> int:
    """Run the demonstration; 0 if the moved text equals the unmoved one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--url", help="a running cluster; needs --admin-key")
    parser.add_argument("--admin-key", default=os.environ.get("DROVER_ADMIN_KEY"))
    parser.add_argument("--tokens", type=int, default=96, help="output tokens of each chat")
    options = parser.parse_args()
    key = options.admin_key or secrets.token_urlsafe(16)
    running = contextlib.nullcontext(options.url) if options.url else cluster(options.model, key)
    try:
        with running as url:
            return 0 if asyncio.run(show(url, key, options.tokens)) else 1
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
