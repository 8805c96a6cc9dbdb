"""The file that says what tenants may have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.dispatcher.tenants import TenantPolicy, policy_from_json
from cluster.flags import ConfigError


@dataclass(frozen=True, slots=True)
class TenantFile:
    """What a file says.

    Attributes:
        tenants: Policies by tenant.
        default: Policy of all others.
    """

    tenants: dict[str, TenantPolicy] = field(default_factory=dict)
    default: TenantPolicy = field(default_factory=TenantPolicy)


def load_tenants(path: str) -> TenantFile:
    """Read a YAML file of tenants; "" is a file that says nothing.

    It has a map ``tenants`` of names, and a map ``default``, for the others and for what a
    tenant leaves out. Fields are ``weight``, ``max_queued`` and ``classes``; which key belongs
    to which tenant is said in the file of API keys.

    Raises:
        ConfigError: the file cannot be read or understood; the text says where.
    """
    if not path:
        return TenantFile()
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict) or set(content) - {"tenants", "default"}:
        raise ConfigError(f"{path}: expected the keys 'tenants' and 'default', and no other")
    default = _policy(f"{path}: default", content.get("default"), TenantPolicy())
    entries = content.get("tenants") or {}
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ConfigError(f"{path}: tenants: expected a map from names")
    return TenantFile(
        {name: _policy(f"{path}: {name}", fields, default) for name, fields in entries.items()},
        default,
    )


def _policy(where: str, fields: Any, base: TenantPolicy) -> TenantPolicy:
    if fields is None:
        return base
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: expected a map such as {{weight: 2}}")
    try:
        return policy_from_json(fields, base)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
