"""Which grammar a body asks for, in OpenAI's words and in vLLM's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.gateway.errors import ApiError
from cluster.gateway.schemas import parse_chat, parse_completion
from cluster.gateway.structured import MAX_CHOICES, constraint_of
from instance.request import Grammar, GrammarKind, Request, SamplingParams
from instance.wire import grammar_from_wire, params_from_wire, params_to_wire, submit_to_wire

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"const": "é"}}}
SPEC = '{"type":"object","properties":{"b":{"type":"null"},"a":{"const":"é"}}}'
JSON = Grammar(GrammarKind.JSON_SCHEMA, SPEC)


def response_format(**inner: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", **inner}}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(GrammarKind.JSON_OBJECT, "")),
        (response_format(schema=SCHEMA, strict=True), JSON),
        (response_format(schema=SCHEMA, strict=None, description="d"), JSON),
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": json.dumps(SCHEMA)}, JSON),
        ({"guided_regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
        ({"guided_choice": ["ja", "nein"]}, Grammar(GrammarKind.CHOICE, '["ja","nein"]')),
        ({"guided_grammar": "root ::= x"}, Grammar(GrammarKind.EBNF, "root ::= x")),
        ({"structured_outputs": {"json": SCHEMA}}, JSON),
        ({"structured_outputs": {"json": SPEC, "regex": None, "disable_fallback": True}}, JSON),
        ({"structured_outputs": {"json_object": True}}, Grammar(GrammarKind.JSON_OBJECT, "")),
        ({"structured_outputs": {"regex": "a"}}, Grammar(GrammarKind.REGEX, "a")),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar(GrammarKind.CHOICE, '["a"]')),
        ({"structured_outputs": {"grammar": "g"}}, Grammar(GrammarKind.EBNF, "g")),
    ],
)
def test_every_way_to_ask(body: dict[str, Any], expected: Grammar | None) -> None:
    found = constraint_of(body)
    assert (found and found.grammar) == expected
    chat = parse_chat(json.dumps({"messages": [{"role": "user", "content": "x"}], **body}).encode())
    completion = parse_completion(json.dumps({"prompt": "x", **body}).encode())
    for parsed in (chat, completion):
        assert parsed.sampling(3, 100).grammar == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        (response_format(), "response_format.json_schema.schema"),
        (response_format(schema=[1]), "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice"),
        ({"guided_grammar": {}}, "guided_grammar"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_what_is_malformed_or_too_much_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        constraint_of(body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


@pytest.mark.parametrize("grammar", [None, JSON, Grammar(GrammarKind.JSON_OBJECT, "")])
def test_a_grammar_survives_the_wire(grammar: Grammar | None) -> None:
    params = SamplingParams(grammar=grammar, temperature=0.5)
    assert params_from_wire(params_to_wire(params)) == params
    submit = submit_to_wire(Request("r", (1,), params), 2, [3], "i")
    assert grammar_from_wire(submit.sampling) == grammar
