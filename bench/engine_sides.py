"""One side of ``bench.engine_throughput``, in a process of its own.

    python -m bench.engine_sides SIDE WORKLOADS.json RESULTS.json

The first file holds ``{"folder", "threads", "workloads"}``, the other gets ``{"version",
"results"}`` with one result for each workload, in order. Every request yields its number of
tokens, whatever the model would end with.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 32
"""Requests of a padded batch."""
CONTINUOUS = {
    "continuous_large": {"page_size": 256, "num_blocks": 96, "max_batch_tokens": 1024},
    "continuous_medium": {"page_size": 256, "num_blocks": 96, "max_batch_tokens": 256},
    "continuous_small_pages": {
        "page_size": 32,
        "num_blocks": 640,
        "max_batch_tokens": 512,
        "allow_block_sharing": False,
    },
}
"""Settings of transformers' continuous batching; its defaults are meant for a GPU's memory."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all there at the start, in the order of their arrival.

    Attributes:
        name: What it is called in the results.
        prompts: Token ids of each request.
        outputs: Tokens to generate for each.
        temperature, top_p: How they are drawn; 0 is greedy.
    """

    name: str
    prompts: list[list[int]]
    outputs: list[int]
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def tokens(self) -> int:
        return sum(self.outputs)


def warm_up(workload: Workload) -> Workload:
    """A short run of the same shapes."""
    return Workload("warm-up", workload.prompts, [min(4, count) for count in workload.outputs])


class DroverSide:
    """The engine with its executor, in process, on an event loop as in a server."""

    def __init__(self, folder: str, threads: int) -> None:
        from instance.config import EngineConfig, SchedulerConfig
        from instance.model.runner import TorchExecutor

        self._config = EngineConfig(
            model=folder,
            dtype="bfloat16",
            num_blocks=4096,
            num_threads=threads,
            scheduler=SchedulerConfig(enable_prefix_caching=False),
        )
        self._executor = TorchExecutor(self._config)

    def run(self, workload: Workload) -> dict[str, Any]:
        return asyncio.run(self._run(workload))

    async def _run(self, workload: Workload) -> dict[str, Any]:
        from instance.clock import RealClock
        from instance.engine import Engine
        from instance.request import Request, SamplingParams, Sequence
        from instance.scheduler import Emission

        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        left = len(workload.prompts)
        made = 0

        def post(call: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(call)

        def stepped(emissions: list[Emission]) -> None:
            nonlocal left, made
            for emission in emissions:
                made += len(emission.tokens)
                left -= bool(emission.finish_reason)
            if left == 0:
                finished.set_result(None)

        engine = Engine(
            self._executor,
            self._config,
            RealClock(),
            post,
            stepped,
            finished.set_exception,
        )
        began = time.perf_counter()
        for index, (prompt, count) in enumerate(
            zip(workload.prompts, workload.outputs, strict=True)
        ):
            params = SamplingParams(
                temperature=workload.temperature,
                top_p=workload.top_p,
                seed=index,
                max_tokens=count,
                ignore_eos=True,
            )
            engine.submit(Sequence.start(Request(f"r{index}", tuple(prompt), params)))
        await finished
        seconds = time.perf_counter() - began
        if made != workload.tokens:
            raise RuntimeError(f"{made} tokens instead of {workload.tokens}")
        return {
            "seconds": seconds,
            "steps": engine.steps,
            "outside_model": 1 - engine.model_seconds / seconds,
        }


class PaddedSide:
    """transformers' ``generate`` on left-padded batches, each as long as its longest."""

    def __init__(self, folder: str, cache: str | None) -> None:
        self._model = _transformers_model(folder, "sdpa")
        self._cache = cache

    def run(self, workload: Workload) -> dict[str, Any]:
        import torch

        began = time.perf_counter()
        for first in range(0, len(workload.prompts), BATCH):
            prompts = workload.prompts[first : first + BATCH]
            longest = max(map(len, prompts))
            count = max(workload.outputs[first : first + BATCH])
            ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            out = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                cache_implementation=self._cache,
                disable_compile=True,
                pad_token_id=0,
            )
            if out.shape[1] != longest + count:
                raise RuntimeError(f"{out.shape[1] - longest} tokens instead of {count}")
        return {"seconds": time.perf_counter() - began}


class ContinuousSide:
    """transformers' continuous batching with paged attention."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._model = _transformers_model(folder, "sdpa")
        self._settings = ContinuousBatchingConfig(**settings, max_requests_per_batch=64)
        self._generation = GenerationConfig(
            do_sample=False, max_new_tokens=4096, eos_token_id=-1, pad_token_id=0
        )

    def run(self, workload: Workload) -> dict[str, Any]:
        # Not in inference mode: the manager's own thread cannot write to its tensors.
        with self._model.continuous_batching_context_manager(
            generation_config=self._generation,
            continuous_batching_config=self._settings,
            warmup=False,
        ) as manager:
            began = time.perf_counter()
            for prompt, count in zip(workload.prompts, workload.outputs, strict=True):
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
            made = 0
            for _ in workload.prompts:
                result = manager.get_result()
                while result is None:
                    if not manager.is_running():
                        raise RuntimeError("continuous batching stopped")
                    result = manager.get_result(timeout=1)
                if result.error:
                    raise RuntimeError(result.error)
                made += len(result.generated_tokens)
            seconds = time.perf_counter() - began
        if made != workload.tokens:
            raise RuntimeError(f"{made} tokens instead of {workload.tokens}")
        return {"seconds": seconds}


def _transformers_model(folder: str, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention, local_files_only=True
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def make_side(name: str, folder: str, threads: int) -> Callable[[Workload], dict[str, Any]]:
    """What runs a workload on a side and answers with ``seconds`` at least.

    Raises:
        KeyError: if there is no such side.
    """
    if name == "drover":
        return DroverSide(folder, threads).run
    if name in ("padded_dynamic", "padded_static"):
        return PaddedSide(folder, "static" if name == "padded_static" else None).run
    return ContinuousSide(folder, CONTINUOUS[name]).run


def _version(side: str) -> str:
    return "" if side == "drover" else importlib.metadata.version("transformers")


def main() -> int:
    """Run every workload once, after a warm-up of each."""
    name, path, answer = sys.argv[1:]
    task = json.loads(Path(path).read_text())
    os.environ["OMP_NUM_THREADS"] = str(task["threads"])
    import torch

    torch.set_num_threads(task["threads"])
    run = make_side(name, task["folder"], task["threads"])
    results = []
    for one in task["workloads"]:
        workload = Workload(**one)
        run(warm_up(workload))
        results.append({"workload": workload.name, **run(workload)})
    Path(answer).write_text(json.dumps({"version": _version(name), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
