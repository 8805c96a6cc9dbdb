"""What does the engine do on this GPU, and how far is that from what the GPU can do?

A model of a named shape with random weights (nothing is downloaded) runs in process: its
tokens are checked against transformers' own attention; then decodes, eager, as CUDA graphs,
and compiled under graphs, beside the time in which the GPU could read weights and KV; prefill
beside its matrix products; the attention kernel alone; copies of KV by the length of their
runs; and what the engine's loop adds to a step. A part that fails is reported, and the others
go on.

With ``--device cpu`` all of it runs on the CPU, kernels under Triton's interpreter: a check of
the bench itself, whose figures mean nothing.

    python -m bench.gpu [--shape NAME] [--device cuda|cpu] [--quick] [--json PATH] [--only PART ...]
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from bench.report import Target, finish, median, parser, print_table

MODES = ("eager", "graphs", "compiled")
PARTS = ("correctness", "attention", "copies", *MODES, "engine")
QUICK: dict[str, dict[str, Any]] = {
    "cuda": {"batches": (1, 32), "steps": 16, "prefill": 2048, "copied": 1 << 28},
    "cpu": {
        "batches": (1, 2),
        "context": 18,
        "prefill": 20,
        "steps": 4,
        "copied": 1 << 22,
        "max_num_seqs": 2,
    },
}
BATCH = 32
"""Decodes of the targets."""


def main(arguments: list[str] | None = None) -> int:
    options = parser("engine, kernels and copies on a GPU beside what it can do")
    options.add_argument("--shape", choices=("qwen3-0.6b", "llama-3.1-8b", "tiny"))
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    given = options.parse_args(arguments)
    if given.device == "cpu":
        # Read when Triton is imported, which is below.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from bench.gpu_model import Size

    if given.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU; --device cpu checks the bench itself", file=sys.stderr)
        return 2
    shape = given.shape or ("llama-3.1-8b" if given.device == "cuda" else "tiny")
    quick = given.quick or given.device == "cpu"
    size = Size(shape, given.device, **(QUICK[given.device] if quick else {}))
    result = run(size, given.only)
    show(result)
    return finish(result, targets(result, size), given.json)


def run(size: Any, only: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """Every part of ``only``; what fails is told under its name."""
    import torch

    from bench import gpu_kernels

    result: dict[str, Any] = {"size": dataclasses.asdict(size), "torch": torch.__version__}
    if size.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        result["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory

    def part(name: str, work: Callable[[], Any]) -> None:
        print(f"# {name}", file=sys.stderr, flush=True)
        try:
            result[name] = work()
        except Exception as error:
            traceback.print_exc()
            result[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        if size.device == "cuda":
            torch.cuda.empty_cache()

    part("copy_bytes_per_second", lambda: gpu_kernels.copy_bandwidth(size))
    part("matrix_flops", lambda: gpu_kernels.matrix_peak(size))
    bandwidth, peak = (
        one if isinstance(one, float) else float("nan")
        for one in (result["copy_bytes_per_second"], result["matrix_flops"])
    )
    if "correctness" in only:
        part("correctness", lambda: correctness(size))
    if "attention" in only:
        contexts = (1024, 4096) if size.device == "cuda" else (20,)
        rows = max(one for one in size.batches if one <= BATCH)
        part(
            "attention",
            lambda: [gpu_kernels.attention(size, rows, one, bandwidth) for one in contexts],
        )
    if "copies" in only:
        part("copies", lambda: gpu_kernels.copies(size))
    wanted = [mode for mode in MODES if mode in only]
    if not wanted and "engine" not in only:
        return result
    from bench.gpu_model import random_model

    model = random_model(size.shape, size.device, size.dtype)
    for mode in wanted:
        part(mode, functools.partial(speed, size, model, mode, bandwidth, peak))
        # Layers stay compiled, so that the loop is timed with the fastest steps.
    if "engine" in only:
        part("engine", lambda: engine_overhead(size, model))
    return result


def correctness(size: Any) -> list[dict[str, Any]]:
    """Tokens drawn in chunks and decodes, judged by the logits of transformers' own attention.

    ``gap`` is how far below the highest logit that of a drawn token is, relative to the spread
    of the logits: greedy draws are right where it is 0, or so small that rounding explains it.
    """
    import torch

    from bench.gpu_model import decode_steps, executor_of, prefill_step, random_model, settings
    from bench.gpu_model import run_steps as steps_of

    found = []
    layers = 4 if size.device == "cuda" else None
    for dtype in (torch.float32, torch.bfloat16) if size.device == "cuda" else (torch.float32,):
        model = random_model(size.shape, size.device, dtype, layers)
        vocab = model.config.vocab_size
        prompt = [(37 * i + 11) % vocab for i in range(size.context)]
        cut = size.context // 3
        with executor_of(model, settings(size, num_blocks=-(-size.context // 16) + 64)) as made:
            chunks = [prefill_step(prompt, 0, cut), prefill_step(prompt, cut, size.context - cut)]
            tokens = [int(one.tokens[0]) for one in steps_of(made, chunks)[0]]
            decodes = decode_steps(1, size.context + 1, size.steps, -(-size.context // 16) + 8)
            for batch in decodes[:1]:
                batch.token_ids[:] = tokens[-1]
            tokens[:1] = []
            tokens += [int(one.tokens[0]) for one in steps_of(made, decodes)[0]]
        model.config._attn_implementation = "sdpa"
        ids = torch.tensor([prompt + tokens[:-1]], device=size.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, size.context - 1 :].float()
        drawn = torch.tensor(tokens, device=size.device)
        gaps = logits.amax(-1) - logits.gather(1, drawn[:, None])[:, 0]
        relative = gaps / logits.std(-1)
        found.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": len(tokens),
                "same": int((gaps == 0).sum()),
                "largest_gap": float(relative.max()),
            }
        )
    return found


def speed(size: Any, model: Any, mode: str, bandwidth: float, peak: float) -> dict[str, Any]:
    """Decodes of every batch size and a prefill, run in one mode."""
    from bench.gpu_model import (
        decode_steps,
        executor_of,
        prefill_step,
        run_steps,
        settings,
        weight_bytes,
    )

    if size.device == "cpu":
        from instance.model.cuda import compiled

        compiled.BACKEND = "eager"
    config = settings(size, enforce_eager=mode == "eager", compile=mode == "compiled")
    result: dict[str, Any] = {"decode": []}
    weights = weight_bytes(model)
    with executor_of(model, config) as made:
        result["num_blocks"] = made.num_blocks
        shape = made.description
        of_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size.dtype.itemsize
        width = -(-(size.context + size.steps + 64) // 16)
        for rows in size.batches:
            if rows * width >= made.num_blocks:
                result["decode"].append({"rows": rows, "skipped": "the KV does not fit"})
                continue
            run_steps(made, decode_steps(rows, size.context, 2, width))
            batches = decode_steps(rows, size.context, size.steps + 1, width)
            told, times = run_steps(made, batches)
            seconds = (times[-1] - times[0]) / size.steps
            on_device = median(one.duration for one in told[1:])
            least = (weights + rows * size.context * of_token) / bandwidth
            result["decode"].append(
                {
                    "rows": rows,
                    "step_seconds": seconds,
                    "device_seconds": on_device,
                    "tokens_per_second": rows / seconds,
                    "share_of_roofline": least / seconds,
                }
            )
        prompt = [(37 * i + 11) % shape.vocab_size for i in range(size.prefill)]
        told, _ = run_steps(made, [prefill_step(prompt, 0, size.prefill) for _ in range(4)])
        seconds = median(one.duration for one in told[1:])
        matrices = sum(one.numel() for one in model.get_decoder().layers.parameters())
        heads = model.config.num_attention_heads
        scores = 2 * shape.num_layers * heads * shape.head_dim * size.prefill**2
        result["prefill"] = {
            "tokens": size.prefill,
            "seconds": seconds,
            "tokens_per_second": size.prefill / seconds,
            "share_of_matrix_peak": (2 * matrices * size.prefill + scores) / seconds / peak,
        }
    return result


def engine_overhead(size: Any, model: Any) -> dict[str, Any]:
    """The engine's own loop over decodes: how much of a step the device does not work."""
    from bench.gpu_model import executor_of, settings
    from instance.clock import RealClock
    from instance.engine import Engine
    from instance.request import Request, SamplingParams, Sequence

    rows = max(one for one in size.batches if one <= BATCH)
    prompt = min(size.context, size.prefill // 2)

    async def measure() -> dict[str, Any]:
        config = settings(size)
        with executor_of(model, config) as made:
            loop = asyncio.get_running_loop()
            over: asyncio.Future[None] = loop.create_future()
            left = rows

            def told(emissions: Any) -> None:
                nonlocal left
                left -= sum(bool(one.finish_reason) for one in emissions)
                if not left and not over.done():
                    over.set_result(None)

            def failed(error: BaseException) -> None:
                if not over.done():
                    over.set_exception(error)

            def post(call: Callable[[], None]) -> None:
                loop.call_soon_threadsafe(call)

            engine = Engine(made, config, RealClock(), post, told, failed)
            count = size.steps + 20
            for index in range(rows):
                tokens = tuple((37 * i + 11 * index) % 100 for i in range(prompt))
                params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
                engine.submit(Sequence.start(Request(f"r{index}", tokens, params)))
            # All decode once the last has been prefilled.
            while engine.scheduler.waiting or any(
                not one.num_output for one in engine.scheduler.running
            ):
                await asyncio.sleep(0.001)
                if over.done():
                    break
            steps, began = engine.steps, (engine.step_seconds_total, engine.model_seconds)
            await over
            ended = engine.step_seconds_total, engine.model_seconds
            whole, model_part = (after - before for before, after in zip(began, ended, strict=True))
            return {
                "rows": rows,
                "steps": engine.steps - steps,
                "step_seconds": whole / max(1, engine.steps - steps),
                "overhead": 1 - model_part / whole if whole else float("nan"),
            }

    return asyncio.run(measure())


def show(result: dict[str, Any]) -> None:
    """Tables for people."""
    head = ("mode", "rows", "ms a step", "of device", "tokens/s", "of roofline")
    rows = []
    for mode in MODES:
        for one in _part(result, mode).get("decode", ()):
            if "skipped" not in one:
                rows.append(
                    (
                        mode,
                        one["rows"],
                        1e3 * one["step_seconds"],
                        1e3 * one["device_seconds"],
                        one["tokens_per_second"],
                        one["share_of_roofline"],
                    )
                )
    print_table(head, rows)
    for mode in MODES:
        prefill = _part(result, mode).get("prefill")
        if prefill:
            print(
                f"prefill, {mode}: {prefill['tokens_per_second']:.0f} tokens/s, "
                f"{prefill['share_of_matrix_peak']:.0%} of the matrix peak"
            )


def targets(result: dict[str, Any], size: Any) -> list[Target]:
    """What must hold on a GPU; a figure that is missing does not hold."""
    nothing = float("nan")
    decode = [
        one["share_of_roofline"]
        for mode in MODES
        for one in _part(result, mode).get("decode", ())
        if one["rows"] == BATCH and "share_of_roofline" in one
    ]
    attention = result.get("attention")
    longest = attention[-1]["share_of_roofline"] if isinstance(attention, list) else nothing
    large = [
        min(row["out"], row["in"])
        for row in _part(result, "copies").get("share_of_plain_by_run", ())
        if row["run_bytes"] >= 1 << 20
    ]
    found = [
        Target("attention of its roofline", longest, 0.8, at_most=False),
        Target("copies of 1 MiB and more", min(large, default=nothing), 0.9, at_most=False),
        Target("engine overhead", _part(result, "engine").get("overhead", nothing), 0.05),
    ]
    if size.shape == "llama-3.1-8b":
        best = max(decode, default=nothing)
        found.insert(0, Target("decode at 32 of its roofline", best, 0.8, at_most=False))
    judged = result.get("correctness")
    gap = max(one["largest_gap"] for one in judged) if isinstance(judged, list) else nothing
    found.append(Target("largest gap of a drawn token", gap, 0.05))
    return found


def _part(result: dict[str, Any], name: str) -> dict[str, Any]:
    found = result.get(name)
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
