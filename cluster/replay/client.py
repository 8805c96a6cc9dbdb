"""A client of the completions API that notes when tokens come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx
import orjson

_WORDS = (
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix black "
    "potions; nobody asked why, yet everyone wrote 1234567890 notes about it. Water, light, "
    "music and time make people think of home: old streets, new names, open doors (and "
    "closed ones), a river under the bridge, three boats, some bread on the table. What "
    "should a machine say then? Perhaps that small things change large ones, that numbers "
    "like 42 or 2024 mean little alone, and that every question has more than one answer!"
)
"""Text whose tokens make prompts that every tokenizer knows."""


class ServerError(Exception):
    """The server refused, broke off, or cannot be reached.

    Attributes:
        kind: A word for counting, such as "http_429", "connect" or "timeout".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(slots=True)
class Answer:
    """A streamed answer; times by the monotonic clock.

    Attributes:
        sent: When the request was sent.
        arrivals: When each event with text came.
        text: All of it.
        ended: When it was complete.
        usage: The server's token counts, if it gave any.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    ended: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)


class CompletionClient:
    """Talks to one server; use it as an asynchronous context.

    Args:
        url: Base URL, without /v1.
        key: API key of requests that bring none; "" for none.
        timeout: Seconds that one request may take; 0 for any time.
    """

    def __init__(self, url: str, key: str = "", timeout: float = 0.0) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._timeout = timeout or None
        # Open loop: no request waits for another's connection.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=30.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> CompletionClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def model(self) -> tuple[str, int]:
        """Name and longest sequence of the first model served; 0 where it is not said."""
        answer = await self._json("GET", "/v1/models")
        try:
            card = answer["data"][0]
            return str(card["id"]), int(card.get("max_model_len") or 0)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError("models", f"{self.url}/v1/models names no model") from None

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text that continues another (vLLM's ``/tokenize``)."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = await self._json("POST", "/tokenize", body)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise ServerError("tokenize", f"{self.url}/tokenize gave no tokens")
        return [int(token) for token in tokens]

    async def vocabulary(self, model: str) -> list[int]:
        """Ids of ordinary tokens, to make prompts of."""
        return sorted(set(await self.tokenize(model, _WORDS)))

    async def complete(
        self,
        answer: Answer,
        model: str,
        prompt: Sequence[int],
        max_tokens: int,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        **sampling: Any,
    ) -> None:
        """Stream an answer of ``max_tokens`` tokens, noting in ``answer`` what comes.

        Args:
            answer: Filled as the answer comes, also where it ends in an error.
            model: Name of the model.
            prompt: Token ids.
            max_tokens: Output tokens; end-of-sequence tokens end nothing.
            key: API key; None for the client's own.
            headers: Further headers.
            sampling: Further fields of the request.

        Raises:
            ServerError: if no whole answer came.
        """
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        sent = {
            "content-type": "application/json",
            **self._authorization(self._key if key is None else key),
            **(headers or {}),
        }
        answer.sent = time.monotonic()
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream(
                    "POST", f"{self.url}/v1/completions", content=orjson.dumps(body), headers=sent
                ) as response,
            ):
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                await self._read(response, answer)
        except (TimeoutError, httpx.TimeoutException):
            raise ServerError("timeout", f"{self.url} did not answer in time") from None
        except httpx.ConnectError as error:
            raise ServerError("connect", f"{self.url} cannot be reached: {error}") from None
        except httpx.HTTPError as error:
            raise ServerError("broken", f"the connection broke: {error!r}") from None
        finally:
            answer.ended = time.monotonic()

    async def _read(self, response: httpx.Response, answer: Answer) -> None:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            now = time.monotonic()
            try:
                event = orjson.loads(data)
            except ValueError:
                raise ServerError("malformed", f"an event is not JSON: {data[:200]}") from None
            if error := event.get("error"):
                raise ServerError("error_event", str(error.get("message", error)))
            for choice in event.get("choices") or ():
                # An empty piece stands for a token whose text is not whole yet.
                answer.text += choice.get("text") or ""
                if choice.get("text") or not choice.get("finish_reason"):
                    answer.arrivals.append(now)
            if usage := event.get("usage"):
                answer.usage = usage
        raise ServerError("incomplete", "the stream ended before the answer did")

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = await self._http.request(
                method, self.url + path, json=body, headers=self._authorization(self._key)
            )
        except httpx.InvalidURL as error:
            raise ServerError("url", f"{self.url} is not a URL: {error}") from None
        except httpx.HTTPError as error:
            raise ServerError("connect", f"{self.url} does not answer: {error}") from None
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        try:
            return response.json()
        except ValueError:
            raise ServerError("malformed", f"{self.url}{path} answered no JSON") from None

    @staticmethod
    def _authorization(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}


def _refusal(status: int, content: bytes) -> ServerError:
    try:
        message = orjson.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = content[:200].decode(errors="replace")
    return ServerError(f"http_{status}", f"{status}: {message}")
