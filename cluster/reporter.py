"""The way of an instance's reports to the dispatcher, run in the instance's process."""

from __future__ import annotations

import logging
import threading
from typing import Any

from cluster.names import ClusterRef
from instance.load import InstanceInfo, LoadReport

logger = logging.getLogger(__name__)

CALL_TIMEOUT = 5.0
"""Seconds until an unanswered call counts as the dispatcher being away."""
FIRST_RETRY, LAST_RETRY = 0.1, 1.0


class DispatcherReporter:
    """Forwards an instance's start and its load reports to the dispatcher.

    Calling it never blocks: a thread takes what is newest (an older report that was not
    sent yet is skipped), with one call in flight. A dispatcher that restarted answers
    that it does not know the instance, which then joins again. Can be pickled.
    """

    def __init__(self, cluster: ClusterRef) -> None:
        self._cluster = cluster
        self._reset()

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._info: InstanceInfo | None = None
        self._report: LoadReport | None = None
        self._joined = False
        self._thread: threading.Thread | None = None
        self._handle: Any = None

    def __getstate__(self) -> ClusterRef:
        return self._cluster

    def __setstate__(self, cluster: ClusterRef) -> None:
        self._cluster = cluster
        self._reset()

    def __call__(self, news: InstanceInfo | LoadReport) -> None:
        with self._condition:
            if isinstance(news, InstanceInfo):
                self._info = news
                self._joined = False
            else:
                self._report = news.after(self._report)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
                self._thread.start()
            self._condition.notify()

    def _run(self) -> None:
        retry = FIRST_RETRY
        while True:
            with self._condition:
                while self._info is None or (self._joined and self._report is None):
                    self._condition.wait()
                info, joined = self._info, self._joined
                report, self._report = self._report, None
            try:
                if not joined:
                    self._call("join", info)
                    with self._condition:
                        # A new start may have been told meanwhile.
                        self._joined = self._info is info
                if report is not None and not self._call("report", report):
                    with self._condition:
                        self._joined = False
                        self._put_back(report)
                retry = FIRST_RETRY
            except Exception as error:
                logger.debug("the dispatcher is away: %s", error)
                self._handle = None
                with self._condition:
                    self._put_back(report)
                    self._condition.wait(retry)
                retry = min(2 * retry, LAST_RETRY)

    def _put_back(self, report: LoadReport | None) -> None:
        """A report was not taken, or it is not known whether it was."""
        if report is not None:
            self._report = report if self._report is None else self._report.after(report)

    def _call(self, method: str, argument: InstanceInfo | LoadReport) -> Any:
        import ray

        if not ray.is_initialized():
            # Else the next call would start a whole Ray of its own.
            raise ConnectionError("this process has left Ray")
        if self._handle is None:
            self._handle = ray.get_actor(
                self._cluster.dispatcher, namespace=self._cluster.namespace
            )
        return ray.get(getattr(self._handle, method).remote(argument), timeout=CALL_TIMEOUT)
