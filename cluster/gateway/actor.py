"""The gateway as an actor: a thread with an event loop around router and HTTP server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from cluster.gateway.auth import ApiKeys
from cluster.gateway.config import GatewayConfig
from cluster.gateway.dispatching import DispatcherClient
from cluster.gateway.router import Router
from cluster.gateway.server import GatewayServer
from cluster.gateway.tokenizer import ModelTokenizer
from cluster.names import ClusterRef
from instance.heap import freeze_heap
from instance.model.resolve import resolve_model

T = TypeVar("T")
logger = logging.getLogger(__name__)

DISPATCHER_TIMEOUT = 8.0
"""Seconds until an unanswered call counts as the dispatcher being away. A dead one is noticed
at once."""


def ray_router(config: GatewayConfig, cluster: ClusterRef) -> Router:
    """A router that asks the cluster's dispatcher actor; made on the event loop."""

    def dispatcher() -> Any:
        import ray

        return ray.get_actor(cluster.dispatcher, namespace=cluster.namespace)

    # Instances tell the homes of a gateway before and after a restart apart by this id.
    home_id = f"{config.gateway_id}-{uuid.uuid4().hex[:8]}"
    placer = DispatcherClient(home_id, dispatcher, DISPATCHER_TIMEOUT)
    return Router(home_id, config.token, placer, connect_timeout=config.connect_timeout)


class GatewayActor:
    """One gateway in a process of its own.

    It starts by itself, so that a restarted actor comes back without being asked. Methods
    are called from any thread; all state lives on the event loop's thread.

    Args:
        gateway_id: Name of the gateway.
        config: Settings.
        cluster: Where the dispatcher is found.
        router: Makes the router, on the event loop.
    """

    def __init__(
        self,
        gateway_id: str,
        config: GatewayConfig,
        cluster: ClusterRef,
        router: Callable[[GatewayConfig, ClusterRef], Router] = ray_router,
    ) -> None:
        self._gateway_id = gateway_id
        self._config = config
        self._cluster = cluster
        self._make_router = router
        self._router: Router | None = None
        self._server: GatewayServer | None = None
        self._tokenizer: ModelTokenizer | None = None
        self._started: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="gateway-loop", daemon=True
        )
        self._thread.start()
        threading.Thread(target=self._load, name="gateway-load", daemon=True).start()

    def _load(self) -> None:
        try:
            keys = ApiKeys.load(self._config.api_keys_file, self._config.api_key_hashes)
            self._tokenizer = ModelTokenizer.load(resolve_model(self._config.model))
            freeze_heap()  # before the loop has anything to do
            self._started.set_result(self._run(self._serve(keys, self._tokenizer)))
        except BaseException as error:
            logger.exception("gateway %s did not start", self._gateway_id)
            self._started.set_exception(error)

    async def _serve(self, keys: ApiKeys, tokenizer: ModelTokenizer) -> str:
        self._router = self._make_router(self._config, self._cluster)
        self._server = GatewayServer(self._config, self._router, tokenizer, keys)
        await self._router.start()
        try:
            return await self._server.start()
        except BaseException:
            await self._router.close()
            raise

    def start(self) -> str:
        """Wait until the gateway listens; returns its URL.

        Raises:
            PortInUseError: if another program has the port.
            KeyFileError: if the file of API keys cannot be used.
            Exception: whatever else prevented the start.
        """
        return self._started.result()

    def stop(self) -> None:
        """Take no more requests, let those that run end for ``drain_grace`` seconds, and close.

        The actor can only be discarded afterwards.
        """
        if self._loop.is_closed():
            return
        # A start under way would otherwise come up behind the stop.
        concurrent.futures.wait([self._started])
        if self._server is not None:
            self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        assert self._server is not None
        assert self._router is not None
        await self._server.stop(self._config.drain_grace)
        await self._router.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
