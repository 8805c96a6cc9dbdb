"""Bodies of the OpenAI API: what is accepted, and what it means for sampling.

Nulls and unknown fields are tolerated. Parameters of the API, and of vLLM's extensions to
it, that would change the answer and are not implemented are refused, never ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from cluster.gateway.errors import ApiError, invalid
from cluster.gateway.structured import Constraint, constraint_of
from cluster.gateway.unsupported import IN_CHATS, IN_COMPLETIONS, refuse_unsupported
from instance.request import RequestClass, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 128
MAX_CHOICES = 128
"""Choices of one answer at most, over all its prompts."""
MAX_LOGPROBS = 20
MAX_BIASED = 1024
_UINT32 = (1 << 32) - 1
_GREEDY_BELOW = 1e-5
"""Lower temperatures count as 0 (as in vLLM): the logits divided by them would overflow."""

M = TypeVar("M", bound=BaseModel)


# ---- fields


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _text(value: Any) -> Any:
    """The text of a message: a string, or a list of text parts joined by line breaks."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"only parts of type 'text' are supported, not {str(kind)[:40]!r}")
        texts.append(text)
    return "\n".join(texts)


def _count(value: Any) -> Any:
    """A number that clients also give as false."""
    return None if value is False else value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompts(value: Any) -> Any:
    """A list of prompts, each a text or token ids."""
    prompts = [value] if isinstance(value, str) or (_is_ids(value) and value) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("must be a text, a list of token ids, or a list of either")
    if not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts):
        raise ValueError("must be a text, a list of token ids, or a list of either")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed in one request")
    return prompts


class Message(BaseModel):
    """A message of a chat. Further fields reach the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str, BeforeValidator(_text)] = ""

    def for_template(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_none=True)
        if self.role == "developer":  # OpenAI's newer name; templates know the older one
            fields["role"] = "system"
        return fields


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=_UINT32)]


class GenerationBody(BaseModel):
    """What completions and chat completions have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_UINT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    max_tokens: Annotated[int, Field(ge=1, le=_UINT32)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_UINT32)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASED)
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    priority: int | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    _constraint: Constraint | None = PrivateAttr(None)

    @property
    def constraint(self) -> Constraint | None:
        """What the output must match."""
        return self._constraint

    def constrain(self, constraint: Constraint | None) -> None:
        """Hold the output to a grammar."""
        self._constraint = constraint

    @property
    def output_limit(self) -> int | None:
        """Output tokens at most; None fills the context."""
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens told with each drawn one; None tells no log-probabilities."""
        return None

    @property
    def request_class(self) -> RequestClass:
        """The class of vLLM's ``priority``, of which lower is served first."""
        if not self.priority:
            return RequestClass.STANDARD
        return RequestClass.INTERACTIVE if self.priority < 0 else RequestClass.BATCH

    def sampling(self, num_prompt: int, context: int) -> SamplingParams:
        """How tokens are drawn for a prompt.

        Args:
            num_prompt: Tokens of the prompt.
            context: Prompt and output tokens at most.

        Raises:
            ApiError: 400 if prompt and output do not fit.
        """
        if num_prompt + 1 > context:
            raise invalid(
                f"this model's maximum context length is {context} tokens, but the prompt has "
                f"{num_prompt}; at least one must be left for the output",
                "messages" if isinstance(self, ChatBody) else "prompt",
                "context_length_exceeded",
            )
        room = context - num_prompt
        limit = self.output_limit
        if limit is not None and limit > room:
            raise invalid(
                f"this model's maximum context length is {context} tokens, but {limit} output "
                f"tokens were asked for after a prompt of {num_prompt}",
                "max_tokens",
                "context_length_exceeded",
            )
        max_tokens = limit if limit is not None else room
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise invalid(
                f"min_tokens ({min_tokens}) is more than max_tokens ({max_tokens})", "min_tokens"
            )
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 64),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            repetition_penalty=(
                1.0 if self.repetition_penalty is None else self.repetition_penalty
            ),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
            logprobs=self.num_logprobs,
            grammar=self._constraint.grammar if self._constraint else None,
        )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    # The API's own default; a chat without a limit fills the context instead.
    max_tokens: Annotated[int, Field(ge=1, le=_UINT32)] | None = 16
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, BeforeValidator(_count)
    ] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_UINT32)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(BaseModel):
    """``POST /tokenize``: a text or a chat (vLLM's extension)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """``POST /detokenize`` (vLLM's extension)."""

    model: str | None = None
    tokens: list[TokenId]


# ---- parsing


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400 if it is not one.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise invalid("the body is not a JSON object", code="invalid_json")
    return body


def validate(kind: type[M], body: Mapping[str, Any]) -> M:
    """A body as its model.

    Raises:
        ApiError: 400 that names the first parameter at fault.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Pydantic adds the names of union members to the path; they mean nothing to a client.
        path = [
            str(step) for step in first["loc"] if not str(step).startswith(("function-", "list["))
        ]
        param = ".".join(path) or None
        message = first["msg"].removeprefix("Value error, ")
        raise invalid(f"{param}: {message}" if param else message, param) from None


def parse_completion(raw: bytes) -> CompletionBody:
    """A completion's body; raises ApiError (400)."""
    body = parse_object(raw)
    refuse_unsupported(body, IN_COMPLETIONS)
    completion = _check(validate(CompletionBody, body))
    completion.constrain(constraint_of(body))
    if completion.echo and completion.logprobs is not None:
        raise invalid("echo cannot be combined with logprobs", "echo", "unsupported_parameter")
    if len(completion.prompt) * completion.num_choices > MAX_CHOICES:
        raise invalid(f"at most {MAX_CHOICES} choices are allowed in one request", "n")
    return completion


def parse_chat(raw: bytes) -> ChatBody:
    """A chat completion's body; raises ApiError (400)."""
    body = parse_object(raw)
    refuse_unsupported(body, IN_CHATS)
    chat = _check(validate(ChatBody, body))
    chat.constrain(constraint_of(body))
    if chat.top_logprobs and not chat.logprobs:
        raise invalid("top_logprobs is only allowed with logprobs=true", "top_logprobs")
    check_template_options(chat)
    return chat


_G = TypeVar("_G", bound=GenerationBody)


def _check(body: _G) -> _G:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only allowed with stream=true", "stream_options")
    if body.best_of is not None and body.best_of != body.num_choices:
        raise invalid("best_of other than n is not supported", "best_of", "unsupported_parameter")
    return body


def check_template_options(body: ChatBody | TokenizeBody) -> None:
    """Refuse options that contradict each other or would override the template's own input."""
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid(
            "continue_final_message and add_generation_prompt exclude each other",
            "continue_final_message",
        )
    reserved = {
        "conversation", "messages", "tools", "documents", "chat_template", "tokenize",
        "add_generation_prompt", "continue_final_message", "padding", "truncation",
        "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "processor_kwargs",
    }  # fmt: skip
    clash = reserved & (body.chat_template_kwargs or {}).keys()
    if clash:
        raise invalid(f"chat_template_kwargs cannot set '{min(clash)}'", "chat_template_kwargs")


def model_not_found(name: str) -> ApiError:
    return ApiError(
        404,
        f"the model '{name[:200]}' does not exist; GET /v1/models lists those that do",
        param="model",
        code="model_not_found",
    )
