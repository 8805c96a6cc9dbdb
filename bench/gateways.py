"""Gateways in processes of their own, without Ray or a dispatcher."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

from bench.instances import TOKEN, FixedPlacer
from instance.load import InstanceInfo


def _serve(pipe: Connection, gateway_id: str, settings: dict[str, Any]) -> None:
    from cluster.dispatcher.messages import PlaceRequest
    from cluster.gateway.actor import GatewayActor
    from cluster.gateway.config import GatewayConfig
    from cluster.gateway.router import Router
    from cluster.names import ClusterRef

    infos: list[InstanceInfo] = settings.pop("instances")

    def router(config: GatewayConfig, _: ClusterRef) -> Router:
        turn = 0

        def choose(_: PlaceRequest) -> str:
            nonlocal turn
            turn += 1
            return infos[turn % len(infos)].instance_id

        placer = FixedPlacer(choose)
        placer.set_instances(infos)
        return Router(gateway_id, TOKEN, placer)

    config = GatewayConfig(gateway_id=gateway_id, token=TOKEN, **settings)
    actor = GatewayActor(gateway_id, config, ClusterRef("none", "none"), router)
    try:
        pipe.send(actor.start())
    except Exception as error:
        pipe.send(error)
    try:
        pipe.recv()
    except EOFError:
        actor.stop()
    os._exit(0)


class GatewayProcess:
    """A ``GatewayActor`` in a child process that sends requests to instances in turn.

    Args:
        gateway_id: Its name.
        instances: Where requests go.
        settings: Of ``GatewayConfig``.

    Attributes:
        url: Where it listens.
    """

    def __init__(self, gateway_id: str, instances: list[InstanceInfo], **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(child, gateway_id, {"instances": instances, **settings})
        )
        self.process.start()
        child.close()
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        self.url: str = answer

    def close(self) -> None:
        self._pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
