"""Every series of ``/metrics``, declared once: name, kind, labels and meaning.

A new series is a line in ``SERIES`` and a row in ``docs/metrics.md`` (a test holds the two
together). Where its values come from is its ``source``:

* ``gateway``: observed by each gateway (``cluster/gateway/metrics.py``);
* ``view``: gauges that a gateway reads from the dispatcher's view of the instances;
* ``dispatcher``: ``Figure`` objects of ``cluster/dispatcher/figures.py``;
* ``instance``: ``Figure`` objects of ``instance/figures.py``, which travel in load reports.

Names are vLLM's where a dashboard or gateway of the field looks for them. Labels take few
values: never a request, a client's address or a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from instance.kv.figures import LOST_BOUNDS, RUN_BOUNDS

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["gateway", "view", "dispatcher", "instance"]


@dataclass(frozen=True, slots=True)
class Series:
    """A declared series.

    Attributes:
        name: As Prometheus shows it; a counter's ends in ``_total``.
        labels: Label names, in the order in which a ``Figure`` gives their values. Those of
            the source ``instance`` begin with ``INSTANCE``, which the gateway fills in.
        buckets: Upper bounds of a histogram, ascending, without the infinite one.
    """

    name: str
    kind: Kind
    source: Source
    labels: tuple[str, ...]
    text: str
    buckets: tuple[float, ...] = ()


GATEWAY = ("gateway",)
MODEL = ("gateway", "model_name")
INSTANCE = ("model_name", "engine")

# vLLM's bounds, so that its dashboards fit.
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
WHOLE = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
SIZES = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
PAUSES = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
)  # fmt: skip

SERIES = (
    # ---- requests, as their gateway sees them
    Series("vllm:time_to_first_token_seconds", "histogram", "gateway", MODEL,
           "From the arrival of a request to its first token.", FIRST_TOKEN),
    Series("vllm:inter_token_latency_seconds", "histogram", "gateway", MODEL,
           "Between one delivery of tokens and the next of the same request.", BETWEEN_TOKENS),
    Series("vllm:request_time_per_output_token_seconds", "histogram", "gateway", MODEL,
           "Mean time per output token after the first, by request.", BETWEEN_TOKENS),
    Series("vllm:e2e_request_latency_seconds", "histogram", "gateway", MODEL,
           "From the arrival of a request to its end.", WHOLE),
    Series("vllm:request_prompt_tokens", "histogram", "gateway", MODEL,
           "Prompt tokens of a request.", SIZES),
    Series("vllm:request_generation_tokens", "histogram", "gateway", MODEL,
           "Output tokens of a request.", SIZES),
    Series("vllm:prompt_tokens_total", "counter", "gateway", MODEL,
           "Prompt tokens of ended requests."),
    Series("vllm:generation_tokens_total", "counter", "gateway", MODEL, "Output tokens."),
    Series("vllm:prefix_cache_queries_total", "counter", "gateway", MODEL,
           "Prompt tokens looked up in the prefix cache, counted when a request ends."),
    Series("vllm:prefix_cache_hits_total", "counter", "gateway", MODEL,
           "Those of them whose KV was there."),
    Series("vllm:request_success_total", "counter", "gateway", (*MODEL, "finished_reason"),
           "Requests ended with a result, by why they ended: stop, length or abort."),
    Series("drover_requests_total", "counter", "gateway", (*GATEWAY, "outcome"),
           "Requests ended: stop, length, abort, error, or cancelled (the client went away)."),
    Series("drover_requests_active", "gauge", "gateway", GATEWAY,
           "Requests of this gateway placed, waiting or running."),
    Series("drover_request_migrations_total", "counter", "gateway", GATEWAY,
           "Live migrations of this gateway's requests."),
    Series("drover_request_replays_total", "counter", "gateway", GATEWAY,
           "Requests of this gateway begun anew after an instance was lost."),
    Series("drover_migration_pause_seconds", "histogram", "gateway", GATEWAY,
           "From the last delivery by the source of a migration to the first by its destination.",
           PAUSES),
    Series("drover_replay_stall_seconds", "histogram", "gateway", GATEWAY,
           "From the loss of a request's instance to the next token.", WHOLE),
    Series("drover_client_disconnects_total", "counter", "gateway", GATEWAY,
           "Clients gone before their answer was complete."),
    Series("drover_http_requests_total", "counter", "gateway",
           (*GATEWAY, "method", "route", "status"), "HTTP requests by route and status."),
    Series("drover_dispatcher_up", "gauge", "gateway", GATEWAY,
           "1 while the dispatcher answers this gateway; without it figures of the dispatcher "
           "and of the instances are the last ones known."),
    # ---- instances, as the dispatcher sees them
    Series("drover_instances", "gauge", "view", ("state",),
           "Instances: ready, suspect or draining."),
    Series("vllm:num_requests_running", "gauge", "view", INSTANCE, "Requests in the batch."),
    Series("vllm:num_requests_waiting", "gauge", "view", INSTANCE,
           "Requests waiting for the batch."),
    Series("vllm:kv_cache_usage_perc", "gauge", "view", INSTANCE,
           "KV blocks used or promised; 1 is all."),
    Series("vllm:cache_config_info", "gauge", "view",
           (*INSTANCE, "block_size", "num_gpu_blocks", "cache_dtype"),
           "The KV cache of an instance; always 1."),
    Series("drover_instance_free_blocks", "gauge", "view", INSTANCE, "KV blocks free or cached."),
    Series("drover_instance_freeness", "gauge", "view", INSTANCE,
           "Free KV blocks per running request."),
    Series("drover_instance_step_seconds", "gauge", "view", INSTANCE,
           "Median duration of a step."),
    # ---- what instances count
    Series("drover_instance_steps_total", "counter", "instance", INSTANCE,
           "Steps of the engine."),
    Series("vllm:num_preemptions_total", "counter", "instance", INSTANCE,
           "Sequences that lost their place in the batch."),
    Series("drover_preemptions_total", "counter", "instance", (*INSTANCE, "reason"),
           "The same by reason: overflow (memory), priority (class) or fairness (tenant)."),
    Series("drover_preemption_seconds", "histogram", "instance", INSTANCE,
           "From a preemption to the next step with the sequence.", LOST_BOUNDS),
    Series("drover_prefill_pauses_total", "counter", "instance", INSTANCE,
           "Running prefills made to stand still for a tenant further behind."),
    Series("drover_prefills_paused", "gauge", "instance", INSTANCE,
           "Prefills that stand still now."),
    Series("drover_preemption_threshold", "gauge", "instance", INSTANCE,
           "Service by weight that a tenant must be behind to preempt another (theta)."),
    Series("drover_prefill_budget_tokens", "gauge", "instance", INSTANCE,
           "Prefill tokens that the last step with prefill could hold beside its decodes."),
    Series("drover_swapped_sequences_total", "counter", "instance", (*INSTANCE, "direction"),
           "Sequences whose KV began to leave for host memory (out) or to return (in)."),
    Series("drover_swapped_blocks_total", "counter", "instance", (*INSTANCE, "direction"),
           "KV blocks copied to host memory (out) and back (in)."),
    Series("drover_swapped_bytes_total", "counter", "instance", (*INSTANCE, "direction"),
           "The same in bytes."),
    Series("drover_swap_copies_total", "counter", "instance", (*INSTANCE, "direction"),
           "Contiguous pieces they were copied in."),
    Series("drover_swap_copy_seconds_total", "counter", "instance", (*INSTANCE, "direction"),
           "Time that these copies took."),
    Series("drover_swap_run_blocks", "histogram", "instance", INSTANCE,
           "Length of the pieces in blocks.", tuple(map(float, RUN_BOUNDS))),
    Series("drover_swap_failures_total", "counter", "instance", INSTANCE,
           "Copies that went wrong; their sequences are computed again."),
    Series("drover_swap_kept_blocks_total", "counter", "instance", INSTANCE,
           "Blocks of sequences that left which had a valid copy already."),
    Series("drover_swap_hit_blocks_total", "counter", "instance", INSTANCE,
           "Blocks read back from copies that other sequences or turns had left."),
    Series("drover_swap_saved_blocks_total", "counter", "instance", INSTANCE,
           "Blocks copied to host memory before anybody had to wait for it."),
    Series("drover_swap_dropped_blocks_total", "counter", "instance", INSTANCE,
           "Copies of running sequences given up for lack of host memory."),
    Series("drover_swap_stalls_total", "counter", "instance", INSTANCE,
           "Steps held back until a copy ended."),
    Series("drover_swap_stall_seconds_total", "counter", "instance", INSTANCE,
           "Time they were late."),
    Series("drover_swap_decisions_total", "counter", "instance", (*INSTANCE, "choice", "reason"),
           "Swap, recompute or wait, and why."),
    Series("drover_host_blocks", "gauge", "instance", INSTANCE,
           "KV blocks that fit into host memory."),
    Series("drover_host_blocks_used", "gauge", "instance", INSTANCE,
           "Those that hold a copy."),
    # ---- the dispatcher's decisions
    Series("drover_dispatcher_start_time_seconds", "gauge", "dispatcher", (),
           "When the dispatcher started, in Unix time; counters of the dispatcher begin there."),
    Series("drover_held_requests", "gauge", "dispatcher", (),
           "Requests that wait in the dispatcher for an instance."),
    Series("drover_placements_total", "counter", "dispatcher", ("kind",),
           "Answers to gateways: new, replayed, repeated (asked again) or held first."),
    Series("drover_refusals_total", "counter", "dispatcher", ("status",),
           "Requests that the dispatcher refused, by HTTP status, or abandoned by their gateway."),
    Series("drover_load_reports_total", "counter", "dispatcher", ("outcome",),
           "Load reports: accepted, stale or unknown."),
    Series("drover_membership_changes_total", "counter", "dispatcher", ("change",),
           "Instances that joined, restarted, were known already, or left."),
    Series("drover_charges_total", "counter", "dispatcher", ("outcome",),
           "Placements that no report confirmed in time: expired."),
    Series("drover_migrations_started_total", "counter", "dispatcher", ("reason",),
           "Migrations begun, by why."),
    Series("drover_migrations_total", "counter", "dispatcher", ("reason", "outcome"),
           "Migrations ended, by why they began and how they ended: moved, or what kept the "
           "request."),
    Series("drover_migrated_bytes_total", "counter", "dispatcher", ("reason",),
           "KV bytes sent by migrations that ended."),
    Series("drover_scaling_total", "counter", "dispatcher", ("event",),
           "Steps of scaling: an instance wanted, started or failed to start; leaving, kept "
           "after all, or stopped."),
    Series("drover_role_changes_total", "counter", "dispatcher", ("change",),
           "Roles of instances that the load changed: to_prefill or to_decode."),
    Series("drover_policy_fallbacks_total", "counter", "dispatcher", ("reason",),
           "Placements that a policy of the user's did not make: raised, late, rests (it was "
           "late a moment ago) or nonsense."),
    Series("drover_migrations_in_flight", "gauge", "dispatcher", (), "Migrations under way."),
    # ---- fairness
    Series("drover_fairness_gap", "gauge", "dispatcher", ("class",),
           "Greatest less least service by weight among the tenants that wait in a class."),
    Series("drover_fairness_bound", "gauge", "dispatcher", ("class",),
           "What the gap may not exceed (G)."),
    Series("drover_fairness_waiting_tenants", "gauge", "dispatcher", ("class",),
           "Tenants that wait in a class."),
    Series("drover_tenant_service_total", "counter", "dispatcher", ("tenant",),
           "Service charged to a tenant: prompt tokens not cached, and twice the output's; tenants "
           "beyond the first hundred are one, other."),
    Series("drover_system_tokens_total", "counter", "dispatcher", (),
           "Tokens computed again, which no tenant pays for."),
    Series("drover_lease_reports_total", "counter", "dispatcher", (),
           "Reports sent at once since a tenant's lease was used up."),
    # ---- the dispatcher's store
    Series("drover_store_up", "gauge", "dispatcher", (),
           "1 if the last write to Redis succeeded or nothing had to be written; "
           "absent without --redis-url."),
    Series("drover_store_writes_total", "counter", "dispatcher", ("outcome",),
           "Writes of the dispatcher's state to Redis: ok, failed or superseded (a newer state "
           "was there)."),
    Series("drover_store_lag_seconds", "gauge", "dispatcher", (),
           "Age of the oldest change that Redis does not have; 0 if it has all."),
)  # fmt: skip

CATALOGUE = {series.name: series for series in SERIES}
"""The declared series by name."""
