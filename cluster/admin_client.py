"""The operators' side of a gateway's admin API."""

from __future__ import annotations

import os
from typing import Any

import httpx

from cluster.local import local_clusters


class CommandError(Exception):
    """The command cannot do what was asked; the text is for the user."""


class AwayError(CommandError):
    """Nobody answers, or the gateway has no dispatcher: later it may work."""


class AdminClient:
    """Calls ``/admin/`` of one cluster.

    Args:
        url: Base URL of a gateway.
        key: Its admin key; "" sends none.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._key = key

    @classmethod
    def find(cls, url: str | None, key: str | None) -> AdminClient:
        """The cluster that is meant: the one given, the environment's, or that of this machine.

        Raises:
            CommandError: where there is none, or more than one.
        """
        clusters = local_clusters()
        url = url or os.environ.get("DROVER_URL")
        key = key or os.environ.get("DROVER_ADMIN_KEY")
        if url:
            url = url.rstrip("/")
            known = next((c["admin_key"] for c in clusters if c["url"] == url), "")
            return cls(url, key or known)
        if not clusters:
            raise CommandError(
                "no cluster runs on this machine: start one with `drover serve`, "
                "or name one with --url"
            )
        if len(clusters) > 1:
            urls = ", ".join(cluster["url"] for cluster in clusters)
            raise CommandError(f"several clusters run on this machine; choose with --url: {urls}")
        return cls(clusters[0]["url"], key or clusters[0]["admin_key"])

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that an endpoint answers.

        Raises:
            AwayError: if it does not answer, or not now.
            CommandError: if it refuses.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A migration answers when it has ended.
        timeout = httpx.Timeout(10.0, read=150.0)
        try:
            response = httpx.request(
                method, self.url + path, json=body, headers=headers, timeout=timeout
            )
            answer = response.json()
        except httpx.ConnectError as error:
            raise AwayError(
                f"{self.url} does not answer ({error}): is the cluster running, "
                "and is this its address (--url)?"
            ) from None
        except httpx.TimeoutException:
            raise AwayError(f"{self.url}{path} does not answer in time") from None
        except httpx.InvalidURL as error:
            raise CommandError(f"{self.url} is not a URL: {error}") from None
        except httpx.HTTPError as error:
            raise AwayError(f"{self.url} does not answer: {error}") from None
        except ValueError:
            raise CommandError(
                f"{self.url}{path} answered {response.status_code}, not JSON: "
                "is this a Drover gateway?"
            ) from None
        if response.is_error:
            raise self._refusal(path, response.status_code, answer)
        return answer

    def _refusal(self, path: str, status: int, answer: Any) -> CommandError:
        detail = answer.get("error") if isinstance(answer, dict) else None
        message = detail.get("message") if isinstance(detail, dict) else None
        text = str(message or f"{self.url}{path} answered {status}")
        if status == 401:
            text += " (give it with --admin-key or DROVER_ADMIN_KEY)"
        return AwayError(text) if status == 503 else CommandError(text)
