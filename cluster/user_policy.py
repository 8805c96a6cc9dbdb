"""A placement policy from a file of the user's own, run under a guard.

``--placement path/to/file.py:function`` names it. The function is called with

* the request (``PlaceRequest``: tenant, class, lengths, ...),
* a list of the instances that may take it (``LoadView``), never empty,
* a list of how many leading blocks of its prompt each of them holds already,

and returns one of the instances, or its ``instance_id``. It runs in a thread of its own and
must answer soon; if it raises, answers late or answers nonsense, the request goes where
``freeness`` sends it, which is counted and now and then logged.

A file's code runs in the dispatcher. The flag is the word of whoever starts the cluster; what
comes later, by the admin API or from a store, may only name files in the folder of
``--policy-dir``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.placement import NamedPolicy, Uniform
from cluster.dispatcher.policies import PolicyFailed
from cluster.dispatcher.views import LoadView

logger = logging.getLogger(__name__)

UserFunction = Callable[[PlaceRequest, list[LoadView], list[int]], Any]

TIME_LIMIT = 0.05
"""Seconds in which a policy must answer."""
REST = 5.0
"""Seconds for which one that was late is not asked."""
LOG_PERIOD = 60.0
_numbers = itertools.count()


class FileRefused(Exception):
    """A policy's file is not one that may be loaded while the cluster serves."""


class _Stop(BaseException):
    """Raised in a thread whose answer nobody waits for any more."""


def is_file_policy(name: str) -> bool:
    """Whether a policy's name means a function in a file."""
    path, separator, function = name.rpartition(":")
    return bool(separator) and path.endswith(".py") and function.isidentifier()


def load_function(name: str) -> UserFunction:
    """The function that ``path/to/file.py:function`` names.

    Raises:
        ValueError: there is no such file or function, or the file raises; the text says
            what is wrong.
    """
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no file {path!r}")
    # A name of its own each time: a file that was edited is read again.
    spec = importlib.util.spec_from_file_location(f"user_policy_{next(_numbers)}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path!r} raises {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{path!r} has no function {function!r}")
    return found


def permitted(name: str, folder: str) -> str:
    """The name of a function in a file that may be loaded while the cluster serves.

    Args:
        name: As for ``load_function``; a path that is not absolute starts in ``folder``.
        folder: The only folder that files may be in, or below; "" permits none.

    Returns:
        The same function's name with the file's real path: absolute, without links.

    Raises:
        FileRefused: the file is elsewhere, by ``..`` or a link for instance.
        ValueError: what is given cannot be a path.
    """
    if not folder:
        raise FileRefused(
            "a placement policy is loaded from a file only where the cluster was started with "
            "--policy-dir"
        )
    path, _, function = name.rpartition(":")
    root = Path(folder).resolve()
    try:
        file = (root / path).resolve()
    except (OSError, RuntimeError):  # links in a circle
        file = None
    if file is None or not file.is_relative_to(root):
        raise FileRefused(f"{path!r} is not in the folder of --policy-dir")
    return f"{file}:{function}"


def file_policies(*names: str) -> dict[str, NamedPolicy]:
    """The policies among these names that are functions in files, as those are now.

    Raises:
        ValueError: a file or function cannot be loaded.
    """
    return {
        name: NamedPolicy(GuardedPolicy(name, load_function(name)))
        for name in names
        if is_file_policy(name)
    }


class GuardedPolicy:
    """Asks a function that is not trusted to answer, or to answer sensibly.

    Called like any placement policy; raises PolicyFailed where it does not decide.

    Args:
        name: What logs call it.
        function: The user's function.
        limit: Seconds in which it must answer.
        rest: Seconds for which it is not asked after it was late.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        function: UserFunction,
        limit: float = TIME_LIMIT,
        rest: float = REST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._function = function
        self._limit = limit
        self._rest = rest
        self._clock = clock
        self._worker: _Worker | None = None
        self._rests_until = float("-inf")
        self._logged = float("-inf")

    def __call__(self, request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
        """The instance that the function names; raises PolicyFailed."""
        if self._clock() < self._rests_until:
            raise PolicyFailed("rests")
        views = list(candidates)
        answer = self._ask(request, views, candidates.cached.tolist())
        for view in views:
            if answer is view or (isinstance(answer, str) and answer == view.instance_id):
                return view
        raise self._failed("nonsense", f"answered {answer!r:.100}")

    def _ask(self, request: PlaceRequest, views: Sequence[LoadView], cached: list[int]) -> Any:
        if self._worker is None:
            self._worker = _Worker(self._function)
        outcome = self._worker.ask((request, list(views), cached), self._limit)
        if outcome is None:
            self._worker.stop()
            self._worker = None
            self._rests_until = self._clock() + self._rest
            raise self._failed("late", f"did not answer within {self._limit:g} s")
        answer, error = outcome
        if error is not None:
            raise self._failed("raised", f"raised {type(error).__name__}: {error}")
        return answer

    def _failed(self, reason: str, text: str) -> PolicyFailed:
        now = self._clock()
        if now - self._logged >= LOG_PERIOD:
            self._logged = now
            logger.warning("placement policy %s %s; freeness decides instead", self._name, text)
        return PolicyFailed(reason)


class _Worker:
    """A thread that calls a function, one call at a time."""

    def __init__(self, function: UserFunction) -> None:
        self._function = function
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="user-policy", daemon=True)
        self._thread.start()

    def ask(self, arguments: Any, limit: float) -> tuple[Any, BaseException | None] | None:
        """The function's answer and error, or None if there is none in time."""
        self._questions.put(arguments)
        try:
            return self._answers.get(timeout=limit)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Give the thread up; a loop of Python code in it ends, a blocking call does not."""
        self._questions.put(None)
        if self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Stop)
            )

    def _work(self) -> None:
        try:
            while (arguments := self._questions.get()) is not None:
                try:
                    answer, error = self._function(*arguments), None
                except Exception as raised:
                    answer, error = None, raised
                self._answers.put((answer, error))
        except _Stop:
            pass
