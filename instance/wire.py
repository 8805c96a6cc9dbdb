"""Between the wire formats and the instance's own types; the cluster token and channel options."""

from __future__ import annotations

import enum
import hmac
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

import grpc
import grpc.aio

from instance.executor import ModelDescription
from instance.request import (
    Grammar,
    GrammarKind,
    Request,
    RequestClass,
    SamplingParams,
    Sequence,
    TokenLogprobs,
)
from protos import generate_pb2 as pb

PROTOCOL_VERSION = 3

END: Any = grpc.aio.EOF
"""What reading from a stream returns at its end."""

# Keepalive finds a blackholed link within a few seconds; a dead process is seen at once.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_LIMITS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
)
CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
]


def credentials(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that proves membership of the cluster."""
    return (("authorization", f"Bearer {token}"),)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without the cluster token (UNAUTHENTICATED)."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if isinstance(given, str):
            given = given.encode()
        handler = await continuation(handler_call_details)
        if hmac.compare_digest(given, self._expected) or handler is None:
            return handler

        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing cluster token")

        # Every method of Drover takes a stream; the reply kind must match the handler's.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        return grpc.stream_unary_rpc_method_handler(refuse)


def enum_value(value: enum.IntEnum) -> Any:
    """An enumeration's number for a message field; the generated stubs admit no plain int."""
    return int(value)


def model_to_wire(model: ModelDescription) -> pb.Model:
    return pb.Model(
        name=model.name,
        adapter=model.adapter,
        dtype=model.dtype,
        block_size=model.block_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        num_shards=model.num_shards,
    )


def params_to_wire(params: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        logprobs=params.logprobs,
        grammar=grammar_to_wire(params.grammar),
    )


def params_from_wire(wire: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        seed=wire.seed,
        max_tokens=wire.max_tokens,
        min_tokens=wire.min_tokens,
        ignore_eos=wire.ignore_eos,
        stop_token_ids=tuple(wire.stop_token_ids),
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        grammar=grammar_from_wire(wire),
    )


def grammar_to_wire(grammar: Grammar | None) -> pb.Grammar | None:
    if grammar is None:
        return None
    return pb.Grammar(kind=enum_value(grammar.kind), spec=grammar.spec)


def grammar_from_wire(wire: Any) -> Grammar | None:
    """The grammar in a message that may have one."""
    if not wire.HasField("grammar"):
        return None
    return Grammar(GrammarKind(wire.grammar.kind), wire.grammar.spec)


def logprobs_to_wire(logprobs: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(logprob=one.logprob, top_ids=one.top_ids, top_logprobs=one.top_logprobs)
        for one in logprobs
    ]


def logprobs_from_wire(wire: Collection[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    if not wire:  # a frame has many tokens, of which few have any
        return ()
    return tuple(
        TokenLogprobs(one.logprob, tuple(one.top_ids), tuple(one.top_logprobs)) for one in wire
    )


def charged_to_wire(sequence: Sequence) -> pb.Charged:
    """How much of a sequence its tenant has paid for."""
    return pb.Charged(prompt=sequence.charged_prompt, output=sequence.charged_output)


def take_charged(sequence: Sequence, charged: pb.Charged) -> None:
    """Leave to this instance's charge what was not paid for elsewhere."""
    prompt = min(charged.prompt, sequence.num_prompt)
    sequence.charged_prompt = max(sequence.charged_prompt, prompt)
    sequence.charged_output = min(max(sequence.charged_output, charged.output), sequence.num_output)


def submit_to_wire(
    request: Request,
    epoch: int,
    emitted: list[int],
    incarnation: str,
    charged_prompt: int = 0,
) -> pb.Submit:
    """A request with the output tokens that exist already, which are paid for.

    Args:
        charged_prompt: Prompt tokens that are paid for, where there is no output yet.
    """
    prompt = len(request.prompt) if emitted else charged_prompt
    return pb.Submit(
        request_id=request.request_id,
        epoch=epoch,
        incarnation=incarnation,
        prompt=request.prompt,
        emitted=emitted,
        sampling=params_to_wire(request.params),
        tenant=request.tenant,
        request_class=enum_value(request.request_class),
        arrival=request.arrival,
        model=request.model,
        adapter=request.adapter,
        charged=pb.Charged(prompt=prompt, output=len(emitted)),
    )


def request_from_wire(wire: pb.Submit, home: str) -> Request:
    return Request(
        request_id=wire.request_id,
        prompt=tuple(wire.prompt),
        params=params_from_wire(wire.sampling),
        home=home,
        tenant=wire.tenant,
        request_class=RequestClass(wire.request_class),
        arrival=wire.arrival,
        model=wire.model,
        adapter=wire.adapter,
    )
