"""The kinds of workload there are, by name: from files, from published laws, or made up."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from cluster.flags import ConfigError, integer, number, string
from cluster.simulation.workloads import (
    block_traces,
    clients,
    dialogues,
    generators,
    jsonl,
    lengths,
    readers,
)
from cluster.simulation.workloads.arrivals import renewal
from cluster.simulation.workloads.generators import Conversation, Demand, ThinkTime
from cluster.simulation.workloads.records import WorkloadError, WorkloadRequest
from cluster.simulation.workloads.token_counting import count_tokens

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """What may stand behind a workload's name.

    Attributes:
        parse: Turns text into the value; raises ConfigError.
        default: Where it is not given.
        help: One line for people.
    """

    parse: Callable[[str], Any]
    default: Any
    help: str


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of workload.

    Attributes:
        help: One line for people.
        make: From (file or None, values of ``parameters``, seed) to requests by arrival.
        file: A file is wanted.
        parameters: Its own, by name.
    """

    help: str
    make: Callable[[Path, Values, int], list[WorkloadRequest]]
    file: bool
    parameters: Mapping[str, Parameter]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(number(1e-9)(part) for part in text.split(","))


ABOVE_ZERO = number(1e-9)
"""Parses a number that is more than nothing."""
_RATE = Parameter(ABOVE_ZERO, 1.0, "arrivals per second")
_CV = Parameter(ABOVE_ZERO, 1.0, "burstiness of arrivals; 1: Poisson, else Gamma intervals")
_REQUESTS = Parameter(integer(1), 10_000, "how many")
_THINK = {
    "think": Parameter(ABOVE_ZERO, 20.0, "median seconds between an answer and the next turn"),
    "think-p90": Parameter(ABOVE_ZERO, 80.0, "nine of ten of them are shorter"),
    "system": Parameter(integer(0), 0, "tokens of a system prompt that all sessions share"),
}

# ---- files


def _read(path: Path) -> bytes:
    """A file, gzip-compressed or not; raises WorkloadError if there is none."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WorkloadError(f"{path}: {reason}") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _text(content: bytes) -> io.TextIOBase:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="")


def _open_text(path: Path) -> io.TextIOBase:
    return _text(_read(path))


def _open_tar(path: Path) -> dict[str, str]:
    try:
        with tarfile.open(path) as archive:
            files = {}
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    files[member.name] = content.read().decode()
            return files
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise WorkloadError(f"{path}: {error}") from None


# ---- sources


def _mooncake(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    known: dict[int, tuple[str, int]] = {}
    if values["sessions"]:
        side = Path(values["sessions"])
        with _open_text(side) as lines:
            known = block_traces.mooncake_sessions(lines, str(side))
    with _open_text(path) as lines:
        return block_traces.mooncake(lines, str(path), seed, known, values["block"])


def _bailian(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    with _open_text(path) as lines:
        return block_traces.bailian(lines, str(path), seed, values["block"])


def _trace(columns: readers.TraceColumns) -> Source:
    def make(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
        with _open_text(path) as lines:
            return readers.trace(lines, str(path), columns)

    names = ", ".join(filter(None, (columns.arrival, columns.prompt, columns.output)))
    return Source(f"a CSV trace with columns {names}", make, True, {})


def _jsonl(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    with _open_text(path) as lines:
        return jsonl.read(lines, str(path))


def _clients(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    pool = clients.read_clients(_open_tar(path), str(path))
    return clients.client_requests(
        seed, pool, values["from"], values["seconds"], values["rate-factor"]
    )


def _lengths(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    with _open_text(path) as lines:
        table = np.array(readers.lengths(lines, str(path)))
    rng = np.random.default_rng(seed)
    chosen = table[rng.integers(0, len(table), values["requests"])]
    times = renewal(rng, values["rate"], values["cv"], len(chosen))
    return generators.single_requests(times.tolist(), chosen[:, 0].tolist(), chosen[:, 1].tolist())


def _percentiles(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    with _open_text(path) as file:
        try:
            table = json.load(file)
            levels = [float(one) / 100.0 for one in table["percentiles"]]
            prompt, output = (
                lengths.quantiles(levels, [float(v) for v in table[key]], float(mean))
                for key, mean in (("input", table["mean_input"]), ("output", table["mean_output"]))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise WorkloadError(f"{path}: no table of percentiles: {error!r}") from None
    return _independent(prompt, output, values, seed)


def _dialogues(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    content = _read(path)
    rounds: Sequence[Conversation]
    if content.lstrip()[:1] not in (b"[", b"{"):
        with _text(content) as lines:
            rounds = _picked(dialogues.rounds(lines, str(path)), values["sessions"], seed)
        return _sessions(rounds, values, seed)
    spoken = _picked(dialogues.texts(_entries(content, path), str(path)), values["sessions"], seed)
    words = [text for turns in spoken for turn in turns for text in turn]
    counts = iter([max(1, count) for count in count_tokens(words, values["tokenizer"])])
    rounds = [[(next(counts), next(counts)) for _ in turns] for turns in spoken]
    return _sessions(rounds, values, seed)


def _entries(content: bytes, path: Path) -> list[Any]:
    """A JSON list, or JSON lines."""
    try:
        if content.lstrip()[:1] == b"[":
            entries: list[Any] = orjson.loads(content)
            return entries
        return [orjson.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError as error:
        raise WorkloadError(f"{path}: not JSON: {error}") from None


T = TypeVar("T")


def _picked(found: Sequence[T], count: int, seed: int) -> Sequence[T]:
    """So many of them at random, in their order; 0: all."""
    if not count:
        return found
    rng = np.random.default_rng([seed, 1])
    return [found[index] for index in sorted(rng.permutation(len(found))[:count].tolist())]


def _sessions(
    conversations: Sequence[Conversation], values: Values, seed: int
) -> list[WorkloadRequest]:
    if values["think-p90"] < values["think"]:
        raise WorkloadError("think-p90 is less than think")
    think = ThinkTime(values["think"], values["think-p90"])
    return generators.sessions(
        seed, conversations, values["rate"], values["cv"], think, values["system"]
    )


def _synthetic_sessions(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    made = generators.conversations(
        seed,
        values["sessions"],
        values["turns"],
        _named(values["first"]),
        _named(values["message"]),
        _named(values["output"]),
    )
    return _sessions(made, values, seed)


def _independent(
    prompt: lengths.Lengths, output: lengths.Lengths, values: Values, seed: int
) -> list[WorkloadRequest]:
    return generators.independent(
        seed,
        lambda rng: renewal(rng, values["rate"], values["cv"], values["requests"]),
        prompt,
        output,
    )


def _named(text: str, cap: int = 6144) -> lengths.Lengths:
    """Lengths as a parameter writes them: 256, 100-500, s, m, l, or a data set's name."""
    if text in lengths.POWER_LAWS:
        mean, alpha = lengths.POWER_LAWS[text]
        return lengths.power_law(mean, alpha, cap)
    low, _, high = text.partition("-")
    try:
        if not high:
            return lengths.fixed(integer(1)(low))
        return lengths.uniform(integer(1)(low), integer(int(low))(high))
    except ConfigError:
        raise ConfigError(
            f"{text!r} is no length: a number, a range such as 100-500, or one of "
            f"{', '.join(lengths.POWER_LAWS)}"
        ) from None


def _length(text: str) -> str:
    _named(text)
    return text


def _power_laws(prompt: str, output: str) -> Source:
    def make(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
        cap = values["cap"]
        return _independent(_named(prompt, cap), _named(output, cap), values, seed)

    names = {"s": "short", "m": "medium", "l": "long"}
    return Source(
        f"Llumnix's {names[prompt]} prompts and {names[output]} outputs (power laws)",
        make,
        False,
        {
            "rate": _RATE,
            "cv": _CV,
            "requests": _REQUESTS,
            "cap": Parameter(integer(1), 6144, "longest prompt, and longest output"),
        },
    )


def _data_set(name: str) -> Source:
    def make(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
        return _independent(*lengths.DATASETS[name], values, seed)

    return Source(
        f"prompts and outputs with the quantiles that Llumnix's authors found in {name}",
        make,
        False,
        {"rate": _RATE, "cv": _CV, "requests": _REQUESTS},
    )


def _fixed(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
    return _independent(_named(values["prompt"]), _named(values["output"]), values, seed)


_PHASES: dict[str, tuple[str, str]] = {
    "tenants-overloaded": ("1.5,3", "steady demand of tenants, by default more than one GPU bears"),
    "tenants-on-off": ("1.5,3", "the first tenant pauses now and then, the others never do"),
    "tenants-proportional": ("0.25,0.5,1.5", "demands that differ; the least asks little"),
    "tenants-ramp": ("1,0.5", "the last tenant's demand grows to --ramp times itself"),
}


def _tenants(pattern: str) -> Source:
    rates, text = _PHASES[pattern]

    def make(path: Path, values: Values, seed: int) -> list[WorkloadRequest]:
        demands = []
        given = values["rates"]
        for index, rate in enumerate(given):
            pauses = pattern == "tenants-on-off" and index == 0
            grows = pattern == "tenants-ramp" and index == len(given) - 1
            demands.append(
                Demand(
                    f"tenant-{index + 1}",
                    rate,
                    _named(values["prompt"]),
                    _named(values["output"]),
                    last_rate=rate * values["ramp"] if grows else None,
                    cv=values["cv"],
                    on=values["on"] if pauses else 0.0,
                    off=values["off"] if pauses else 0.0,
                )
            )
        return generators.tenants(seed, demands, values["seconds"])

    parameters = {
        "rates": Parameter(_numbers, _numbers(rates), "each tenant's requests per second"),
        "seconds": Parameter(ABOVE_ZERO, 600.0, "how long they ask"),
        "prompt": Parameter(_length, "256", "prompt tokens: 256, 100-500, s, m or l"),
        "output": Parameter(_length, "256", "output tokens, likewise"),
        "cv": _CV,
        "on": Parameter(ABOVE_ZERO, 60.0, "seconds of demand at a stretch"),
        "off": Parameter(ABOVE_ZERO, 60.0, "seconds of pause"),
        "ramp": Parameter(ABOVE_ZERO, 8.0, "growth of the rate"),
    }
    if pattern != "tenants-on-off":
        del parameters["on"], parameters["off"]
    if pattern != "tenants-ramp":
        del parameters["ramp"]
    return Source(text, make, False, parameters)


SOURCES: dict[str, Source] = {
    "drover": Source("JSON lines as `drover` itself writes them", _jsonl, True, {}),
    "mooncake": Source(
        "a Mooncake trace: JSON lines with hash_ids",
        _mooncake,
        True,
        {
            "sessions": Parameter(string, "", "CSV file of the rows' inferred sessions"),
            "block": Parameter(integer(1), block_traces.MOONCAKE_BLOCK, "tokens of a hash id"),
        },
    ),
    "bailian": Source(
        "a trace of Alibaba's Bailian: JSON lines with chat_id, parent_chat_id and hash_ids",
        _bailian,
        True,
        {"block": Parameter(integer(1), block_traces.BAILIAN_BLOCK, "tokens of a hash id")},
    ),
    **{name: _trace(columns) for name, columns in readers.TRACES.items()},
    "servegen-clients": Source(
        "requests drawn from a tar archive of ServeGen's client statistics",
        _clients,
        True,
        {
            "from": Parameter(number(0.0), 0.0, "second of the day at which to begin"),
            "seconds": Parameter(ABOVE_ZERO, 1800.0, "how long"),
            "rate-factor": Parameter(ABOVE_ZERO, 1.0, "multiplies every client's rate"),
        },
    ),
    "sharegpt": Source(
        "sessions from conversations: ShareGPT's JSON, or a CSV table of their rounds",
        _dialogues,
        True,
        {
            "tokenizer": Parameter(string, "smollm2", "of this model; counts the tokens of texts"),
            "sessions": Parameter(integer(0), 0, "how many, at random; 0: all"),
            "rate": Parameter(ABOVE_ZERO, 1.0, "sessions that begin per second"),
            "cv": _CV,
            **_THINK,
        },
    ),
    "lengths": Source(
        "lengths drawn from a CSV table without times",
        _lengths,
        True,
        {"rate": _RATE, "cv": _CV, "requests": _REQUESTS},
    ),
    "percentiles": Source(
        "lengths from a JSON table of percentiles",
        _percentiles,
        True,
        {"rate": _RATE, "cv": _CV, "requests": _REQUESTS},
    ),
    **{f"llumnix-{a}-{b}": _power_laws(a, b) for a in "sml" for b in "sml"},
    **{f"llumnix-{name}": _data_set(name) for name in lengths.DATASETS},
    "fixed": Source(
        "requests of given lengths",
        _fixed,
        False,
        {
            "rate": _RATE,
            "cv": _CV,
            "requests": _REQUESTS,
            "prompt": Parameter(_length, "256", "prompt tokens: 256, 100-500, s, m or l"),
            "output": Parameter(_length, "128", "output tokens, likewise"),
        },
    ),
    "sessions": Source(
        "conversations of several turns",
        _synthetic_sessions,
        False,
        {
            "sessions": Parameter(integer(1), 1000, "how many"),
            "rate": Parameter(ABOVE_ZERO, 1.0, "sessions that begin per second"),
            "cv": _CV,
            "turns": Parameter(number(1.0), 5.5, "turns of a session in the mean"),
            "first": Parameter(_length, "m", "tokens of the first message: 256, 100-500, s, m, l"),
            "message": Parameter(_length, "10-200", "tokens of the later ones, likewise"),
            "output": Parameter(_length, "m", "output tokens, likewise"),
            **_THINK,
        },
    ),
    **{pattern: _tenants(pattern) for pattern in _PHASES},
}
