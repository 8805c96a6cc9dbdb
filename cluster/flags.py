"""Settings declared once, as fields of a dataclass, and read from three sources.

A field made with :func:`setting` is a ``--flag``, an environment variable and a key of a
YAML file; precedence in this order, then the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
ENV_PREFIX = "DROVER_"


class ConfigError(ValueError):
    """A setting is unknown, malformed or out of range; the text is for the user."""


# ---- values


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from ``low`` to ``high``, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a whole number") from None
        _within(value, low, high)
        return value

    return parse


def number(low: float, high: float | None = None) -> Callable[[str], float]:
    """A number from ``low`` to ``high``, both included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a number") from None
        if value != value:
            raise ConfigError("NaN is not a number of anything")
        _within(value, low, high)
        return value

    return parse


def _within(value: float, low: float, high: float | None) -> None:
    if value < low:
        raise ConfigError(f"{value} is less than {low}")
    if high is not None and value > high:
        raise ConfigError(f"{value} is more than {high}")


def size(text: str) -> int:
    """Bytes: a number, with K, M, G or T (powers of 1024; "iB" or "B" may follow)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size such as 512M or 4GiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def string(text: str) -> str:
    """Any text."""
    return text


def identifier(text: str) -> str:
    """A name that is safe in file names and Ray namespaces."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        raise ConfigError(f"{text!r} is not a name of letters, digits, '.', '_' and '-'")
    return text


def redis_address(text: str) -> str:
    """A URL that redis-py takes, or nothing."""
    if text and not text.startswith(("redis://", "rediss://", "unix://")):
        # It is not quoted: it may hold a password.
        raise ConfigError("not a URL that begins with redis://, rediss:// or unix://")
    return text


def switch(text: str) -> bool:
    """On or off, in the words of YAML and of environments."""
    value = text.strip().lower()
    if value in ("on", "true", "yes", "1"):
        return True
    if value in ("off", "false", "no", "0"):
        return False
    raise ConfigError(f"{text!r} is neither on nor off")


def one_of(*choices: str) -> Callable[[str], str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ConfigError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field of a settings class is written on the command line.

    Attributes:
        parse: Turns a string into the value; raises ConfigError.
        help: One line for people.
        group: Heading in ``--help``.
        metavar: Name of the value there; "" for a ``--flag/--no-flag`` pair.
        many: May be given several times; a list in a file, commas in the environment.
        positional: No dashes on the command line.
    """

    parse: Callable[[str], Any]
    help: str
    group: str
    metavar: str
    many: bool = False
    positional: bool = False


def setting(
    default: Any, parse: Callable[[str], Any], metavar: str, group: str, text: str, **more: bool
) -> Any:
    """A field of a settings class; see :class:`Flag` for the arguments."""
    return dataclasses.field(
        default=default, metadata={"flag": Flag(parse, text, group, metavar, **more)}
    )


# ---- sources


def flags_of(settings: type[Any]) -> dict[str, Flag]:
    """The flags of a settings class, by field name."""
    return {field.name: field.metadata["flag"] for field in dataclasses.fields(settings)}


def add_arguments(
    parser: argparse.ArgumentParser, settings: type[Any], only: str | None = None
) -> None:
    """Declare every flag on ``parser``, or those of one group; one that is not given is left
    out of the result."""
    groups: dict[str, Any] = {}
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of settings; keys are the flags' names"
    )
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, flag in flags_of(settings).items():
        if only is not None and flag.group != only:
            continue
        group = groups.get(flag.group)
        if group is None:
            group = groups[flag.group] = parser.add_argument_group(flag.group)
        default = defaults[name]
        text = flag.help
        if default not in ("", (), 0, 0.0) and "default:" not in text:
            shown = ("on" if default else "off") if isinstance(default, bool) else default
            text += f" (default: {shown})"
        text = text.replace("%", "%%")
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if flag.positional:
            # A positional cannot be suppressed: None stands for one that is not given.
            group.add_argument(name, nargs="?", metavar=flag.metavar, default=None, help=text)
        elif not flag.metavar:
            group.add_argument(_option(name), action=argparse.BooleanOptionalAction, **more)
        else:
            action = "append" if flag.many else "store"
            group.add_argument(_option(name), metavar=flag.metavar, action=action, **more)


def load_settings(
    settings: type[T], given: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> T:
    """Merge command line, environment, file and defaults.

    Args:
        settings: The class to make.
        given: What ``add_arguments`` parsed, unconverted; "config" names the file.
        environment: Environment variables; the process's own by default.

    Raises:
        ConfigError: with a text that names the source of the bad value.
    """
    environment = os.environ if environment is None else environment
    path = given.get("config") or environment.get(f"{ENV_PREFIX}CONFIG")
    flags = flags_of(settings)
    values = _read_file(path, flags) if path else {}
    for name, flag in flags.items():
        variable = ENV_PREFIX + name.upper()
        if environment.get(variable):
            text = environment[variable]
            values[name] = _convert(flag, text.split(",") if flag.many else text, variable)
        if given.get(name) is not None:
            source = name.upper() if flag.positional else _option(name)
            values[name] = _convert(flag, given[name], source)
    return settings(**values)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _convert(flag: Flag, value: Any, source: str) -> Any:
    try:
        if flag.many:
            items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            return tuple(flag.parse(str(item)) for item in items)
        if isinstance(value, (list, dict)) or value is None:
            raise ConfigError("a single value is wanted")
        return flag.parse(str(value))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _read_file(path: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping of settings is wanted")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            raise ConfigError(f"{path}: unknown key {str(key)!r}{suggest(name, flags)}")
        values[name] = _convert(flags[name], value, f"{path}: {key}")
    return values


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint at settings that resemble an unknown one; "" where none does."""
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), list(known), 3)
    return f"; did you mean {' or '.join(_option(match) for match in close)}?" if close else ""
