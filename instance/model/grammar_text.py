"""From a request's grammar to the definition that llguidance compiles.

Imports neither torch nor a tokenizer, so that a process can check grammars and do nothing else.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from instance.request import Grammar, GrammarKind

if TYPE_CHECKING:  # exists in the type stub only
    from llguidance._lib import JsonCompileOptions

MAX_SPEC_CHARS = 128 * 1024
"""Longest text of a grammar."""
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=200_000, step_max_items=5_000, verbose_errors=False
)
"""Of a grammar, and of the work for one token (llguidance's defaults where not named).

The whole batch waits for a row's mask. An ambiguous grammar can make one take seconds under the
default of 50,000 parser items, but below 20 ms under this one (measured with 49k tokens), which
schemas with hundreds of properties do not come near.
"""

# Without a bound, a model that has nothing to say may fill its whole output with blanks.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_JSON: JsonCompileOptions = {"whitespace_pattern": _WHITESPACE}


class GrammarError(ValueError):
    """A grammar cannot be used; the message says why, in words for the client."""


def definition(grammar: Grammar) -> str:
    """The grammar as llguidance reads it. It may still fail to compile.

    JSON schemas follow llguidance's support: keywords that it cannot enforce are refused when
    the schema is compiled, never ignored. Between JSON tokens at most 64 characters of
    whitespace are allowed. Regular expressions match the whole output and know neither
    look-around nor back-references.

    Raises:
        GrammarError: The text is too long or is not what its kind says.
    """
    kind, spec = grammar
    if len(spec) > MAX_SPEC_CHARS:
        raise GrammarError(f"it has {len(spec)} characters, at most {MAX_SPEC_CHARS} are allowed")
    matcher = llguidance.LLMatcher
    if kind is GrammarKind.JSON_OBJECT:
        return matcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON)
    if kind is GrammarKind.JSON_SCHEMA:
        try:
            return matcher.grammar_from_json_schema(spec, defaults=_JSON)
        except ValueError as error:
            raise GrammarError(f"it is not a JSON schema: {error}") from None
    if kind is GrammarKind.REGEX:
        return matcher.grammar_from_regex(spec)
    if kind is GrammarKind.CHOICE:
        return matcher.grammar_from_lark(_choice(spec))
    if re.search(r"^\s*[\w-]+\s*::=", spec, re.MULTILINE):
        try:
            spec = any_to_lark(spec)
        except (GbnfToLarkError, RecursionError) as error:
            raise GrammarError(f"it is not a grammar in GBNF's notation: {error}") from None
    return matcher.grammar_from_lark(spec)


def check(grammar: Grammar) -> str:
    """What is wrong with a grammar, or "". Takes as long as its compilation, which a hostile
    one can stretch without end: give it to a process that can be killed."""
    try:
        text = definition(grammar)
    except GrammarError as error:
        return str(error)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
    return message(messages[0]) if failed else ""


def message(error: str) -> str:
    """The readable part of what llguidance says of an error."""
    return re.split(r"\n<(?:state|non-verbose)", error)[0].strip()[:1000]


def _choice(spec: str) -> str:
    try:
        choices = json.loads(spec)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the choices are not a JSON list: {error}") from None
    if not isinstance(choices, list) or not choices:
        raise GrammarError("the choices must be a list with at least one entry")
    if not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("every choice must be a string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
