"""An engine whose requests have grammars: valid output, exact replay, nobody waits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from instance.model import grammar as grammar_module
from instance.request import FinishReason, Grammar, GrammarKind, Request, SamplingParams, Sequence
from instance.scheduler import Emission
from tests.integration.models import make_tiny_model
from tests.integration.running import Running, start_engine

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"id": {"type": "integer", "maximum": 999}, "ok": {"type": "boolean"}},
        "required": ["id", "ok"],
        "additionalProperties": False,
    },
    "minItems": 3,
    "maxItems": 5,
}
LIST = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
EOS = (257, 259)

Start = Callable[..., Running]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama")


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[Start]:
    started: list[Running] = []

    def make(**settings: Any) -> Running:
        started.append(start_engine(folder, **settings))
        return started[-1]

    yield make
    for running in started:
        running.close()


def submit(running: Running, name: str, emitted: tuple[int, ...] = (), **settings: Any) -> Sequence:
    settings = {"grammar": LIST, "max_tokens": 900, "seed": 5, **settings}
    running.wanted += 1
    running.finished.clear()
    sequence = Sequence.start(
        Request(name, (65, 66, 67), SamplingParams(**settings)),
        emitted=emitted,
        eos_token_ids=EOS,
    )
    running.tokens[name] = list(emitted)
    running.engine.submit(sequence)
    return sequence


def text(sequence: Sequence) -> str:
    assert sequence.finish_reason is FinishReason.STOP, sequence.error
    assert sequence.output[-1] in EOS
    return bytes(sequence.output[:-1]).decode()


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_output_is_valid_and_ends(start: Start, ignore_eos: bool) -> None:
    running = start()
    sequences = [
        submit(running, f"r{seed}", seed=seed, temperature=0.9, ignore_eos=ignore_eos)
        for seed in range(6)
    ]
    free = submit(running, "free", grammar=None, max_tokens=30, temperature=0)
    await running.done()
    for sequence in sequences:
        jsonschema.validate(json.loads(text(sequence)), SCHEMA)
    assert free.finish_reason is FinishReason.LENGTH


async def test_replay_from_any_token_gives_the_same(start: Start) -> None:
    running = start()
    whole = submit(running, "whole", temperature=0.8)
    await running.done()
    output = whole.output
    for at in (1, len(output) // 3, len(output) - 1):
        replay = submit(running, f"from-{at}", tuple(output[:at]), temperature=0.8)
        await running.done()
        assert replay.output == output


async def test_preemption_changes_nothing(start: Start) -> None:
    running = start()
    alone = []
    for seed in range(3):
        sequence = submit(running, f"alone-{seed}", seed=seed, max_tokens=120)
        await running.done()
        alone.append(sequence.output)
    # The pool holds about one of the three.
    tight = start(num_blocks=40)
    crowded = [submit(tight, f"r{seed}", seed=seed, max_tokens=120) for seed in range(3)]
    await tight.done()
    assert sum(sequence.num_preemptions for sequence in crowded) > 0
    assert [sequence.output for sequence in crowded] == alone


async def test_others_do_not_wait_for_a_compilation(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    release, compiling = threading.Event(), threading.Event()
    definition = grammar_module.definition

    def slow(grammar: Grammar) -> str:
        compiling.set()
        assert release.wait(60)
        return definition(grammar)

    monkeypatch.setattr(grammar_module, "definition", slow)
    held = submit(running, "held")
    dropped = submit(running, "dropped", grammar=Grammar(GrammarKind.REGEX, "a+"))
    submit(running, "free", grammar=None, max_tokens=40)
    try:
        while running.engine.scheduler.sequences.keys() & {"free"}:
            await asyncio.sleep(0.001)
        assert compiling.is_set()
        assert held.held
        assert not held.num_computed
        running.engine.abort("dropped")
        running.wanted -= 1
    finally:
        release.set()
    await running.done()
    jsonschema.validate(json.loads(text(held)), SCHEMA)
    assert dropped.output == []


async def test_a_bad_grammar_ends_its_request_with_the_reason(start: Start) -> None:
    running = start()
    told: list[Emission] = []
    listener = running.engine._on_step

    def listen(emissions: list[Emission]) -> None:
        told.extend(emissions)
        listener(emissions)

    running.engine._on_step = listen
    bad = submit(running, "bad", grammar=Grammar(GrammarKind.REGEX, "["))
    good = submit(running, "good")
    await running.done()
    assert (bad.finish_reason, bad.output) == (FinishReason.ERROR, [])
    assert "regex" in bad.error
    assert [one for one in told if one.sequence is bad] == [
        Emission(bad, 0, (), FinishReason.ERROR)
    ]
    jsonschema.validate(json.loads(text(good)), SCHEMA)


async def test_an_output_that_fits_no_longer_is_an_error_of_its_own(start: Start) -> None:
    running = start()
    astray = submit(running, "astray", emitted=(120, 121))
    good = submit(running, "good")
    await running.done()
    assert astray.finish_reason is FinishReason.ERROR
    assert astray.error
    jsonschema.validate(json.loads(text(good)), SCHEMA)


async def test_a_handover_while_held_is_prepared_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    ready: list[Callable[[str], None]] = []
    monkeypatch.setattr(running.executor, "prepare", lambda _, done: ready.append(done))
    sequence = submit(running, "moves")
    detached: list[bool] = []
    running.engine.detach(sequence, detached.append)
    while not detached:
        await asyncio.sleep(0)
    assert detached == [True]
    ready.pop()("")
    await asyncio.sleep(0.01)
    assert sequence.held  # not here any more, as far as it knows
    running.engine.put_back(sequence)
    monkeypatch.undo()
    running.executor.prepare(LIST, ready.pop())
    await running.done()
    jsonschema.validate(json.loads(text(sequence)), SCHEMA)
