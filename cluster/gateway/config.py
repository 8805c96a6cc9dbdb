"""Settings of one gateway."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Everything a gateway is started with.

    Attributes:
        gateway_id: Name of the gateway, unique in the cluster.
        host: Address that it binds.
        port: TCP port; shared by all gateways of a machine where ``reuse_port``.
        model: Model whose tokenizer and chat template are used, as the instances name it.
        served_model_name: Name under which clients know the model; "" means ``model``.
        max_model_len: Prompt and output tokens of a request at most.
        token: Cluster token: authorises calls to instances.
        admin_key: Key of ``/admin/``; "" closes it.
        api_keys_file: File of hashed keys and their tenants; None where there is none.
        api_key_hashes: SHA-256 hex digests of further keys, of the tenant "default". Any
            client is served where there is neither a file nor a hash.
        dispatcher: Name of the dispatcher actor.
        namespace: Ray namespace of the cluster's actors.
        reuse_port: Bind with SO_REUSEPORT, so that several gateways share the port.
        max_request_bytes: Body of an HTTP request at most.
        request_timeout: Seconds that a request may take in all; 0 is unlimited.
        connect_timeout: Seconds to reach an instance.
        grace: Seconds after which an instance that is gone counts as dead.
        drain_grace: Seconds that running requests get to end when the gateway stops.
    """

    gateway_id: str
    host: str = "127.0.0.1"
    port: int = 8000
    model: str = "smollm2"
    served_model_name: str = ""
    max_model_len: int = 8192
    token: str = ""
    admin_key: str = ""
    api_keys_file: str | None = None
    api_key_hashes: tuple[str, ...] = ()
    dispatcher: str = "drover-dispatcher"
    namespace: str = "drover"
    reuse_port: bool = True
    max_request_bytes: int = 4 << 20
    request_timeout: float = 0.0
    connect_timeout: float = 2.0
    grace: float = 10.0
    drain_grace: float = 5.0
