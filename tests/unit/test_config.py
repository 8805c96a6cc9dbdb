"""Settings: precedence of their sources, and errors that help."""

import argparse
import dataclasses
import math

import pytest

from cluster.config import ServeConfig
from cluster.flags import ConfigError, add_arguments, flags_of, load_settings, suggest
from instance.request import RequestClass


def parse(*arguments: str, environment: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, ServeConfig)
    return load_settings(ServeConfig, vars(parser.parse_args(list(arguments))), environment or {})


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse() == ServeConfig()


def test_command_line_beats_environment_beats_file(tmp_path) -> None:
    file = tmp_path / "drover.yaml"
    file.write_text("port: 1\nmax-num-seqs: 11\nblock_size: 8\nmodel: from-file\n")
    environment = {"DROVER_PORT": "2", "DROVER_MAX_NUM_SEQS": "22", "DROVER_CONFIG": "missing"}
    config = parse("--config", str(file), "--port", "3", environment=environment)
    assert (config.port, config.max_num_seqs, config.block_size) == (3, 22, 8)
    assert config.model == "from-file"
    assert parse("given", "--config", str(file)).model == "given"


def test_file_named_by_the_environment(tmp_path) -> None:
    file = tmp_path / "drover.yaml"
    file.write_text("instances: 5\n")
    assert parse(environment={"DROVER_CONFIG": str(file)}).instances == 5


def test_every_flag_has_its_environment_twin() -> None:
    samples = {
        "api_key": ("a,b", ("a", "b")),
        "dtype": ("float64", "float64"),
        "device": ("cpu", "cpu"),
        "placement": ("round_robin", "round_robin"),
        "policy_dir": ("/", "/"),
        "preemption_mode": ("recompute", "recompute"),
        "swap_mode": ("sync", "sync"),
        "redis_url": ("redis://host", "redis://host"),
        "roles": ("prefill=1,decode=1", (("prefill", 1), ("decode", 1))),
        "max_instances": ("7", 7),
        "tpot_target_ms": (
            "auto,batch=250",
            ((None, 0.0), (RequestClass.BATCH, 0.25)),
        ),
        "fairness_theta": ("2000", 2000.0),
        "gpu_memory_utilization": ("0.5", 0.5),
        "scale_down_threshold": ("70", 70.0),
    }
    for field in dataclasses.fields(ServeConfig):
        if field.name in samples:
            text, value = samples[field.name]
        elif isinstance(field.default, bool):
            text, value = ("off", False) if field.default else ("on", True)
        elif isinstance(field.default, int):
            text, value = str(field.default * 2 + 1), field.default * 2 + 1
            if field.name == "max_num_seqs":
                text, value = "17", 17
        elif isinstance(field.default, float):
            text, value = "3.5", 3.5
        else:
            text, value = "some-text", "some-text"
        config = parse(environment={f"DROVER_{field.name.upper()}": text})
        assert getattr(config, field.name) == value, field.name


@pytest.mark.parametrize(
    ("text", "value"),
    [("1048576", 1 << 20), ("512M", 512 << 20), ("4GiB", 4 << 30), ("1.5g", 3 << 29)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse("--kv-cache-memory-bytes", text).kv_cache_memory_bytes == value


def test_targets_per_class() -> None:
    assert parse().tpot_targets == (0.0, 0.0, 0.0)
    given = ("--tpot-target-ms", "50", "--tpot-target-ms", "batch=off")
    config = parse(*given, "--fairness-theta", "auto")
    assert config.tpot_targets == (0.05, 0.05, math.inf)
    scheduler = config.engine("cpu").scheduler
    assert (scheduler.tpot_targets, scheduler.theta) == (config.tpot_targets, None)


def test_switches_and_lists(tmp_path) -> None:
    assert parse("--rebalance", "off").rebalance is False
    assert parse("--no-enable-prefix-caching").enable_prefix_caching is False
    assert parse("--enable-prefix-caching").enable_prefix_caching is True
    assert parse("--api-key", "a", "--api-key", "b").api_key == ("a", "b")
    file = tmp_path / "drover.yaml"
    file.write_text("rebalance: off\napi-key: [x, y]\nenable-prefix-caching: false\n")
    config = parse("--config", str(file))
    assert (config.rebalance, config.enable_prefix_caching) == (False, False)
    assert config.api_key == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], r"--port: 70000 is more than 65535"),
        (["--port", "http"], r"--port: 'http' is not a whole number"),
        (["--instances", "0"], r"--instances: 0 is less than 1"),
        (["--grace", "nan"], r"--grace: NaN"),
        (["--dtype", "int8"], r"--dtype: 'int8' is not one of auto, float32"),
        (["--placement", "best"], r"--placement: .* freeness"),
        (["--policy-dir", "/no/such/folder"], r"--policy-dir: there is no folder"),
        (["--rebalance", "maybe"], r"--rebalance: 'maybe' is neither on nor off"),
        (["--kv-cache-memory-bytes", "a lot"], r"not a size"),
        (["--kv-cache-memory-bytes", "5"], r"less than 1M"),
        (["--max-num-seqs", "600"], r"max-num-batched-tokens \(512\) is less"),
        (["--fairness-theta", "-1"], r"--fairness-theta: -1.0 is less than 0"),
        (["--tpot-target-ms", "urgent=5"], r"'urgent' is not one of interactive, standard, batch"),
        (["--tpot-target-ms", "0"], r"--tpot-target-ms: 0.0 is less than 0.001"),
        (["--scale-up-threshold", "60"], r"scale-up-threshold \(60\) is not less"),
        (["--priority-interval", "0"], r"--priority-interval: 0 is less than 1"),
        (["--cluster-name", "a/b"], r"--cluster-name: 'a/b' is not a name"),
        (["--config", "no-such-file.yaml"], r"no-such-file.yaml: No such file"),
    ],
)
def test_bad_values_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_num_seq: 4", r"unknown key 'max_num_seq'; did you mean --max-num-seqs"),
        ("port: [1]", r"port: a single value is wanted"),
        ("port: -1", r"port: -1 is less than 0"),
        ("- 1", r"a mapping of settings is wanted"),
        ("a: [", r"not YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, content: str, message: str) -> None:
    file = tmp_path / "drover.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(file))


def test_environment_errors_name_the_variable() -> None:
    with pytest.raises(ConfigError, match="DROVER_BLOCK_SIZE: 0 is less than 1"):
        parse(environment={"DROVER_BLOCK_SIZE": "0"})


def test_suggestions() -> None:
    assert "--max-model-len" in suggest("--max-model-length", flags_of(ServeConfig))
    assert suggest("zzzz", flags_of(ServeConfig)) == ""


def test_settings_reach_the_parts() -> None:
    config = parse(
        *("--block-size", "32", "--num-gpu-blocks-override", "99", "--migration-tail-blocks", "3"),
        *("--threads", "2", "--report-interval", "0.1", "--api-key", "secret", "--port", "1234"),
        *("--cluster-name", "blue", "--placement", "random", "--rebalance", "off"),
    )
    engine = config.engine("cpu")
    assert (engine.block_size, engine.num_blocks, engine.num_threads) == (32, 99, 2)
    assert engine.migration.tail_blocks == 3
    gateway = config.gateway("gateway-0", 100)
    assert (gateway.port, gateway.max_model_len, gateway.namespace) == (1234, 100, "drover-blue")
    assert "secret" not in repr(gateway)
    assert len(gateway.api_key_hashes) == 1
    dispatcher = config.dispatcher()
    assert dispatcher.placement == "random"
    assert dispatcher.load.report_interval == 0.1
    assert not dispatcher.rebalance.enabled


def test_help_shows_every_flag() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, ServeConfig)
    text = parser.format_help()
    for name, flag in flags_of(ServeConfig).items():
        assert (flag.metavar if flag.positional else "--" + name.replace("_", "-")) in text


def test_the_address_of_redis() -> None:
    assert parse("--redis-url", "redis://h:1/0").redis_url == "redis://h:1/0"
    with pytest.raises(ConfigError, match="redis://") as caught:
        parse("--redis-url", "http://:secret@h")
    assert "secret" not in str(caught.value)
