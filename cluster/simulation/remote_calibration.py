"""Measures a cluster that runs, through its API: what a client sees of steps."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from cluster.admin_client import AdminClient
from cluster.replay.client import Answer, CompletionClient, ServerError
from cluster.simulation.calibration import CalibrationError
from cluster.simulation.mixed_load import Limits, with_mixed_load
from cluster.simulation.profile import CostProfile
from cluster.simulation.profile_check import Check, check_fit
from cluster.simulation.profile_fit import (
    StepSample,
    fit_with_overhead,
    predict_step,
    without_overhead,
)
from cluster.simulation.workloads.records import token_ids
from instance.budget import attended
from instance.executor import ModelDescription

_MODEL = TypeAdapter(ModelDescription)
_TIMES = 5
"""Of each number of streams; the median counts."""
_OUTPUT = 24
"""Output tokens of the streams that measure decoding; more where prompts take long."""
_LONGEST_PROMPT = 512
"""Longer prompts take several steps, at a length that does not show from outside."""


@dataclass(frozen=True, slots=True)
class Member:
    """What the admin API tells of an instance that is ready."""

    model: ModelDescription
    total_blocks: int
    max_num_seqs: int


def members(answer: Any) -> list[Member]:
    """The ready instances of an answer of ``/admin/instances``.

    Raises:
        CalibrationError: if there is none, or they differ.
    """
    try:
        found = [
            Member(
                _MODEL.validate_python(entry["model"]),
                int(entry["total_blocks"]),
                int(entry["max_num_seqs"]),
            )
            for entry in answer["instances"]
            if entry["state"] == "ready"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"/admin/instances was not understood: {error!r}") from None
    if not found:
        raise CalibrationError("no instance is ready")
    if len(set(found)) > 1:
        raise CalibrationError("the instances differ: a profile is of one kind")
    return found


def calibrate_cluster(
    url: str,
    admin_key: str | None,
    client_key: str,
    name: str | None,
    quick: bool,
    like: CostProfile,
    progress: Callable[[str], None],
) -> tuple[CostProfile, list[Check]]:
    """Fit a profile to what clients see of an idle cluster of equal instances.

    The time to the first token, over prompt lengths, and the time between tokens, over
    numbers of streams: all instances do the same at once, so that steps take as long as they
    do where instances share a machine. Then a mixed load is sent, and simulated with what was
    fitted: how far the two are apart, request by request, is how steps scatter, and on the
    whole by how much requests that meet delay each other. What shows from inside only is taken
    from ``like``.

    Raises:
        CalibrationError: if something cannot be measured.
        CommandError: if the admin API refuses.
    """
    admin = AdminClient.find(url, admin_key)
    found = members(admin.call("GET", "/admin/instances"))
    try:
        labels, steps, firsts = asyncio.run(_measure(url, client_key, found, quick, progress))
        step, overhead = fit_with_overhead(steps, firsts)
    except (ServerError, ValueError) as error:
        raise CalibrationError(str(error)) from None
    samples = [*steps, *without_overhead(firsts, overhead)]
    checks = check_fit(labels, samples, predict_step)
    one = found[0]
    where = f"drover calibrate --url, {len(found)} instances of {one.model.name}"
    profile = CostProfile(
        name=name or one.model.name,
        model=one.model,
        step=step,
        copy_out=like.copy_out,
        copy_in=like.copy_in,
        link=like.link,
        num_blocks=one.total_blocks,
        num_host_blocks=like.num_host_blocks,
        overhead=overhead,
        sources={
            "step": f"{where}; times to the first and between tokens, {len(samples)} shapes",
            "copy_out": f"not measured: as in {like.name}",
            "copy_in": f"not measured: as in {like.name}",
            "link": f"not measured: as in {like.name}",
            "num_blocks": "the cluster's admin API",
            "num_host_blocks": f"not measured: as in {like.name}",
            "overhead": f"{where}; times to the first token, less a step each",
        },
    )
    limits = Limits(len(found), one.max_num_seqs)
    made, mixed = with_mixed_load(url, client_key, profile, limits, quick, progress)
    told = f"{where}; a mixed load, beside its simulation"
    sources = {**profile.sources, "contention": told, "scatter": told}
    return dataclasses.replace(made, sources=sources), [*checks, *mixed]


async def _measure(
    url: str,
    key: str,
    found: Sequence[Member],
    quick: bool,
    progress: Callable[[str], None],
) -> tuple[list[str], list[StepSample], list[StepSample]]:
    """What was measured: steps, and times to first tokens."""
    one, repeats = found[0], 5 if quick else 9
    longest = min(one.model.max_model_len, one.total_blocks * one.model.block_size)
    async with CompletionClient(url, key) as client:
        model, context = await client.model()
        longest = min(longest, context or longest)
        source = _Prompts(await client.vocabulary(model))
        streams = sorted({1, 2, 4, 8, *((1, 4) if quick else (16, one.max_num_seqs // 2))})
        streams = [count for count in streams if 0 < count <= one.max_num_seqs]
        contexts = [16, 256] if quick else [16, 128, 512, 1024]
        room = one.total_blocks * one.model.block_size

        async def decoded_at(start: int, count: int) -> tuple[float, float] | None:
            most = min(longest, room // count) - start
            return await _decoding(client, model, source, start, count, len(found), most)

        # What a cluster does first is slow, and does not count.
        await decoded_at(contexts[0], streams[-1])
        labels, samples = [], []
        for start in contexts:
            for count in streams:
                decoded = await decoded_at(start, count)
                if decoded is None:
                    continue
                gap, middle = decoded
                labels.append(f"{count} x decode at {start}")
                samples.append(StepSample(0, 0, count, round(count * middle), gap))
                progress(f"{labels[-1]}: {1000 * gap:.2f} ms")
        if not samples:
            raise CalibrationError("no streams that the cluster takes decode at the same time")
        # A step that reads a prompt does not show alone: what a request takes besides is part.
        firsts = []
        for length in (2, 8, 16, 32, 64, 128, 192, 256, 384, 512):
            if length <= min(_LONGEST_PROMPT, longest - 2):
                first = await _first_token(client, model, source, length, repeats, len(found))
                labels.append(f"prefill of {length}")
                firsts.append(StepSample(length, attended(0, length), 0, 0, first))
                progress(f"first token after {length}: {1000 * first:.2f} ms")
    return labels, samples, firsts


class _Prompts:
    """Prompts with nothing in common, so that no prefix cache shortens their prefill."""

    def __init__(self, vocabulary: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._made = 0

    def make(self, length: int) -> list[int]:
        self._made += 1
        return token_ids(f"calibration {self._made}", length, self._vocabulary)


async def _first_token(
    client: CompletionClient,
    model: str,
    prompts: _Prompts,
    length: int,
    repeats: int,
    instances: int,
) -> float:
    """Median seconds to the first token of one request on each instance; some go before."""
    times = []
    for turn in range(repeats + 1):
        answers = [Answer(0.0) for _ in range(instances)]
        await asyncio.gather(
            *(
                client.complete(answer, model, prompts.make(length), 2, temperature=0.0)
                for answer in answers
            )
        )
        if not all(answer.arrivals for answer in answers):
            raise CalibrationError("an answer had no text")
        if turn:
            times += [answer.arrivals[0] - answer.sent for answer in answers]
    return statistics.median(times)


async def _decoding(
    client: CompletionClient,
    model: str,
    prompts: _Prompts,
    length: int,
    count: int,
    instances: int,
    most: int,
) -> tuple[float, float] | None:
    """While ``count`` streams decode on each instance: between tokens, and where.

    The first streams must last until the last one's prompt is read: they are made longer until
    they do, up to ``most`` output tokens.

    Returns:
        Median seconds between tokens, over several times, and the mean position of these tokens;
        None where streams of that length do not decode at the same time.
    """
    found: list[tuple[float, float]] = []
    output = _OUTPUT
    while output <= most and len(found) < _TIMES:
        answers = [Answer(0.0) for _ in range(count * instances)]
        await asyncio.gather(
            *(
                client.complete(answer, model, prompts.make(length), output, temperature=0.0)
                for answer in answers
            )
        )
        # Only while all decode: not beside the prefill of some, nor after the end of others.
        began = max((answer.arrivals[0] for answer in answers if answer.arrivals), default=0.0)
        ended = min((answer.arrivals[-1] for answer in answers if answer.arrivals), default=0.0)
        parts = [part for one in answers for part in _shared(one.arrivals, began, ended)]
        if parts and min(last - first for first, _, last, _ in parts) >= _OUTPUT // 2:
            gaps = [(until - since) / (last - first) for first, since, last, until in parts]
            middle = statistics.fmean((first + last) / 2 for first, _, last, _ in parts)
            found.append((statistics.median(gaps), length + middle))
        else:
            output *= 2
    return sorted(found)[len(found) // 2] if found else None


def _shared(
    arrivals: Sequence[float], began: float, ended: float
) -> list[tuple[int, float, int, float]]:
    """The first and the last event between two instants, with their numbers; none where
    there are fewer than two."""
    inside = [(index, at) for index, at in enumerate(arrivals) if began <= at <= ended]
    return [(*inside[0], *inside[-1])] if len(inside) > 1 else []
