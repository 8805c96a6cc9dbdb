"""Settings of a cluster: the one place where flags, environment and file keys are declared.

Every field of :class:`ServeConfig` is a ``--flag``, a ``DROVER_FLAG`` environment variable
and a key of ``--config FILE.yaml``; precedence in this order, then the default. Names are
vLLM's where the meaning is the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.load import LoadConfig
from cluster.dispatcher.placement import POLICIES
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.dispatcher.roles import RolesConfig
from cluster.dispatcher.scaling import ScalingConfig, instance_name
from cluster.flags import (
    ConfigError,
    identifier,
    integer,
    number,
    one_of,
    redis_address,
    setting,
    size,
    string,
    switch,
)
from cluster.gateway.config import GatewayConfig
from cluster.names import ClusterRef
from cluster.tenant_file import load_tenants
from cluster.values import existing_folder, placement_policy, role_count, theta, tpot_target
from instance.config import (
    EngineConfig,
    MigrationConfig,
    PreemptionMode,
    SchedulerConfig,
    SwapConfig,
    SwapMode,
)
from instance.load import Role
from instance.request import RequestClass

MIB, GIB = 1 << 20, 1 << 30


MODEL_SETTINGS = "model and memory"
"""Heading of the flags that say what an instance is."""


_MODEL, _HTTP, _CLUSTER = MODEL_SETTINGS, "HTTP", "cluster"
_SCHEDULING = "scheduling"
_POLICY, _MIGRATION, _SECRETS = "placement and rebalancing", "migration", "keys"


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Every setting of ``drover serve``. The help text of each flag says what it means."""

    model: str = setting(
        "smollm2",
        string,
        "MODEL",
        _MODEL,
        "local folder, hub id or packaged model name",
        positional=True,
    )
    served_model_name: str = setting(
        "", string, "NAME", _MODEL, "name under which clients know the model (default: MODEL)"
    )
    dtype: str = setting(
        "auto",
        one_of("auto", "float32", "bfloat16", "float16", "float64"),
        "TYPE",
        _MODEL,
        "type of weights and KV cache: auto, float32, bfloat16, float16 or float64",
    )
    device: str = setting(
        "auto",
        one_of("auto", "cpu", "cuda"),
        "DEVICE",
        _MODEL,
        "cpu, cuda (one GPU per instance), or auto: cuda where every instance gets a GPU",
    )
    threads: int = setting(1, integer(1, 1024), "N", _MODEL, "compute threads of an instance")
    max_model_len: int = setting(
        8192,
        integer(1),
        "TOKENS",
        _MODEL,
        "prompt and output tokens of a request at most; never more than the model takes",
    )
    max_num_seqs: int = setting(
        64, integer(1), "N", _MODEL, "sequences in an instance's batch at most"
    )
    max_num_batched_tokens: int = setting(
        512, integer(1), "TOKENS", _MODEL, "tokens that one step computes at most"
    )
    block_size: int = setting(16, integer(1, 4096), "TOKENS", _MODEL, "tokens per KV block")
    kv_cache_memory_bytes: int = setting(
        GIB, size, "BYTES", _MODEL, "KV cache of an instance on the CPU, such as 512M or 4GiB"
    )
    gpu_memory_utilization: float = setting(
        0.9,
        number(0.01, 1.0),
        "SHARE",
        _MODEL,
        "share of a GPU's memory that an instance takes; what weights and steps leave is KV cache",
    )
    num_gpu_blocks_override: int = setting(
        0,
        integer(0),
        "N",
        _MODEL,
        "KV blocks of an instance, on any device; 0: as many as the memory given holds",
    )
    enforce_eager: bool = setting(
        False, switch, "", _MODEL, "on a GPU, launch steps piece by piece instead of as CUDA graphs"
    )
    compile: bool = setting(
        False, switch, "", _MODEL, "on a GPU, compile the model's layers (takes a minute at start)"
    )
    enable_prefix_caching: bool = setting(
        True, switch, "", _MODEL, "reuse KV blocks of equal prefixes"
    )
    swap_space: float = setting(
        1.0,
        number(0.0),
        "GIB",
        _MODEL,
        "host memory of an instance to which KV of preempted requests goes; 0: none",
    )
    preemption_mode: str = setting(
        "auto",
        one_of(*PreemptionMode),
        "MODE",
        _MODEL,
        "KV of a preempted request: swap, recompute, or auto: whichever is measured to be cheaper",
    )
    swap_mode: str = setting(
        "auto",
        one_of(*SwapMode),
        "MODE",
        _MODEL,
        "steps wait for swaps: sync, async (never), or auto: where that is measured to be cheaper",
    )
    swap_reuse: bool = setting(
        True, switch, "", _MODEL, "keep copies in host memory for the next swap or turn"
    )
    tpot_target_ms: tuple[tuple[RequestClass | None, float], ...] = setting(
        (),
        tpot_target,
        "MS",
        _SCHEDULING,
        "milliseconds per output token within which prompts may share steps: MS, CLASS=MS, "
        "auto or off; may be given several times (default: auto, 3.5 times a step without prompts, "
        "1.3 times beside prompts of a less urgent class)",
        many=True,
    )
    fairness_theta: float | None = setting(
        None,
        theta,
        "SERVICE",
        _SCHEDULING,
        "how far a tenant must be ahead of another, in weighted tokens, before its requests "
        "are preempted for the other's (default: auto, twice what a swap costs)",
    )
    priority_interval: int = setting(
        8, integer(1), "STEPS", _SCHEDULING, "steps between two looks at the tenants' service"
    )
    tenants: str = setting(
        "", string, "FILE", _SCHEDULING, "file of tenants' weights, classes and queue limits"
    )
    run_ahead: int = setting(
        1,
        integer(-1),
        "N",
        _SCHEDULING,
        "requests that may wait at an instance, for a batch slot or, at one instance of 16, for "
        "memory, while the rest waits in the order of tenants' service; -1: any number",
    )
    max_queued_requests: int = setting(
        4096,
        integer(0),
        "N",
        _SCHEDULING,
        "requests of a class and those above it that wait for an instance; more are refused",
    )
    host: str = setting("127.0.0.1", string, "ADDRESS", _HTTP, "address that the gateways bind")
    port: int = setting(8000, integer(0, 65535), "PORT", _HTTP, "TCP port; 0 picks a free one")
    gateways: int = setting(
        1, integer(1, 256), "N", _HTTP, "gateway processes, which share the port"
    )
    max_request_bytes: int = setting(
        4 * MIB, size, "BYTES", _HTTP, "body of an HTTP request at most"
    )
    request_timeout: float = setting(
        0.0, number(0.0), "SECONDS", _HTTP, "time that a request may take; 0: any"
    )
    drain_grace: float = setting(
        5.0,
        number(0.0),
        "SECONDS",
        _HTTP,
        "time that running requests get to end when the cluster stops",
    )
    api_key: tuple[str, ...] = setting(
        (),
        string,
        "KEY",
        _SECRETS,
        "key that clients must send; may be given several times (default: none is needed)",
        many=True,
    )
    api_keys: str = setting(
        "", string, "FILE", _SECRETS, "file of hashed client keys and their tenants"
    )
    admin_key: str = setting(
        "", string, "KEY", _SECRETS, "key of the admin API (default: a random one)"
    )
    cluster_token: str = setting(
        "",
        string,
        "TOKEN",
        _SECRETS,
        "secret by which gateways and instances know each other (default: a random one)",
    )
    instances: int = setting(2, integer(1, 1024), "N", _CLUSTER, "model replicas")
    roles: tuple[tuple[str, int], ...] = setting(
        (),
        role_count,
        "ROLE=N",
        _CLUSTER,
        "first instances that only compute prompts (prefill=N) or only what follows (decode=N); "
        "may be given several times; the others do both",
        many=True,
    )
    change_roles: bool = setting(
        False,
        switch,
        "on|off",
        _CLUSTER,
        "let instances with a role change it as the load shifts between prompts and outputs",
    )
    role_ttft: float = setting(
        2.0, number(1e-3), "SECONDS", _CLUSTER, "with --change-roles: time to first token wanted"
    )
    role_tpot: float = setting(
        0.1, number(1e-4), "SECONDS", _CLUSTER, "with --change-roles: time per output token wanted"
    )
    min_instances: int = setting(
        1, integer(1, 1024), "N", _CLUSTER, "with --max-instances: replicas at least"
    )
    max_instances: int = setting(
        0,
        integer(0, 1024),
        "N",
        _CLUSTER,
        "replicas at most, started and stopped as the load asks for; 0: always --instances",
    )
    scale_up_threshold: float = setting(
        10.0,
        number(-1e9, 1e9),
        "BLOCKS",
        _CLUSTER,
        "free KV blocks per request of the whole cluster below which a replica is added",
    )
    scale_down_threshold: float = setting(
        60.0,
        number(-1e9, 1e9),
        "BLOCKS",
        _CLUSTER,
        "free KV blocks per request above which one is emptied and stopped",
    )
    scaling_period: float = setting(
        10.0, number(0.0), "SECONDS", _CLUSTER, "time for which that must last"
    )
    scaling_cooldown: float = setting(
        30.0, number(0.0), "SECONDS", _CLUSTER, "time between two changes of the replicas"
    )
    scale_out_timeout: float = setting(
        60.0,
        number(1.0),
        "SECONDS",
        _CLUSTER,
        "time that Ray gets to find a machine for an added replica; longer where machines are "
        "added on demand",
    )
    address: str = setting(
        "",
        string,
        "HOST:PORT",
        _CLUSTER,
        "join the Ray cluster there, or 'auto' (default: start one on this machine)",
    )
    cluster_name: str = setting(
        "default", identifier, "NAME", _CLUSTER, "tells clusters within one Ray cluster apart"
    )
    instance_host: str = setting(
        "",
        string,
        "ADDRESS",
        _CLUSTER,
        "address that instances bind (default: 127.0.0.1, or the node's with --address)",
    )
    startup_timeout: float = setting(
        1800.0, number(1.0), "SECONDS", _CLUSTER, "time that instances get to load the model"
    )
    report_interval: float = setting(
        0.5, number(0.02, 60.0), "SECONDS", _CLUSTER, "time between an instance's load reports"
    )
    heartbeat: float = setting(
        1.0,
        number(0.05, 60.0),
        "SECONDS",
        _CLUSTER,
        "time between an instance's messages to a gateway about the requests it holds",
    )
    grace: float = setting(
        10.0,
        number(0.1, 3600.0),
        "SECONDS",
        _CLUSTER,
        "time after which a silent instance or gateway counts as dead",
    )
    redis_url: str = setting(
        "",
        redis_address,
        "URL",
        _CLUSTER,
        "Redis that keeps what the dispatcher knows, such as redis://host:6379/0 "
        "(default: memory only)",
    )
    placement: str = setting(
        "freeness",
        placement_policy,
        "POLICY",
        _POLICY,
        f"which instance a request goes to: {', '.join(POLICIES)}, or FILE.py:FUNCTION",
    )
    policy_dir: str = setting(
        "",
        existing_folder,
        "FOLDER",
        _POLICY,
        "folder of placement policies that the admin API may load (default: it loads no file)",
    )
    rebalance: bool = setting(
        True, switch, "on|off", _POLICY, "move running requests to balance load"
    )
    rebalance_interval: float = setting(
        1.0, number(0.05, 3600.0), "SECONDS", _POLICY, "time between rounds of rebalancing"
    )
    headroom_blocks: int = setting(
        0,
        integer(0),
        "N",
        _POLICY,
        "KV blocks that others leave beside interactive requests while they have room elsewhere",
    )
    migration_tail_blocks: int = setting(
        2,
        integer(1),
        "N",
        _MIGRATION,
        "KV blocks at most that move while the request is out of the batch",
    )
    migration_max_concurrent: int = setting(
        4, integer(1), "N", _MIGRATION, "migrations at a time, from and to an instance each"
    )
    migration_bandwidth: int = setting(
        256 * MIB,
        size,
        "BYTES",
        _MIGRATION,
        "bytes per second that an instance sends beside decoding; 0: unlimited",
    )

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max-num-batched-tokens ({self.max_num_batched_tokens}) is less than "
                f"max-num-seqs ({self.max_num_seqs}): a step could not serve its batch"
            )
        if sum(count for _, count in self.roles) > self.instances:
            raise ConfigError(f"roles are given to more than {self.instances} instances")
        if self.max_instances and not (self.min_instances <= self.instances <= self.max_instances):
            raise ConfigError(
                f"instances ({self.instances}) is not between min-instances "
                f"({self.min_instances}) and max-instances ({self.max_instances})"
            )
        if not self.scale_up_threshold < self.scale_down_threshold:
            raise ConfigError(
                f"scale-up-threshold ({self.scale_up_threshold:g}) is not less than "
                f"scale-down-threshold ({self.scale_down_threshold:g})"
            )
        if self.kv_cache_memory_bytes < MIB and not self.num_gpu_blocks_override:
            raise ConfigError("kv-cache-memory-bytes is less than 1M")

    @property
    def instance_roles(self) -> tuple[tuple[str, Role], ...]:
        """The roles by instance id, of those that have one."""
        roles = [Role(role) for role, count in self.roles for _ in range(count)]
        return tuple((instance_name(number), role) for number, role in enumerate(roles))

    @property
    def ref(self) -> ClusterRef:
        """Where the cluster's actors are found."""
        name = self.cluster_name
        return ClusterRef(namespace="drover" if name == "default" else f"drover-{name}")

    @property
    def tpot_targets(self) -> tuple[float, ...]:
        """Seconds per output token by class; 0 where it is derived."""
        given = dict(self.tpot_target_ms)
        return tuple(given.get(one, given.get(None, 0.0)) for one in RequestClass)

    def engine(self, device: str) -> EngineConfig:
        """Settings of an instance on ``device`` ("cpu" or "cuda")."""
        return EngineConfig(
            model=self.model,
            served_model_name=self.served_model_name,
            dtype=self.dtype,
            device=device,
            block_size=self.block_size,
            num_blocks=self.num_gpu_blocks_override,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=self.enforce_eager,
            compile=self.compile,
            num_threads=self.threads,
            heartbeat=self.heartbeat,
            report_interval=self.report_interval,
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                enable_prefix_caching=self.enable_prefix_caching,
                theta=self.fairness_theta,
                priority_interval=self.priority_interval,
                tpot_targets=self.tpot_targets,
            ),
            swap=SwapConfig(
                space_bytes=int(self.swap_space * GIB),
                mode=SwapMode(self.swap_mode),
                preemption=PreemptionMode(self.preemption_mode),
                reuse=self.swap_reuse,
            ),
            migration=MigrationConfig(
                tail_blocks=self.migration_tail_blocks,
                max_concurrent=self.migration_max_concurrent,
                grace=self.grace,
                max_bytes_per_second=float(self.migration_bandwidth),
            ),
        )

    def dispatcher(self) -> DispatcherConfig:
        """Settings of the dispatcher.

        Raises:
            ConfigError: the file of tenants cannot be used.
        """
        tenants = load_tenants(self.tenants)
        return DispatcherConfig(
            placement=self.placement,
            requests=RequestConfig(
                run_ahead=None if self.run_ahead < 0 else self.run_ahead,
                max_queued=self.max_queued_requests,
                tenants=tenants.tenants,
                default_tenant=tenants.default,
            ),
            load=LoadConfig(
                report_interval=self.report_interval,
                gone_after=max(self.grace, 4 * self.report_interval),
                headroom_blocks=self.headroom_blocks,
            ),
            rebalance=RebalanceConfig(enabled=self.rebalance, interval=self.rebalance_interval),
            scaling=ScalingConfig(
                min_instances=self.min_instances,
                max_instances=self.max_instances,
                low=self.scale_up_threshold,
                high=self.scale_down_threshold,
                period=self.scaling_period,
                cooldown=self.scaling_cooldown,
                start_timeout=self.startup_timeout,
            ),
            roles=self.instance_roles,
            role_changes=RolesConfig(self.change_roles, self.role_ttft, self.role_tpot),
        )

    def gateway(self, gateway_id: str, max_model_len: int) -> GatewayConfig:
        """Settings of one gateway; ``max_model_len`` is what the started instances take."""
        return GatewayConfig(
            gateway_id=gateway_id,
            host=self.host,
            port=self.port,
            model=self.model,
            served_model_name=self.served_model_name,
            max_model_len=max_model_len,
            token=self.cluster_token,
            admin_key=self.admin_key,
            api_keys_file=self.api_keys or None,
            api_key_hashes=tuple(hashlib.sha256(key.encode()).hexdigest() for key in self.api_key),
            dispatcher=self.ref.dispatcher,
            namespace=self.ref.namespace,
            max_request_bytes=self.max_request_bytes,
            request_timeout=self.request_timeout,
            grace=self.grace,
            drain_grace=self.drain_grace,
        )
