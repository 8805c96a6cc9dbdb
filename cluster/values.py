"""Values of settings that mean something to Drover only, read from text."""

from __future__ import annotations

import math
from pathlib import Path

from cluster.dispatcher.placement import POLICIES
from cluster.flags import ConfigError, integer, number, one_of
from cluster.user_policy import is_file_policy, load_function
from instance.load import Role
from instance.request import RequestClass


def role_count(text: str) -> tuple[str, int]:
    """A role and a number of instances, as in ``prefill=2``."""
    role, _, count = text.partition("=")
    if role not in (Role.PREFILL, Role.DECODE):
        raise ConfigError(f"{text!r} is not prefill=N or decode=N")
    return role, integer(1, 1024)(count)


def placement_policy(text: str) -> str:
    """A policy of the registry, or a function in a file, then with an absolute path."""
    if not is_file_policy(text):
        return one_of(*POLICIES)(text)
    path, _, function = text.rpartition(":")
    name = f"{Path(path).expanduser().absolute()}:{function}"
    try:
        load_function(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return name


def existing_folder(text: str) -> str:
    """The absolute path of a folder, or nothing."""
    if text and not Path(text).expanduser().is_dir():
        raise ConfigError(f"there is no folder {text!r}")
    return str(Path(text).expanduser().absolute()) if text else ""


def theta(text: str) -> float | None:
    """A number, or the word auto."""
    return None if text == "auto" else number(0.0)(text)


def tpot_target(text: str) -> tuple[RequestClass | None, float]:
    """A target in milliseconds, "auto" or "off", of all classes or of CLASS=."""
    name, separator, value = text.rpartition("=")
    names = [one.name.lower() for one in RequestClass]
    request_class = RequestClass[one_of(*names)(name).upper()] if separator else None
    if value == "auto":
        return request_class, 0.0
    return request_class, math.inf if value == "off" else number(0.001)(value) / 1000
