"""API keys and the tenants they belong to. Keys are known by their SHA-256 only."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.gateway.errors import ApiError

DEFAULT_TENANT = "default"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class KeyFileError(ValueError):
    """The file of API keys is missing or malformed; the text says where, never a key."""


def bearer_token(headers: Mapping[str, str]) -> str:
    """The token of an ``Authorization: Bearer`` header; "" if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class ApiKeys:
    """Who may call, and as which tenant.

    Args:
        tenants: Tenant by the hex SHA-256 of its key. If empty, everybody is served as the
            tenant "default".
    """

    def __init__(self, tenants: Mapping[str, str] | None = None) -> None:
        self._tenants = [(bytes.fromhex(key), tenant) for key, tenant in (tenants or {}).items()]

    @classmethod
    def load(cls, path: str | Path | None, hashes: Iterable[str] = ()) -> ApiKeys:
        """Keys of a file and further hashes, whose tenant is "default".

        The file is a YAML list or JSON lines of ``{key_sha256: HEX, tenant: NAME}``.

        Raises:
            KeyFileError: if the file cannot be read or understood, or names no key.
        """
        tenants = dict.fromkeys((digest.lower() for digest in hashes), DEFAULT_TENANT)
        if path is not None:
            read = _read(Path(path))
            if not read:
                # Falling back to serving everybody would turn a slip into an open door.
                raise KeyFileError(f"{path}: no API key in the file")
            tenants.update(read)
        return cls(tenants)

    @property
    def required(self) -> bool:
        return bool(self._tenants)

    def tenant(self, headers: Mapping[str, str]) -> str:
        """The tenant of a request.

        Raises:
            ApiError: 401 where the key is missing or unknown.
        """
        if not self._tenants:
            return DEFAULT_TENANT
        token = bearer_token(headers)
        if not token:
            raise ApiError(
                401,
                "no API key: send the header 'Authorization: Bearer YOUR_KEY'",
                code="missing_api_key",
            )
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: str | None = None
        # Every key is compared, so that the time taken tells nothing.
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise ApiError(401, "the API key is not known", code="invalid_api_key")
        return found


class AdminKey:
    """The key of ``/admin/``.

    Args:
        key: The key itself; "" closes the admin side.
    """

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest() if key else None

    def check(self, headers: Mapping[str, str]) -> None:
        """Pass a caller who has the key.

        Raises:
            ApiError: 403 if there is no admin key, 401 if the caller's is another.
        """
        if self._digest is None:
            raise ApiError(403, "the admin API is off: no admin key is set", code="admin_disabled")
        token = bearer_token(headers).encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(self._digest, hashlib.sha256(token).digest()):
            raise ApiError(401, "missing or wrong admin key", code="invalid_api_key")


def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path}: cannot be read: {error}") from None
    try:
        if text.lstrip().startswith("{"):
            entries: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = yaml.safe_load(text) or []
    except (json.JSONDecodeError, yaml.YAMLError):
        # Their own messages quote the text, which may hold a key.
        raise KeyFileError(f"{path}: neither a YAML list nor JSON lines") from None
    if not isinstance(entries, list):
        raise KeyFileError(f"{path}: not a list of keys")
    tenants: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        digest, tenant = _entry(entry, f"{path}: entry {number}")
        if tenants.setdefault(digest, tenant) != tenant:
            raise KeyFileError(f"{path}: entry {number}: the key belongs to two tenants")
    return tenants


def _entry(entry: Any, where: str) -> tuple[str, str]:
    if not isinstance(entry, dict) or "key_sha256" not in entry:
        raise KeyFileError(f"{where}: expected {{key_sha256: HEX, tenant: NAME}}")
    digest = str(entry["key_sha256"]).strip().lower().removeprefix("sha256:")
    if not _DIGEST.fullmatch(digest):
        raise KeyFileError(f"{where}: key_sha256 is not a SHA-256 in hex (sha256sum makes one)")
    tenant = entry.get("tenant", DEFAULT_TENANT)
    if not isinstance(tenant, str) or not tenant:
        raise KeyFileError(f"{where}: tenant is not a name")
    return digest, tenant
