"""Clusters of this user that run on this machine, noted in files for the other commands."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def state_folder() -> Path:
    """Where running clusters of this user are noted."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "drover" / "clusters"


def write_state(url: str, port: int, admin_key: str) -> Path:
    """Note a running cluster, readable by this user only, for ``drover status`` and others."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{port}.json"
    content = {"url": url, "admin_key": admin_key, "pid": os.getpid()}
    fresh = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    os.replace(fresh, path)
    return path


def local_clusters() -> list[dict[str, Any]]:
    """Clusters of this user that run on this machine: url, admin_key and pid of each."""
    found = []
    for path in sorted(state_folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            try:
                os.kill(int(state["pid"]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
                continue
            found.append(state)
    return found
