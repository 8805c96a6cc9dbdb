"""Tries a request's grammar out before the request is taken: a bad one is the client's error.

Compiling happens in processes of its own, because a small hostile schema can keep the library
busy for hours, and a thread cannot be stopped.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time

from cluster.gateway.errors import ApiError, invalid
from cluster.gateway.structured import Constraint
from instance.model.grammar_text import MAX_SPEC_CHARS
from instance.request import Grammar

CPU_SECONDS = 5
"""Processor time for one grammar."""
WORKERS = 2
"""Grammars tried out at a time."""
MAX_KNOWN = 4096
"""Verdicts kept; the least recently used goes first."""
WALL_SECONDS = 30.0
"""For one grammar, on a machine on which its processor time does not pass."""
MAX_WAITING = 64
"""Grammars that wait for their turn at most."""

_TOO_COMPLEX = "it is too complex: compiling it takes too much time or memory"


class _Worker:
    """One process of ``grammar_worker``; used by one thread at a time."""

    def __init__(self, cpu_seconds: int) -> None:
        # The child must find this very package, however the gateway was started.
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.gateway.grammar_worker", str(cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )

    def check(self, grammar: Grammar) -> str | None:
        """What is wrong with a grammar, or ""; None if the process died of it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        answer = b""
        deadline = time.monotonic() + WALL_SECONDS
        try:
            stdin.write(json.dumps([int(grammar.kind), grammar.spec]).encode() + b"\n")
            stdin.flush()
        except OSError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                piece = os.read(stdout.fileno(), 65536)
                if not piece:
                    return None
                answer += piece
        return str(json.loads(answer))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process at once; a check that runs returns None."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and what belongs to it here; no check may run."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


class GrammarChecker:
    """Says of grammars whether they can be compiled, and remembers it.

    Lives on one event loop; processes start with the first grammar.

    Args:
        cpu_seconds: Processor time for one grammar.
    """

    def __init__(self, cpu_seconds: int = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._pool = concurrent.futures.ThreadPoolExecutor(
            WORKERS, thread_name_prefix="grammar-check"
        )
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False
        self._known: collections.OrderedDict[bytes, str] = collections.OrderedDict()
        self._pending: dict[bytes, asyncio.Task[str]] = {}

    def close(self) -> None:
        """End the processes, also those at work."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.kill()

    async def check(self, constraint: Constraint) -> None:
        """Return if the grammar can be used.

        Raises:
            ApiError: 400 with the reason if it cannot; 503 if too many others are waiting.
        """
        grammar, param = constraint
        if len(grammar.spec) > MAX_SPEC_CHARS:
            raise invalid(
                f"'{param}' has {len(grammar.spec)} characters, at most {MAX_SPEC_CHARS} are "
                "allowed",
                param,
            )
        key = hashlib.sha256(f"{int(grammar.kind)}{grammar.spec}".encode()).digest()
        verdict = self._known.get(key)
        if verdict is None:
            pending = self._pending.get(key)
            if pending is None:
                if len(self._pending) >= MAX_WAITING:
                    raise ApiError(
                        503, "too many grammars are being compiled", param=param, retry_after=1.0
                    )
                pending = asyncio.create_task(self._try(key, grammar))
                self._pending[key] = pending
            # Others may wait for the same one: this client's leaving does not end it.
            verdict = await asyncio.shield(pending)
        else:
            self._known.move_to_end(key)
        if verdict:
            raise invalid(f"'{param}' cannot be used: {verdict}", param, "invalid_grammar")

    async def _try(self, key: bytes, grammar: Grammar) -> str:
        try:
            loop = asyncio.get_running_loop()
            verdict = await loop.run_in_executor(self._pool, self._run, grammar)
        finally:
            del self._pending[key]
        self._known[key] = verdict
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return verdict

    def _run(self, grammar: Grammar) -> str:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and not worker.alive:
            worker.close()
            worker = None
        worker = worker or _Worker(self._cpu_seconds)
        with self._lock:
            self._busy.add(worker)
        verdict = None
        try:
            verdict = worker.check(grammar)
        finally:
            with self._lock:
                self._busy.discard(worker)
                keep = verdict is not None and not self._closed
                if keep:
                    self._idle.append(worker)
            if not keep:
                worker.close()
        return _TOO_COMPLEX if verdict is None else verdict
