"""Cost profiles as YAML files; some come with the package."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from cluster.simulation.profile import CostProfile

_SCHEMA = TypeAdapter(CostProfile)
_PACKAGED = importlib.resources.files("cluster.simulation") / "profiles"


class ProfileError(ValueError):
    """There is no such profile, or it is not one; the text is for the user."""


def profile_names() -> list[str]:
    """Profiles that come with the package."""
    names = (entry.name for entry in _PACKAGED.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_profile(name: str) -> CostProfile:
    """A profile by the name under which it is packaged, or from a file.

    Raises:
        ProfileError: naming the file and the key that is wrong.
    """
    if name in profile_names():
        return parse_profile((_PACKAGED / f"{name}.yaml").read_text(encoding="utf-8"), name)
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = profile_names()
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"packaged are {', '.join(known)}"
        raise ProfileError(f"{name}: no such profile or file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{name}: {error}") from None
    return parse_profile(text, name)


def parse_profile(text: str, name: str) -> CostProfile:
    """A profile from YAML (or JSON, which is YAML); ``name`` is what errors call it."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ProfileError(f"{name}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ProfileError(f"{name}: a mapping is wanted")
    try:
        profile = _SCHEMA.validate_python(content)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'profile'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ProfileError(f"{name}: {faults}") from None
    if unknown := list(_unknown(content, dataclasses.asdict(profile))):
        raise ProfileError(f"{name}: unknown key {', '.join(unknown)}")
    return profile


def _unknown(given: dict[Any, Any], known: dict[str, Any], where: str = "") -> Iterator[str]:
    for key, value in given.items():
        if key not in known:
            yield f"{where}{key}"
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _unknown(value, known[key], f"{where}{key}.")


def format_profile(profile: CostProfile) -> str:
    """A profile as YAML."""
    content = _SCHEMA.dump_python(profile, mode="json", exclude_none=True)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=96)
    return text
