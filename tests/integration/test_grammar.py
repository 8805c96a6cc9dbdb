"""Output held to a grammar: random logits give valid output, and the state follows the tokens."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from instance.executor import GrammarRow, Ints, StepBatch
from instance.model.grammar import MAX_STATES, Grammars, load_tokenizer
from instance.model.grammar_text import MAX_SPEC_CHARS, check
from instance.model.resolve import resolve_model
from instance.model.sampler import sample
from instance.request import Grammar, GrammarKind, SamplingParams
from tests.integration.models import BASE_VOCAB, byte_tokenizer

TINY_EOS = (257, 259)
PADDED = BASE_VOCAB + 12
"""Logits are wider than the tokenizer's vocabulary, as they are in many models."""

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["home", "work", 'Müller "&" Söhne']},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "age", "kind", "tags", "zip"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": 99}]},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LIST = {"type": "array", "items": {"enum": [1, "two", None, {"a": []}]}, "minItems": 2}
EXPRESSION = """
root ::= term ("+" term)*
term ::= [0-9] | "(" root ")"
"""
LARK = """
start: greeting " " NAME
greeting: "hello" | "hi"
NAME: /[A-Z][a-z]{1,7}/
"""


def schema(value: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> llguidance.LLTokenizer:
    return load_tokenizer(tiny_folder, PADDED, TINY_EOS)


@pytest.fixture
def grammars(tiny: llguidance.LLTokenizer) -> Iterator[Grammars]:
    made = Grammars(PADDED, TINY_EOS, lambda: tiny)
    yield made
    made.close()


def batch_of(
    grammar: Grammar,
    output: list[int],
    params: SamplingParams | None = None,
    eos: tuple[int, ...] = TINY_EOS,
    name: str = "r",
) -> StepBatch:
    """A step that draws one token after ``output``."""
    params = params or SamplingParams(grammar=grammar)
    one = np.zeros(1, dtype=np.int64)
    return StepBatch(
        number=1,
        token_ids=one,
        positions=one,
        slots=one,
        query_starts=np.array([0, 1]),
        context_lens=one + 1,
        block_tables=one[None],
        num_decodes=1,
        sample_rows=one,
        sample_positions=one + len(output),
        num_outputs=one + len(output),
        sampling=[params],
        stop_token_ids=[frozenset(params.stop_token_ids).union(eos)],
        grammars={0: GrammarRow(name, grammar, list(output))},
    )


def allowed(grammars: Grammars, batch: StepBatch, vocab: int = PADDED) -> Ints:
    """Token ids that may be drawn."""
    logits = torch.zeros(1, vocab)
    assert grammars.restrict(logits, batch) == {}
    return np.flatnonzero(np.isfinite(logits[0].numpy()))


def draw(
    grammars: Grammars,
    grammar: Grammar,
    seed: int,
    vocab: int,
    eos: tuple[int, ...],
    limit: int = 600,
    likely: list[int] | None = None,
    **settings: object,
) -> list[int] | None:
    """Output drawn from random logits, without its end; None if that is not reached."""
    params = SamplingParams(grammar=grammar, seed=seed, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    output: list[int] = []
    for _ in range(limit):
        logits = torch.randn(1, vocab, generator=generator) * 3
        if likely:  # what can close an open value, so that outputs stay short
            logits[0, likely] += 4
        batch = batch_of(grammar, output, params, eos, f"r{seed}")
        assert grammars.restrict(logits, batch) == {}
        token = int(sample(logits, batch)[0])
        if token in eos:
            return output
        output.append(token)
    return None


def valid(grammar: Grammar, text: str) -> None:
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        jsonschema.validate(json.loads(text), json.loads(grammar.spec))
    elif grammar.kind is GrammarKind.JSON_OBJECT:
        assert isinstance(json.loads(text), dict)
    elif grammar.kind is GrammarKind.REGEX:
        assert re.fullmatch(grammar.spec, text)
    elif grammar.kind is GrammarKind.CHOICE:
        assert text in json.loads(grammar.spec)
    elif "root" in grammar.spec:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(text, {"__builtins__": {}}), int)
    else:
        assert re.fullmatch(r"(hello|hi) [A-Z][a-z]{1,7}", text)


GRAMMARS = {
    "person": schema(PERSON),
    "tree": schema(TREE),
    "list": schema(LIST),
    "object": Grammar(GrammarKind.JSON_OBJECT, ""),
    "regex": Grammar(GrammarKind.REGEX, r"(a|b)+-[0-9]{2,4}(\.[xyz])?"),
    "choice": Grammar(
        GrammarKind.CHOICE, json.dumps(["yes", "no", 'a "b"\n', "Grüße 🐑", "yesterday"])
    ),
    "gbnf": Grammar(GrammarKind.EBNF, EXPRESSION),
    "lark": Grammar(GrammarKind.EBNF, LARK),
}
CLOSING = list(b'}])"') + list(TINY_EOS)


@pytest.mark.parametrize("name", GRAMMARS)
def test_random_bytes_under_a_grammar_are_valid(grammars: Grammars, name: str) -> None:
    grammar = GRAMMARS[name]
    ended = 0
    for seed in range(12):
        temperature = 1.0 if seed % 3 else 0.0
        output = draw(
            grammars, grammar, seed, PADDED, TINY_EOS, likely=CLOSING, temperature=temperature,
            top_p=1.0 if seed % 2 else 0.9,
        )  # fmt: skip
        if output is not None:
            ended += 1
            valid(grammar, bytes(output).decode())
    assert ended >= 10


@pytest.fixture(scope="module")
def packaged() -> tuple[Path, PreTrainedTokenizerBase]:
    folder = resolve_model("smollm2")
    return folder, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_random_tokens_of_a_real_vocabulary(packaged: tuple[Path, PreTrainedTokenizerBase]) -> None:
    folder, tokenizer = packaged
    eos = (tokenizer.eos_token_id,)
    vocab = len(tokenizer)
    grammars = Grammars(vocab, eos, functools.partial(load_tokenizer, folder, vocab, eos))
    closing = [tokenizer.convert_tokens_to_ids(one) for one in ('"', '",', "}", '"}', "]", ",")]
    for name in ("person", "list", "choice", "regex"):
        for seed in range(3):
            output = draw(grammars, GRAMMARS[name], seed, vocab, eos, likely=[*closing, *eos])
            assert output is not None
            valid(GRAMMARS[name], tokenizer.decode(output))
    grammars.close()


@pytest.mark.parametrize("name", GRAMMARS)
def test_state_is_a_function_of_the_output(tiny: llguidance.LLTokenizer, name: str) -> None:
    """At any cut, another instance that replays the output allows exactly the same tokens."""
    grammar = GRAMMARS[name]
    chance = random.Random(7)
    here = Grammars(PADDED, TINY_EOS, lambda: tiny)
    for seed in range(4):
        output = draw(here, grammar, seed, PADDED, TINY_EOS, limit=200, likely=CLOSING) or []
        there = Grammars(PADDED, TINY_EOS, lambda: tiny)
        cuts = {0, len(output), *(chance.randrange(len(output) + 1) for _ in range(6))}
        for at in range(len(output) + 1):
            step_by_step = allowed(here, batch_of(grammar, output[:at], name="fresh"))
            if at in cuts:
                rebuilt = allowed(there, batch_of(grammar, output[:at], name=f"cut-{at}"))
                assert rebuilt.tolist() == step_by_step.tolist()
                # Out of step: the kept state has seen other tokens, or more of them.
                moved = allowed(there, batch_of(grammar, output[:at], name="jumps"))
                assert moved.tolist() == step_by_step.tolist()
            if at < len(output):
                assert output[at] in step_by_step
        for at in sorted(cuts, reverse=True):
            again = allowed(there, batch_of(grammar, output[:at], name="jumps"))
            fresh = allowed(there, batch_of(grammar, output[:at], name=f"again-{at}"))
            assert again.tolist() == fresh.tolist()
        there.close()
    here.close()


def test_same_request_id_with_another_grammar(grammars: Grammars) -> None:
    first = Grammar(GrammarKind.REGEX, "ab")
    second = Grammar(GrammarKind.REGEX, "ac")
    assert allowed(grammars, batch_of(first, [97])).tolist() == [98]
    assert allowed(grammars, batch_of(second, [97])).tolist() == [99]


def test_end_of_sequence_exactly_where_the_grammar_accepts(grammars: Grammars) -> None:
    grammar = Grammar(GrammarKind.REGEX, "ab?c?")
    assert allowed(grammars, batch_of(grammar, [])).tolist() == [97]
    assert allowed(grammars, batch_of(grammar, [97])).tolist() == [98, 99, *TINY_EOS]
    assert allowed(grammars, batch_of(grammar, [97, 99])).tolist() == [*TINY_EOS]


@pytest.mark.parametrize(
    "settings", [{"ignore_eos": True}, {"min_tokens": 5}, {"min_tokens": 5, "ignore_eos": True}]
)
def test_a_withheld_end_comes_where_nothing_else_can(
    grammars: Grammars, settings: dict[str, int]
) -> None:
    grammar = Grammar(GrammarKind.REGEX, "ab?c?")
    params = SamplingParams(grammar=grammar, **settings)  # type: ignore[arg-type]
    assert allowed(grammars, batch_of(grammar, [97], params)).tolist() == [98, 99]
    assert allowed(grammars, batch_of(grammar, [97, 98], params)).tolist() == [99]
    assert allowed(grammars, batch_of(grammar, [97, 99], params)).tolist() == [*TINY_EOS]


def test_min_tokens_holds_back_other_stop_tokens_too(grammars: Grammars) -> None:
    grammar = Grammar(GrammarKind.REGEX, "[ab]+")
    params = SamplingParams(grammar=grammar, stop_token_ids=(98,), min_tokens=2)
    assert allowed(grammars, batch_of(grammar, [97], params)).tolist() == [97]
    assert allowed(grammars, batch_of(grammar, [97, 97], params)).tolist() == [97, 98, *TINY_EOS]


def test_special_and_padding_tokens_are_never_text(grammars: Grammars) -> None:
    grammar = Grammar(GrammarKind.REGEX, "(?s:.)*")
    ids = allowed(grammars, batch_of(grammar, []))
    assert set(ids) & {256, 258} == set()
    assert max(ids) == 259


def test_other_rows_and_bias_are_left_alone(grammars: Grammars) -> None:
    grammar = Grammar(GrammarKind.REGEX, "ab")
    batch = batch_of(grammar, [])
    batch.sampling = [SamplingParams(temperature=0, logit_bias=((122, 100.0),)), batch.sampling[0]]
    batch.sampling[1] = SamplingParams(temperature=0, logit_bias=((122, 100.0),), grammar=grammar)
    batch.stop_token_ids *= 2
    for field in ("sample_rows", "sample_positions", "num_outputs"):
        setattr(batch, field, np.zeros(2, dtype=np.int64))
    batch.grammars = {1: batch.grammars[0]}
    logits = torch.zeros(2, PADDED)
    assert grammars.restrict(logits, batch) == {}
    assert torch.isfinite(logits[0]).all()
    assert sample(logits, batch).tolist() == [122, 97]


def test_output_that_does_not_fit_is_an_error_of_its_row(grammars: Grammars) -> None:
    grammar = Grammar(GrammarKind.REGEX, "ab")
    logits = torch.zeros(1, PADDED)
    errors = grammars.restrict(logits, batch_of(grammar, [120]))
    assert list(errors) == [0]
    assert "state" not in errors[0]
    assert torch.isfinite(logits).all()
    # The grammar itself stays usable.
    assert allowed(grammars, batch_of(grammar, [97])).tolist() == [98]


def test_a_grammar_that_costs_too_much_ends_its_row(
    packaged: tuple[Path, PreTrainedTokenizerBase],
) -> None:
    """Every split of the output into words is a parse of its own."""
    folder, tokenizer = packaged
    vocab, eos, letter = len(tokenizer), (2,), tokenizer.convert_tokens_to_ids("a")
    grammars = Grammars(vocab, eos, functools.partial(load_tokenizer, folder, vocab, eos))
    ambiguous = Grammar(GrammarKind.EBNF, 'start: x\nx: x x | /[a-z]/ | ""')
    assert check(ambiguous) == ""
    for length in range(200):
        logits = torch.zeros(1, vocab)
        errors = grammars.restrict(logits, batch_of(ambiguous, [letter] * length, eos=eos))
        if errors:
            break
    assert "Too many items" in errors[0]
    assert "<" not in errors[0]
    grammar = Grammar(GrammarKind.REGEX, "a")
    assert allowed(grammars, batch_of(grammar, [], eos=eos), vocab).tolist() == [letter]
    grammars.close()


def test_states_are_bounded(grammars: Grammars) -> None:
    grammar = Grammar(GrammarKind.REGEX, "[ab]*")
    for index in range(MAX_STATES + 50):
        allowed(grammars, batch_of(grammar, [97], name=f"r{index}"))
    assert len(grammars._states) == MAX_STATES
    assert allowed(grammars, batch_of(grammar, [97, 98], name="r0")).tolist() == [97, 98, *TINY_EOS]


WRONG = {
    "not json": Grammar(GrammarKind.JSON_SCHEMA, "{"),
    "a list": Grammar(GrammarKind.JSON_SCHEMA, "[1]"),
    "unknown type": schema({"type": "foo"}),
    "unenforceable": schema({"not": {"type": "string"}}),
    "unsatisfiable": schema({"type": "string", "minLength": 5, "maxLength": 2}),
    "remote": schema({"$ref": "http://example.com/x"}),
    "regex": Grammar(GrammarKind.REGEX, "["),
    "look-ahead": Grammar(GrammarKind.REGEX, "a(?!b)"),
    "no choices": Grammar(GrammarKind.CHOICE, "[]"),
    "choices": Grammar(GrammarKind.CHOICE, "[1]"),
    "lark": Grammar(GrammarKind.EBNF, "start: nowhere"),
    "gbnf": Grammar(GrammarKind.EBNF, "root ::= ("),
    "long": Grammar(GrammarKind.REGEX, "a" * (MAX_SPEC_CHARS + 1)),
}


def prepared(grammars: Grammars, grammar: Grammar) -> str:
    answer: concurrent.futures.Future[str] = concurrent.futures.Future()
    grammars.prepare(grammar, answer.set_result)
    return answer.result(30)


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compiled_says_why(grammars: Grammars, name: str) -> None:
    reason = check(WRONG[name])
    assert reason
    assert len(reason) <= 1000
    assert prepared(grammars, WRONG[name])


@pytest.mark.parametrize("name", GRAMMARS)
def test_what_can_is_ready(grammars: Grammars, name: str) -> None:
    assert check(GRAMMARS[name]) == ""
    assert prepared(grammars, GRAMMARS[name]) == ""
    assert prepared(grammars, GRAMMARS[name]) == ""


def test_no_tokenizer_and_no_end(tmp_path: Path, tiny: llguidance.LLTokenizer) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    grammars = Grammars(
        PADDED, TINY_EOS, functools.partial(load_tokenizer, tmp_path, PADDED, TINY_EOS)
    )
    assert "tokenizer" in prepared(grammars, GRAMMARS["regex"])
    grammars.close()
    endless = Grammars(PADDED, (), lambda: tiny)
    assert "end-of-sequence" in prepared(endless, GRAMMARS["regex"])
    endless.close()
