"""Which grammar a body asks its output to match: OpenAI's ``response_format`` and vLLM's
``guided_*`` and ``structured_outputs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from cluster.gateway.errors import invalid
from instance.request import Grammar, GrammarKind

MAX_CHOICES = 1024
"""Entries of a ``choice`` at most."""


class Constraint(NamedTuple):
    """A grammar, and the parameter that it comes from."""

    grammar: Grammar
    param: str


def constraint_of(body: Mapping[str, Any]) -> Constraint | None:
    """What the output of a request must match; None if anything goes.

    Raises:
        ApiError: 400 if a parameter is malformed or asks for what is not supported, or if
            there are several.
    """
    found: list[Constraint] = []
    for param in ("response_format", "structured_outputs"):
        if body.get(param) is not None:
            read = _response_format if param == "response_format" else _structured_outputs
            found += read(body[param])
    for kind, make in _MAKERS.items():
        param = f"guided_{kind}"
        if body.get(param) is not None:
            found.append(Constraint(make(body[param], param), param))
    if len(found) > 1:
        raise invalid(
            f"'{found[0].param}' and '{found[1].param}' exclude each other: the output can be "
            "held to one of them",
            found[1].param,
        )
    return found[0] if found else None


def _response_format(value: Any) -> list[Constraint]:
    param = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [Constraint(Grammar(GrammarKind.JSON_OBJECT, ""), param)]
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        param = f"{param}.json_schema.schema"
        if schema is None:
            raise invalid(f"'{param}' is missing", param)
        return [Constraint(_json(schema, param), param)]
    raise invalid(f"'{param}.type' must be 'text', 'json_object' or 'json_schema'", f"{param}.type")


def _structured_outputs(value: Any) -> list[Constraint]:
    if not isinstance(value, dict):
        raise invalid("'structured_outputs' must be an object", "structured_outputs")
    found = []
    for name, given in value.items():
        param = f"structured_outputs.{name}"
        if given is None or given is False:
            continue
        if name in _MAKERS:
            found.append(Constraint(_MAKERS[name](given, param), param))
        elif name == "json_object":
            found.append(Constraint(Grammar(GrammarKind.JSON_OBJECT, ""), param))
        elif name != "disable_fallback":  # there is one library to use
            raise invalid(
                f"'{param}' is not supported by this server", param, "unsupported_parameter"
            )
    if not found:
        raise invalid(
            "'structured_outputs' needs one of 'json', 'json_object', 'regex', 'choice' and "
            "'grammar'",
            "structured_outputs",
        )
    return found


def _json(value: Any, param: str) -> Grammar:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise invalid(f"'{param}' is not valid JSON: {error}", param) from None
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be a JSON schema: an object", param)
    return Grammar(GrammarKind.JSON_SCHEMA, orjson.dumps(value).decode())


def _text(kind: GrammarKind) -> Callable[[Any, str], Grammar]:
    def read(value: Any, param: str) -> Grammar:
        if not isinstance(value, str):
            raise invalid(f"'{param}' must be a string", param)
        return Grammar(kind, value)

    return read


def _choice(value: Any, param: str) -> Grammar:
    strings = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not strings or not 0 < len(value) <= MAX_CHOICES:
        raise invalid(f"'{param}' must be a list of 1 to {MAX_CHOICES} strings", param)
    return Grammar(GrammarKind.CHOICE, orjson.dumps(value).decode())


_MAKERS: dict[str, Callable[[Any, str], Grammar]] = {
    "json": _json,
    "regex": _text(GrammarKind.REGEX),
    "choice": _choice,
    "grammar": _text(GrammarKind.EBNF),
}
