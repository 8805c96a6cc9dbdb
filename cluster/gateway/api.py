"""The OpenAI API: completions, chat completions, models; vLLM's ``/tokenize``, ``/detokenize``."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from cluster.gateway import schemas
from cluster.gateway.auth import ApiKeys
from cluster.gateway.config import GatewayConfig
from cluster.gateway.connection import (
    ClientDisconnected,
    read_body,
    shutting_down,
    while_connected,
)
from cluster.gateway.detokenizer import OutputText
from cluster.gateway.errors import from_failure, invalid
from cluster.gateway.generation import Choice, all_pieces
from cluster.gateway.grammar_check import GrammarChecker
from cluster.gateway.logprobs import LogprobsFormat
from cluster.gateway.metrics import GatewayMetrics, RequestTimer
from cluster.gateway.router import Router
from cluster.gateway.schemas import ChatBody, GenerationBody
from cluster.gateway.stream import RequestFailed
from cluster.gateway.streaming import AnswerFormat, EventStream, collect
from cluster.gateway.tokenizer import ModelTokenizer
from instance.request import Request, RequestClass

CLIENT_CLOSED = 499
"""Status under which a request is counted whose client went away; nobody receives it."""


class Call(NamedTuple):
    """A request as it arrived.

    Attributes:
        tenant: Who is charged.
        body: Unparsed.
        request_class: What the header ``x-drover-class`` says, or None.
        arrival: Seconds since the Unix epoch.
        timer: Started at the arrival.
        deadline: The event loop's time at which it has run out, or None.
    """

    tenant: str
    body: bytes
    request_class: RequestClass | None
    arrival: float
    timer: float
    deadline: float | None


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


class OpenAIApi:
    """Endpoints under ``/v1``, ``/tokenize`` and ``/detokenize``.

    Args:
        config: Settings of the gateway.
        router: Runs requests on instances.
        tokenizer: The model's.
        keys: Who may call.
        metrics: Where requests are counted.
        closing: Done when the gateway gives up what still runs.
    """

    def __init__(
        self,
        config: GatewayConfig,
        router: Router,
        tokenizer: ModelTokenizer,
        keys: ApiKeys,
        metrics: GatewayMetrics,
        closing: asyncio.Future[None],
    ) -> None:
        self.draining = False
        """New requests are refused; those that run go on."""
        self._config = config
        self._router = router
        self._tokenizer = tokenizer
        self._keys = keys
        self._metrics = metrics
        self._closing = closing
        self._grammars = GrammarChecker()
        self._model = config.served_model_name or config.model
        self._created = int(time.time())

    def close(self) -> None:
        """End the processes that try grammars out."""
        self._grammars.close()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    @property
    def context(self) -> int:
        """Prompt and output tokens of a request at most: what every instance can hold, since
        a request may move to any of them."""
        limits = (
            min(info.model.max_model_len, info.total_blocks * info.model.block_size)
            for info in (instance.info for instance in self._router.view.instances)
        )
        return min((self._config.max_model_len, *limits))

    # ---- endpoints

    async def completions(self, http: HttpRequest) -> Response:
        call = await self._receive(http)
        body = schemas.parse_completion(call.body)
        self._check_model(body.model)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts: list[list[int]] = []
        echoes: list[str] = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                prompts.append(await self._tokenizer.encode(prompt, add_special_tokens=special))
                echoes.append(prompt)
            else:
                self._check_ids(prompt, "prompt")
                prompts.append(prompt)
                echoes.append(self._tokenizer.decode(prompt) if body.echo else "")
        return await self._generate(http, body, prompts, call, echoes if body.echo else ())

    async def chat_completions(self, http: HttpRequest) -> Response:
        call = await self._receive(http)
        body = schemas.parse_chat(call.body)
        self._check_model(body.model)
        tokens = await self._encode_chat(body, body.messages)
        return await self._generate(http, body, [tokens], call)

    async def tokenize(self, http: HttpRequest) -> Response:
        call = await self._receive(http)
        body = schemas.validate(schemas.TokenizeBody, schemas.parse_object(call.body))
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either 'prompt' or 'messages'", "prompt")
        if body.messages is not None:
            schemas.check_template_options(body)
            tokens = await self._encode_chat(body, body.messages)
        else:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            tokens = await self._tokenizer.encode(body.prompt or "", add_special_tokens=special)
        answer = {
            "count": len(tokens),
            "max_model_len": self.context,
            "tokens": tokens,
            "token_strs": self._tokenizer.pieces(tokens) if body.return_token_strs else None,
        }
        return json_response(answer)

    async def detokenize(self, http: HttpRequest) -> Response:
        call = await self._receive(http)
        body = schemas.validate(schemas.DetokenizeBody, schemas.parse_object(call.body))
        self._check_model(body.model)
        self._check_ids(body.tokens, "tokens")
        text = self._tokenizer.decode(body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    async def models(self, http: HttpRequest) -> Response:
        self._keys.tenant(http.headers)
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        self._keys.tenant(http.headers)
        self._check_model(http.path_params["model"])
        return json_response(self._card())

    # ---- parts

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "drover",
            "root": self._model,
            "parent": None,
            "max_model_len": self.context,
        }

    async def _receive(self, http: HttpRequest) -> Call:
        if self.draining:
            raise shutting_down()
        tenant = self._keys.tenant(http.headers)
        arrival, timer = time.time(), time.monotonic()
        limit = self._config.request_timeout
        deadline = asyncio.get_running_loop().time() + limit if limit > 0 else None
        length = http.headers.get("content-length")
        body = await read_body(http.receive, length, self._config.max_request_bytes)
        return Call(tenant, body, _request_class(http), arrival, timer, deadline)

    def _check_model(self, name: str | None) -> None:
        if name and name not in (self._model, self._config.model):
            raise schemas.model_not_found(name)

    def _check_ids(self, tokens: Iterable[int], param: str) -> None:
        # The model's vocabulary may be larger than its tokenizer's, but not known yet.
        views = self._router.view.instances
        size = views[0].info.model.vocab_size if views else self._tokenizer.vocab_size
        if not all(0 <= token < size for token in tokens):
            raise invalid(f"{param}: token ids must be in [0, {size})", param)

    async def _encode_chat(
        self, body: ChatBody | schemas.TokenizeBody, messages: list[schemas.Message]
    ) -> list[int]:
        continues = bool(body.continue_final_message)
        add_prompt = body.add_generation_prompt
        return await self._tokenizer.encode_chat(
            [message.for_template() for message in messages],
            add_generation_prompt=not continues if add_prompt is None else add_prompt,
            continue_final_message=continues,
            add_special_tokens=bool(body.add_special_tokens),
            template_kwargs=body.chat_template_kwargs,
        )

    def _submit(
        self,
        body: GenerationBody,
        prompts: list[list[int]],
        call: Call,
        answer_id: str,
        echoes: Sequence[str],
    ) -> list[Choice]:
        context = self.context
        for prompt in prompts:
            if not prompt:
                raise invalid("the prompt is empty", "prompt")
        if body.logit_bias:
            self._check_ids(body.logit_bias, "logit_bias")
        sampling = [body.sampling(len(prompt), context) for prompt in prompts]
        number = body.num_choices
        single = len(prompts) * number == 1
        choices: list[Choice] = []
        try:
            for index in range(len(prompts) * number):
                which, nth = divmod(index, number)
                params = sampling[which]
                if nth:
                    params = dataclasses.replace(params, seed=(params.seed + nth) % (1 << 64))
                request = Request(
                    request_id=answer_id if single else f"{answer_id}-{index}",
                    prompt=tuple(prompts[which]),
                    params=params,
                    home=self._router.home_id,
                    tenant=call.tenant,
                    request_class=(
                        body.request_class if call.request_class is None else call.request_class
                    ),
                    arrival=call.arrival,
                )
                output = OutputText(
                    self._tokenizer.detokenizer(),
                    body.stop,
                    include_stop=bool(body.include_stop_str_in_output),
                    min_tokens=params.min_tokens,
                    offsets=params.logprobs is not None,
                )
                choices.append(
                    Choice(
                        index,
                        request,
                        self._router.submit(
                            request, math.inf if call.deadline is None else call.deadline
                        ),
                        output,
                        RequestTimer(self._metrics, call.timer),
                        echo=echoes[which] if echoes else "",
                        counts_prompt=nth == 0,
                    )
                )
        except RequestFailed as failure:
            for choice in choices:
                choice.cancel()
            raise from_failure(failure) from None
        return choices

    async def _generate(
        self,
        http: HttpRequest,
        body: GenerationBody,
        prompts: list[list[int]],
        call: Call,
        echoes: Sequence[str] = (),
    ) -> Response:
        chat = isinstance(body, ChatBody)
        # The id is a secret of client and operators: knowing it allows to act on the request.
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        http.scope["state"]["request_id"] = answer_id
        if body.constraint is not None:
            await self._grammars.check(body.constraint)
        choices = self._submit(body, prompts, call, answer_id, echoes)
        form = AnswerFormat(
            chat=chat,
            answer_id=answer_id,
            model=self._model,
            choices=choices,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            logprobs=(
                None
                if body.num_logprobs is None
                else LogprobsFormat(chat, self._tokenizer.token_bytes)
            ),
        )
        if body.stream:
            return EventStream(
                choices,
                form,
                closing=self._closing,
                timeout=_left(call.deadline),
                disconnected=self._metrics.disconnects.inc,
            )
        pieces = all_pieces(choices)
        try:
            whole = await while_connected(
                collect(pieces, len(choices)), http.receive, self._closing, _left(call.deadline)
            )
            return Response(form.whole(whole), media_type="application/json")
        except ClientDisconnected:
            self._metrics.disconnects.inc()
            raise
        finally:
            await pieces.aclose()
            for choice in choices:
                choice.cancel()


def _request_class(http: HttpRequest) -> RequestClass | None:
    """The class that the client names in a header; raises ApiError (400) for no such one."""
    name = http.headers.get("x-drover-class")
    if name is None:
        return None
    try:
        return RequestClass[name.strip().upper()]
    except KeyError:
        names = ", ".join(one.name.lower() for one in RequestClass)
        raise invalid(f"x-drover-class must be one of {names}", "x-drover-class") from None


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    return max(0.0, deadline - asyncio.get_running_loop().time())
