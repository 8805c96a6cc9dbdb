"""What ``drover simulate`` is told: its flags, and the runs that follow from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import GIB, ServeConfig
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.placement import POLICIES, NamedPolicy
from cluster.flags import (
    ConfigError,
    flags_of,
    integer,
    load_settings,
    number,
    setting,
    string,
    suggest,
    switch,
)
from cluster.simulation.device import device
from cluster.simulation.network import NetworkConfig
from cluster.simulation.profile import CostProfile
from cluster.simulation.profile_files import ProfileError, load_profile
from cluster.simulation.simulation import Death, Scenario
from cluster.simulation.workloads.records import WorkloadError, WorkloadRequest
from cluster.simulation.workloads.sources import load_workload
from cluster.simulation.workloads.transform import at_rate
from cluster.user_policy import file_policies, is_file_policy
from instance.config import EngineConfig

_WORK, _CLUSTER, _OUTPUT = "workload", "cluster", "output"
_STILL, _EARLY = "still", "early"


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """Flags of ``drover simulate``."""

    workload: str = setting(
        "",
        string,
        "WORKLOAD",
        _WORK,
        "what is asked, such as llumnix-m-m or mooncake:trace.jsonl.gz; see below",
        positional=True,
    )
    rate: float = setting(
        0.0,
        number(0.0),
        "PER_SECOND",
        _WORK,
        "requests per second on average (default: as the workload has it)",
    )
    requests: int = setting(
        0, integer(0), "N", _WORK, "requests at most, the first ones (default: all)"
    )
    max_tokens: int = setting(
        4096, integer(1), "TOKENS", _WORK, "output limit that every client states"
    )
    seed: int = setting(
        0, integer(0), "N", _WORK, "of the workload, its contents, and policies that draw"
    )
    profile: tuple[str, ...] = setting(
        ("llama-7b-a10",),
        string,
        "NAME[*COUNT]",
        _CLUSTER,
        "cost profile of the instances, by name or file; with counts several may be given, "
        "for a mixed cluster (default: llama-7b-a10)",
        many=True,
    )
    instances: int = setting(
        4, integer(1, 4096), "N", _CLUSTER, "instances, where the profile states no count"
    )
    policies: str = setting(
        "freeness,round_robin",
        string,
        "NAMES",
        _CLUSTER,
        "placement policies to compare: "
        + ", ".join(POLICIES)
        + f"; NAME:{_STILL} moves no request, NAME:{_EARLY} holds none back",
    )
    serve_config: str = setting(
        "", string, "FILE", _CLUSTER, "settings of `drover serve` under which the cluster runs"
    )
    set: tuple[str, ...] = setting(
        (),
        string,
        "KEY=VALUE",
        _CLUSTER,
        "one setting of `drover serve`, such as max-num-seqs=256; may be given several times",
        many=True,
    )
    kill: tuple[str, ...] = setting(
        (),
        string,
        "N@SECONDS[+SECONDS]",
        _CLUSTER,
        "instance N dies then, and is back after so many seconds; may be given several times",
        many=True,
    )
    start_seconds: float = setting(
        60.0, number(0.0), "SECONDS", _CLUSTER, "time that an added instance takes to start"
    )
    jump: bool = setting(
        True, switch, "", _CLUSTER, "account for decode steps together; the outcome is the same"
    )
    json: str = setting("", string, "FILE", _OUTPUT, "write all figures there")
    html: str = setting("", string, "FILE", _OUTPUT, "write a report with plots there")
    log: str = setting(
        "", string, "FILE", _OUTPUT, "write every decision there, and what it brought"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of one call: the same workload under each policy.

    Attributes:
        workload: Requests by arrival.
        scenarios: By policy, as it was written.
        profiles: Of the instances, by their number.
    """

    workload: list[WorkloadRequest]
    scenarios: dict[str, Scenario]
    profiles: tuple[CostProfile, ...]


def make_plan(settings: SimulateConfig) -> Plan:
    """What the flags ask for.

    Raises:
        ConfigError: with a text for the user.
    """
    if not settings.workload:
        raise ConfigError("name a workload, such as llumnix-m-m (see --help)")
    try:
        workload = load_workload(settings.workload, settings.seed)
        if settings.rate:
            workload = at_rate(workload, settings.rate)
    except WorkloadError as error:
        raise ConfigError(str(error)) from None
    if settings.requests:
        workload = workload[: settings.requests]
    profiles = _profiles(settings)
    serve = _serve(settings)
    engine = _engine(serve, profiles)
    share, host_bytes = float(serve.migration_bandwidth), serve.swap_space * GIB
    devices = {id(one): device(one, share, host_bytes) for one in profiles}
    network = NetworkConfig().with_overhead(
        max(one.overhead for one in profiles), max(one.contention for one in profiles)
    )
    deaths = tuple(_death(text, len(profiles)) for text in settings.kill)
    names = [name.strip() for name in settings.policies.split(",") if name.strip()]
    if not names:
        raise ConfigError("--policies names none")
    scenarios = {
        name: Scenario(
            devices=tuple(devices[id(one)] for one in profiles),
            engine=engine,
            dispatcher=_policy(name, serve.dispatcher()),
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            deaths=deaths,
            start_seconds=settings.start_seconds,
            network=network,
            policies=_user_policies(name),
            jumps=settings.jump,
        )
        for name in names
    }
    return Plan(workload, scenarios, profiles)


def _profiles(settings: SimulateConfig) -> tuple[CostProfile, ...]:
    made: list[CostProfile] = []
    for text in settings.profile:
        name, _, count = text.partition("*")
        try:
            profile = load_profile(name)
            number = integer(1, 4096)(count) if count else settings.instances
        except (ProfileError, ConfigError) as error:
            raise ConfigError(f"--profile: {error}") from None
        if not count and len(settings.profile) > 1:
            raise ConfigError(f"--profile {text}: of several, each states a count: {name}*2")
        made += [profile] * number
    return tuple(made)


def _serve(settings: SimulateConfig) -> ServeConfig:
    given: dict[str, object] = {"config": settings.serve_config or None}
    known = flags_of(ServeConfig)
    for text in settings.set:
        key, equals, value = text.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in known:
            raise ConfigError(f"--set {text}: KEY=VALUE is wanted{suggest(name, known)}")
        if known[name].many:
            earlier = given.get(name, ())
            assert isinstance(earlier, tuple)
            given[name] = (*earlier, value)
        else:
            given[name] = value
    return load_settings(ServeConfig, given, environment={})


def _engine(serve: ServeConfig, profiles: Sequence[CostProfile]) -> EngineConfig:
    """Settings of the instances, of which each holds any request that the cluster takes."""
    engine = serve.engine("cpu")
    longest = min(
        min(one.model.max_model_len, one.num_blocks * one.model.block_size) for one in profiles
    )
    limits = dataclasses.replace(
        engine.scheduler, max_model_len=min(engine.scheduler.max_model_len, longest)
    )
    return dataclasses.replace(engine, scheduler=limits)


def _policy(text: str, base: DispatcherConfig) -> DispatcherConfig:
    name, *options = text.split(":")
    if name.endswith(".py") and options:
        name = f"{name}:{options.pop(0)}"
    elif name not in POLICIES:
        raise ConfigError(f"--policies: {name!r} is not one of {', '.join(POLICIES)}")
    config = dataclasses.replace(base, placement=name)
    for option in options:
        if option == _STILL:
            still = dataclasses.replace(config.rebalance, enabled=False)
            config = dataclasses.replace(config, rebalance=still)
        elif option == _EARLY:
            early = dataclasses.replace(config.requests, run_ahead=None)
            config = dataclasses.replace(config, requests=early)
        else:
            raise ConfigError(f"--policies {text}: {option!r} is neither {_STILL} nor {_EARLY}")
    return config


def _user_policies(text: str) -> dict[str, NamedPolicy]:
    name = ":".join(text.split(":")[:2])
    if not is_file_policy(name):
        return {}
    try:
        return file_policies(name)
    except ValueError as error:
        raise ConfigError(f"--policies: {error}") from None


def _death(text: str, instances: int) -> Death:
    match = re.fullmatch(r"(\d+)@(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?", text.strip())
    if match is None:
        raise ConfigError(f"--kill {text}: INSTANCE@SECONDS or INSTANCE@SECONDS+SECONDS is wanted")
    if int(match[1]) >= instances:
        raise ConfigError(f"--kill {text}: there are instances 0 to {instances - 1}")
    return Death(float(match[2]), int(match[1]), None if match[3] is None else float(match[3]))


def writable(settings: SimulateConfig) -> None:
    """Find out before a long run that its results could not be written.

    Raises:
        ConfigError: A folder does not exist.
    """
    for path in (settings.json, settings.html, settings.log):
        if path and not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {Path(path).parent}")
