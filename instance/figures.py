"""What an instance counts of itself, for ``/metrics``.

Names and labels are those declared in ``cluster/metrics.py`` with the source "instance",
without the labels that name the instance.
"""

from __future__ import annotations

from instance.engine import Engine
from instance.kv.figures import SwapFigures
from instance.load import Figure
from instance.priority import PreemptionReason
from instance.scheduler import Scheduler


def figures(engine: Engine) -> tuple[Figure, ...]:
    """The figures of an engine at this moment."""
    scheduler = engine.scheduler
    swap = scheduler.swap
    return (
        Figure("drover_instance_steps_total", engine.steps),
        *_planned(scheduler),
        *(() if swap is None else _swapped(swap.snapshot())),
    )


def _planned(scheduler: Scheduler) -> list[Figure]:
    counted = scheduler.figures
    return [
        Figure("vllm:num_preemptions_total", counted.preemptions.total()),
        *(
            Figure("drover_preemptions_total", counted.preemptions[reason], (reason.value,))
            for reason in PreemptionReason
        ),
        Figure("drover_prefill_pauses_total", counted.pauses),
        Figure("drover_prefills_paused", counted.paused),
        Figure("drover_preemption_threshold", scheduler.priorities.theta),
        Figure("drover_prefill_budget_tokens", scheduler.budget.prefill),
    ]


def _swapped(swap: SwapFigures) -> list[Figure]:
    directions = (
        ("out", swap.out, swap.blocks_out, swap.bytes_out, swap.runs_out, swap.seconds_out),
        ("in", swap.back, swap.blocks_in, swap.bytes_in, swap.runs_in, swap.seconds_in),
    )
    found = []
    for way, sequences, blocks, size, copies, seconds in directions:
        found += [
            Figure("drover_swapped_sequences_total", sequences, (way,)),
            Figure("drover_swapped_blocks_total", blocks, (way,)),
            Figure("drover_swapped_bytes_total", size, (way,)),
            Figure("drover_swap_copies_total", copies, (way,)),
            Figure("drover_swap_copy_seconds_total", seconds, (way,)),
        ]
    run_blocks = float(swap.blocks_out + swap.blocks_in)
    return [
        *found,
        Figure("drover_swap_run_blocks", run_blocks, (), tuple(swap.run_lengths)),
        Figure("drover_swap_failures_total", swap.failed),
        Figure("drover_swap_kept_blocks_total", swap.kept_blocks),
        Figure("drover_swap_hit_blocks_total", swap.hit_blocks),
        Figure("drover_swap_saved_blocks_total", swap.saved_blocks),
        Figure("drover_swap_dropped_blocks_total", swap.dropped_blocks),
        Figure("drover_swap_stalls_total", swap.stalls),
        Figure("drover_swap_stall_seconds_total", swap.stall_seconds),
        *(
            Figure("drover_swap_decisions_total", number, decision)
            for decision, number in swap.decisions.items()
        ),
        Figure("drover_preemption_seconds", swap.lost_seconds, (), tuple(swap.lost)),
        Figure("drover_host_blocks", swap.host_blocks),
        Figure("drover_host_blocks_used", swap.host_used),
    ]
