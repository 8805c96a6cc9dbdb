"""`drover calibrate` on a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster import cli
from cluster.calibrating import calibrate, format_checks
from cluster.config import ServeConfig
from cluster.simulation import calibration
from cluster.simulation.calibration import CalibrationError, Case, step_cases
from cluster.simulation.profile_files import load_profile
from instance.config import SchedulerConfig
from tests.integration.models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("calibrated") / "tiny", max_len=512)


def settings(model: Path, **more: int) -> ServeConfig:
    return ServeConfig(
        model=str(model),
        **{
            "max_model_len": 512,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 128,
            "kv_cache_memory_bytes": 8 << 20,
            **more,
        },
    )


def test_a_profile_of_a_tiny_model(model: Path) -> None:
    said: list[str] = []
    wanted = dataclasses.replace(settings(model), swap_space=0)
    profile, checks = calibrate(wanted, "tiny-here", True, said.append)
    assert profile.name == "tiny-here"
    assert profile.model.num_layers == 3
    assert profile.block_bytes * (profile.num_blocks + 1) <= 8 << 20
    assert profile.num_host_blocks == 0
    assert profile.step.of(128, 128 * 129 // 2, 0, 0) > 0
    for kind in ("step ", "copy ", "link "):
        assert any(line.startswith(kind) for line in said)
    assert {check.what.rpartition(" ")[2] for check in checks} >= {"memory", "link"}
    assert len(format_checks(checks).splitlines()) == len(checks) + 2
    assert all(check.seconds > 0 and check.predicted > 0 for check in checks)


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiny.yaml"
    arguments = [
        *("calibrate", str(model), "--quick", "--name", "mine", "--max-model-len", "256"),
        *("--max-num-seqs", "2", "--max-num-batched-tokens", "64", "-o", str(output)),
        *("--kv-cache-memory-bytes", "4M", "--swap-space", str(3 / 1024)),
    ]
    assert cli.main(arguments) == 0
    profile = load_profile(str(output))
    assert profile.name == "mine"
    assert (profile.num_host_blocks + 1) * profile.block_bytes <= 3 << 20
    told = capsys.readouterr()
    assert "error of what was left out" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_ctrl_c_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "measure_case", interrupted)
    output = tmp_path / "tiny.yaml"
    arguments = ["--quick", "--kv-cache-memory-bytes", "4M", "-o", str(output)]
    assert cli.main(["calibrate", str(model), *arguments]) == 1
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--output", "no/such/folder/x.yaml"), "no folder"),
        (("no-such-model-anywhere",), "no-such-model-anywhere"),
    ],
)
def test_what_prevents_it_is_said(
    arguments: tuple[str, ...], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", *arguments]) == 1
    assert wrong in capsys.readouterr().err


def test_a_pool_may_be_too_small(model: Path) -> None:
    small = settings(model, num_gpu_blocks_override=8)
    with pytest.raises((CalibrationError, ValueError), match=r"small|few"):
        calibrate(small, None, True, lambda _: None)


def test_cases_fit_their_instance() -> None:
    for limits, longest, tokens in (
        (SchedulerConfig(), 8192, 100_000),
        (SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64), 512, 2048),
        (SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192), 131_072, 400_000),
    ):
        cases = step_cases(limits, longest, tokens)
        assert len(set(cases)) == len(cases) > 10
        for case in cases:
            assert case.tokens <= tokens
            assert case.decodes <= limits.max_num_seqs
            assert case.decodes + case.prefill <= limits.max_num_batched_tokens
            assert max(case.context, case.start + case.prefill) <= longest
        kinds = {(case.decodes > 0, case.prefill > 0) for case in cases}
        assert kinds == {(True, False), (False, True), (True, True)}
    assert str(Case(2, 30, 5, 10)) == "2 x decode at 30, prefill of 5 at 10"
