"""How long do answers stall while long prompts are read?

Sarathi-Serve's experiment (OSDI '24): some requests decode, and long prompts arrive. Chunked
prefill under the adaptive budget is compared with prefill first (see ``bench.stall_runs``),
in turns: with a real model on the CPU, on one thread, and with the steps of a 7B model on an
A10, by its cost profile, on a virtual clock.

TBT, the time between two tokens of those who read, is told in undisturbed steps: the median
while no long prompt is read, over both sides of a round. (Before the first long prompt they would
be shorter: contexts grow.)

    python -m bench.stall_free [--quick] [--json PATH] [--rounds N] [--model NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.report import Target, finish, median, parser, print_table
from bench.stall_runs import CHUNKED, PREFILL_FIRST, SIDES, Clients, Load, run_modelled, run_real
from cluster.simulation.profile_files import load_profile
from instance.config import EngineConfig, SchedulerConfig

PROFILE = "llama-7b-a10"
ON_CPU = Load(8, 32, 320, 10, 1024, 8, 30, 28)
ON_CPU_QUICK = Load(4, 16, 48, 2, 384, 4, 16, 16)
ON_A10 = Load(16, 128, 300, 6, 1024, 16, 30, 45)
FIGURES = ("tbt_p50", "tbt_p99", "tbt_max", "ttft", "seconds", "tokens_per_second")


def rounds(place: str, run: Callable[[str], Clients], number: int) -> list[dict[str, Any]]:
    """Both sides, in turns, so many times."""
    rows = []
    for count in range(number):
        # Each side comes first at times.
        order = SIDES if count % 2 == 0 else SIDES[::-1]
        ended = {side: run(side) for side in order}
        alone = median(clients.undisturbed() for clients in ended.values())
        for side in SIDES:
            figures = ended[side].figures(alone)
            rows.append({"place": place, "side": side, "round": count, **figures})
            print(f"{place} round {count} {side:14} {figures['seconds']:.2f} s", file=sys.stderr)
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    from instance.model.runner import TorchExecutor

    load = ON_CPU_QUICK if options.quick else ON_CPU
    profile = load_profile(PROFILE)
    rows = rounds("A10, modelled", lambda side: run_modelled(profile, ON_A10, side), 1)
    executor = TorchExecutor(
        EngineConfig(
            model=options.model,
            num_blocks=2 + load.kv_tokens // 8,
            scheduler=SchedulerConfig(max_model_len=load.context),
        )
    )
    try:
        for side in SIDES:
            run_real(executor, ON_CPU_QUICK, side)  # a warm-up
        number = 1 if options.quick else options.rounds
        rows += rounds("CPU", lambda side: run_real(executor, load, side), number)
    finally:
        executor.close()
    return {"model": options.model, "profile": PROFILE, "rows": rows}


def summary(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Medians over the rounds, by place and side."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = row["place"], row["side"]
        runs = [one for one in rows if (one["place"], one["side"]) == key]
        found[key] = {name: median(one[name] for one in runs) for name in ("alone", *FIGURES)}
    return found


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The verdict on each place."""
    found = summary(rows)
    made = []
    for place in dict.fromkeys(row["place"] for row in rows):
        ours, theirs = found[place, CHUNKED], found[place, PREFILL_FIRST]
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        made.append(Target(f"{place}, P99 TBT in undisturbed steps", ours["tbt_p99"], 5.0))
        made.append(Target(f"{place}, tokens/s over prefill first", ratio, 0.9, at_most=False))
    return made


def main() -> int:
    """Run the experiment, print its result, answer with the verdict."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=3, help="of both sides, on the CPU")
    arguments.add_argument("--model", default="smollm2")
    options = arguments.parse_args()
    result = run(options)
    print_table(
        (
            *("place", "side", "step ms", "TBT p50", "TBT p99", "TBT max"),
            *("TTFT s", "seconds", "tokens/s"),
        ),
        [
            (place, side, 1000 * row["alone"], *(row[name] for name in FIGURES))
            for (place, side), row in summary(result["rows"]).items()
        ],
    )  # fmt: skip
    return finish(result, targets(result["rows"]), options.json)


if __name__ == "__main__":
    sys.exit(main())
