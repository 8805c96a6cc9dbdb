"""What bodies the API accepts and refuses, and what they mean for sampling."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway import schemas
from cluster.gateway.errors import ApiError
from cluster.gateway.unsupported import UNSUPPORTED
from instance.request import RequestClass, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> schemas.CompletionBody:
    return schemas.parse_completion(json.dumps({"prompt": "x", **fields}).encode())


def chat(**fields: Any) -> schemas.ChatBody:
    return schemas.parse_chat(json.dumps({"messages": MESSAGES, **fields}).encode())


def refused(parse: Any, *args: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(*args, **fields)
    assert caught.value.status == 400
    return caught.value


def test_sampling_parameters() -> None:
    body = completion(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-1, max_tokens=9, min_tokens=2,
        ignore_eos=True, stop_token_ids=[5, 6], stop="end", repetition_penalty=1.2,
        presence_penalty=-0.5, frequency_penalty=2, logit_bias={"9": -100, "3": 1.5}, logprobs=4,
    )  # fmt: skip
    assert body.sampling(10, 100) == SamplingParams(
        0.5, 0.9, 7, 0.1, (1 << 64) - 1, 9, 2, True, (5, 6), 1.2, -0.5, 2.0,
        ((3, 1.5), (9, -100.0)), 4,
    )  # fmt: skip
    assert body.stop == ["end"]


def test_nulls_and_unknown_fields_are_tolerated() -> None:
    names = [*schemas.ChatBody.model_fields, *UNSUPPORTED, "logprobs", "whatever"]
    body = chat(**{name: None for name in names if name not in ("messages", "stop")}, stop=None)
    params = body.sampling(10, 100)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 90)
    assert body.stop == []
    assert chat(store=True, metadata={"a": "b"}, service_tier="auto").stop == []


def test_seeds_are_drawn_where_absent() -> None:
    seeds = {chat().sampling(1, 10).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_output_limits() -> None:
    assert chat().sampling(10, 100).max_tokens == 90
    assert completion().sampling(10, 100).max_tokens == 16
    assert completion(max_tokens=None).sampling(10, 100).max_tokens == 90
    assert chat(max_tokens=5, max_completion_tokens=7).sampling(10, 100).max_tokens == 7
    assert chat(max_tokens=90).sampling(10, 100).max_tokens == 90
    assert chat().sampling(99, 100).max_tokens == 1
    for body, prompt in ((chat(), 100), (chat(max_tokens=91), 10), (completion(), 85)):
        assert refused(body.sampling, prompt, 100).code == "context_length_exceeded"
    assert refused(chat(max_tokens=2, min_tokens=3).sampling, 1, 100).param == "min_tokens"


def test_tiny_temperatures_are_greedy() -> None:
    assert chat(temperature=1e-7).sampling(1, 9).temperature == 0
    assert chat(top_k=-1).sampling(1, 9).top_k == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], "a"], [[1], "a"]),
        ([[]], [[]]),
        ("", [""]),
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt", [None, [], 1, [1, "a"], [1.5], [True], {"a": 1}, [["a"]], ["a"] * 129]
)
def test_bad_prompts(prompt: Any) -> None:
    assert refused(completion, prompt=prompt).param == "prompt"


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts, "name": "eve"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "refusal": None},
        ]
    )
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "a\nb", "name": "eve"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(token): 0 for token in range(1025)}}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "alien", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], param: str) -> None:
    error = refused(chat, **fields)
    assert error.param == param
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 3},
        {"echo": True},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"functions": [{"name": "f"}]},
        {"tool_choice": "required"},
        {"modalities": ["text", "audio"]},
        {"skip_special_tokens": False},
    ],
)
def test_what_is_not_implemented_is_refused(fields: dict[str, Any]) -> None:
    error = refused(chat, **fields)
    assert (error.param, error.code) == (next(iter(fields)), "unsupported_parameter")
    assert str(error.param) in error.message


def test_harmless_values_of_what_is_not_implemented() -> None:
    chat(
        n=1, logprobs=False, top_logprobs=0, tools=[], tool_choice="auto", logit_bias={},
        presence_penalty=0.0, frequency_penalty=0, response_format={"type": "text"},
    )  # fmt: skip
    completion(echo=False, suffix="", best_of=1, n=1, logprobs=False, top_logprobs=0)
    chat(tools=[{"type": "function"}], tool_choice="none")
    chat(functions=[{"name": "f"}], function_call="none")


def test_logprobs() -> None:
    """A completion's is a number, of which 0 asks for the token drawn; a chat's are two."""
    for body, count in (
        (completion(), None),
        (completion(logprobs=0), 0),
        (completion(logprobs=5), 5),
        (chat(), None),
        (chat(logprobs=False), None),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=20), 20),
    ):
        assert body.num_logprobs == body.sampling(1, 100).logprobs == count
    assert refused(chat, top_logprobs=2).param == "top_logprobs"
    assert refused(completion, top_logprobs=2).code == "unsupported_parameter"
    assert refused(completion, logprobs=1, echo=True).param == "echo"


def test_choices() -> None:
    assert chat().num_choices == chat(n=1).num_choices == 1
    assert chat(n=128).num_choices == 128
    assert completion(n=3, best_of=3).num_choices == 3
    assert refused(completion, n=2, best_of=3).param == "best_of"
    assert refused(completion, n=2, prompt=["a"] * 65).param == "n"


def test_priorities_are_classes() -> None:
    found = [chat(priority=value).request_class for value in (-3, None, 0, 7)]
    assert found == [
        RequestClass.INTERACTIVE, RequestClass.STANDARD, RequestClass.STANDARD, RequestClass.BATCH,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"1", b'"a"', b"\xff", b"{'a': 1}", b'{"a": NaN}', b"[" * 100_000]
)
def test_bodies_that_are_no_json_object(raw: bytes) -> None:
    assert refused(schemas.parse_chat, raw).code == "invalid_json"


SCALAR = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False)
JSON = st.recursive(
    SCALAR | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


def outcome(parse: Any, fields: dict[str, Any]) -> int:
    try:
        parse(json.dumps(fields).encode()).sampling(1, 1 << 32)
    except ApiError as error:
        return error.status
    return 200


@given(
    st.dictionaries(
        st.sampled_from([*schemas.ChatBody.model_fields, *UNSUPPORTED]), JSON, max_size=4
    )
)
def test_any_object_is_parsed_or_refused(fields: dict[str, Any]) -> None:
    """Nothing that a client sends is an internal error."""
    assert outcome(schemas.parse_chat, {"messages": MESSAGES, **fields}) in (200, 400)
    assert outcome(schemas.parse_completion, {"prompt": "x", **fields}) in (200, 400)
