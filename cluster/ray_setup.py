"""What Ray needs before it is imported, and ports."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

import psutil

STRAGGLER_PATIENCE = 5.0
"""Seconds that Ray's processes get to end after its shutdown."""


class LaunchError(Exception):
    """The cluster could not be started; the text is for the user."""


def node_address() -> str:
    """The address by which other nodes of the Ray cluster reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


def prepare_ray(address: str, temp_dir: str) -> None:
    """Set what Ray reads from the environment; must run before Ray is imported.

    Args:
        address: An existing Ray cluster, or "" for one of our own.
        temp_dir: Folder for a Ray of our own.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # A call made after the shutdown must fail, not start another Ray.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Ray says otherwise in a warning that it will change how it hides GPUs.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if address:
        # A head demands its token by default, while a client that says nothing sends none.
        known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        known = known or (Path.home() / ".ray" / "auth_token").exists()
        os.environ.setdefault("RAY_AUTH_MODE", "token" if known else "disabled")
        return
    # Whoever reaches Ray's ports may run code; the token keeps other users out.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_TMPDIR"] = temp_dir
    os.environ.pop("RAY_ADDRESS", None)
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])


def short_temp_dir() -> str:
    """A new folder whose path leaves room for Ray's sockets (107 bytes at most)."""
    parent = tempfile.gettempdir()
    if len(parent) > 24 and os.path.isdir("/tmp"):
        parent = "/tmp"
    return tempfile.mkdtemp(prefix="drover-", dir=parent)


def shut_down_ray(folder: str | None) -> None:
    """Disconnect from Ray; where it is our own, see its processes off and remove its folder.

    Ray's helpers outlive its shutdown by a moment. They make their folders again if these
    go first, or fail to notice that they should end.

    Args:
        folder: That of a Ray of our own; None for one that we only joined.
    """
    import ray

    family = _processes_of(folder) if folder else []
    ray.shutdown()
    if folder is None:
        return
    _, stragglers = psutil.wait_procs(family, timeout=STRAGGLER_PATIENCE)
    for process in stragglers:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stragglers, timeout=STRAGGLER_PATIENCE)
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: str) -> list[psutil.Process]:
    """Ray's processes that this one started, and theirs."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(folder in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def free_port(host: str) -> int:
    """A TCP port that is free on ``host`` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise LaunchError if another process listens there.

    Gateways bind with SO_REUSEPORT, which would let two clusters of one user share a port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def gist(error: BaseException) -> str:
    """The last line of an error; Ray's carry whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
