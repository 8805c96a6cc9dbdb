"""Cost profiles: their files, and costs fitted to measurements."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulation.profile import CopyCost, CostProfile, LinkCost
from cluster.simulation.profile_files import (
    ProfileError,
    format_profile,
    load_profile,
    parse_profile,
    profile_names,
)
from cluster.simulation.profile_fit import (
    CopySample,
    StepSample,
    fit_copies,
    fit_link,
    fit_steps,
    fit_with_overhead,
    held_out,
    predict_copy,
    predict_link,
    predict_step,
    relative_error,
    without_overhead,
)
from cluster.simulation.scatter import Scatter
from instance.budget import attended
from instance.step_cost import StepCost

SHAPES = [
    *((length, attended(0, length), 0, 0) for length in (2, 16, 64, 128, 256, 512, 2048)),
    *((length, attended(2048, length), 0, 0) for length in (64, 512)),
    *((0, 0, rows, rows * context) for rows in (1, 4, 16, 48) for context in (64, 512, 2048)),
    *((256, attended(0, 256), rows, 512 * rows) for rows in (8, 24)),
]


def samples(cost: StepCost) -> list[StepSample]:
    return [StepSample(*shape, cost.of(*shape)) for shape in SHAPES]


@pytest.mark.parametrize("name", ["llama-7b-a10", "llama-8b-a10"])
def test_packaged_profiles(name: str) -> None:
    assert name in profile_names()
    profile = load_profile(name)
    assert profile.name == name
    assert parse_profile(format_profile(profile), "x") == profile
    stated = {source.partition(".")[0] for source in profile.sources}
    assert {"step", "copy_out", "copy_in", "link", "num_blocks", "num_host_blocks"} <= stated
    for field in dataclasses.fields(StepCost):
        assert f"step.{field.name}" in profile.sources


def test_the_a10_takes_what_was_published() -> None:
    """Llumnix, figure 10: recomputation, blocking copies and decode steps, in milliseconds."""
    profile = load_profile("llama-7b-a10")
    assert profile.kv_token_bytes == 524_288
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    for length, recompute, copy in zip(
        lengths, (58, 110, 220, 436, 940, 1995), (68, 129, 226, 451, 909, 1682), strict=True
    ):
        seconds = profile.step.of(length, attended(0, length), 0, 0)
        assert 1000 * seconds == pytest.approx(recompute, rel=0.05)
        # A stop, a copy and a start: two messages.
        moved = profile.link.seconds(length * profile.kv_token_bytes) + profile.link.latency
        assert 1000 * moved == pytest.approx(copy, rel=0.10)
    assert 1000 * profile.step.of(0, 0, 32, 8192) == pytest.approx(46.8, rel=0.01)
    assert 1000 * profile.step.of(0, 0, 1, 8192) == pytest.approx(43.62, rel=0.01)
    full = profile.step.of(0, 0, 53, profile.num_blocks * 16)
    assert full / profile.step.of(0, 0, 1, 1) == pytest.approx(2.6, rel=0.02)
    assert profile.num_blocks * 16 == 13_616


def test_llama_8b_follows_from_data_sheets() -> None:
    profile, other = load_profile("llama-8b-a10"), load_profile("llama-7b-a10")
    assert profile.kv_token_bytes == 131_072
    embedding = 128_256 * 4096
    weights = 8.03e9 - embedding
    seven = (6.738e9 - 32_000 * 4096) * 2 / 600e9
    efficiency = seven / other.step.base
    assert profile.step.base == pytest.approx(2 * weights / 600e9 / efficiency, rel=0.01)
    rate = 2 * (6.738e9 - 2 * 32_000 * 4096) / other.step.prefill_token
    assert profile.step.prefill_token == pytest.approx(2 * (weights - embedding) / rate, rel=0.01)
    assert profile.step.context_token == pytest.approx(131_072 / (0.8 * 600e9), rel=0.01)
    room = 0.9 * 23_028 * 2**20 - 16.06e9 - 0.6 * 2**30
    assert profile.num_blocks == pytest.approx(room / profile.block_bytes, rel=0.01)
    assert profile.num_host_blocks == pytest.approx(60e9 / profile.block_bytes, rel=0.01)


def test_files(tmp_path: Path) -> None:
    profile = load_profile("llama-8b-a10")
    path = tmp_path / "mine.yaml"
    path.write_text(format_profile(dataclasses.replace(profile, name="mine")))
    assert load_profile(str(path)) == dataclasses.replace(profile, name="mine")
    assert "scatter" not in path.read_text()
    uneven = dataclasses.replace(profile, scatter=Scatter((0.75, 1.25), 0.2))
    path.write_text(format_profile(uneven))
    assert load_profile(str(path)) == uneven


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"num_blocks": 0}, "num_blocks: 0"),
        ({"num_host_blocks": -1}, "num_host_blocks"),
        ({"overhead": -0.1}, "overhead"),
        ({"name": None}, "name"),
        ({"link": {"bandwidth": 0}}, "link: .*bandwidth"),
        ({"link": {"bandwidth": "fast"}}, "link.bandwidth"),
        ({"link": {"bandwidth": 1, "lag": 2}}, "unknown key link.lag"),
        ({"step": {"base": -1}}, "step: .*base"),
        ({"speed": 3}, "unknown key speed"),
        ({"scatter": {"speeds": [0.9, 1.1]}}, "scatter.spell"),
        ({"scatter": {"speeds": [0.9, 1.0], "spell": 1}}, "scatter: .*mean is 0.95"),
        ({"scatter": {"speeds": [1.0], "spell": 1, "law": "even"}}, "unknown key scatter.law"),
        ({"model": {"name": "m"}}, "model.dtype"),
    ],
)
def test_wrong_profiles(change: dict[str, object], wrong: str) -> None:
    content = yaml.safe_load(format_profile(load_profile("llama-8b-a10")))
    with pytest.raises(ProfileError, match=f"p: .*{wrong}"):
        parse_profile(yaml.safe_dump({**content, **change}), "p")


def test_wrong_files(tmp_path: Path) -> None:
    for text, wrong in (("[]", "mapping"), ("a: [", "not YAML"), ("", "mapping")):
        with pytest.raises(ProfileError, match=wrong):
            parse_profile(text, "p")
    with pytest.raises(ProfileError, match="did you mean llama-7b-a10"):
        load_profile("llama-7b-a100")
    with pytest.raises(ProfileError, match="packaged are"):
        load_profile("zzz")
    with pytest.raises(ProfileError, match=str(tmp_path)):
        load_profile(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"), [("dtype", "int3"), ("head_dim", 0), ("max_model_len", 0)]
)
def test_models_that_make_no_sense(key: str, value: object) -> None:
    profile = load_profile("llama-8b-a10")
    model = dataclasses.replace(profile.model, **{key: value})
    with pytest.raises(ValueError, match=f"model.{key}"):
        dataclasses.replace(profile, model=model)


@given(st.floats(1e3, 1e12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**12))
def test_copies_and_links(bandwidth: float, launch: float, latency: float, size: int) -> None:
    copy, link = CopyCost(bandwidth, launch), LinkCost(bandwidth, launch, latency)
    assert link.seconds(size, 3) == pytest.approx(copy.seconds(size, 3) + latency)
    assert copy.seconds(size, 4) >= copy.seconds(size, 3) >= 3 * launch


# ---- fits

exact = settings(max_examples=25, deadline=None)


@exact
@given(
    st.builds(
        StepCost,
        st.floats(1e-3, 5e-2),
        st.floats(2e-5, 1e-3),
        st.floats(1e-5, 1e-3),
        st.floats(1e-7, 1e-5),
        st.floats(1e-9, 1e-7),
        st.sampled_from([0, 32, 64, 128]),
    )
)
def test_a_fit_finds_what_made_the_samples(cost: StepCost) -> None:
    found = fit_steps(samples(cost))
    assert max(abs(relative_error(one, found)) for one in samples(cost)) < 0.01


@pytest.mark.parametrize("overhead", [0.0, 0.0321])
@pytest.mark.parametrize("hidden", [0, 40])
def test_what_requests_take_beside_their_steps_is_told_apart(overhead: float, hidden: int) -> None:
    cost = StepCost(0.02, 7e-4, 1e-3, 1e-5, 4e-7, hidden)
    steps = [
        StepSample(0, 0, rows, rows * context, cost.of(0, 0, rows, rows * context))
        for rows in (1, 2, 4, 8)
        for context in (28, 268)
    ]
    firsts = [
        StepSample(size, size * size // 2, 0, 0, cost.of(size, size * size // 2, 0, 0) + overhead)
        for size in (2, 16, 32, 64, 128, 256, 512)
    ]
    found, beside = fit_with_overhead(steps, firsts)
    assert beside == pytest.approx(overhead, abs=2e-3)
    for one, step in zip(firsts, without_overhead(firsts, overhead), strict=True):
        assert one.predicted(found) + beside == pytest.approx(one.seconds, rel=0.03)
        assert step.predicted(cost) == pytest.approx(step.seconds)
    with pytest.raises(ValueError, match="first token"):
        fit_with_overhead(steps, [])


def test_held_out_steps_are_predicted() -> None:
    made = samples(load_profile("llama-7b-a10").step)
    told = held_out(made, predict_step)
    assert [sample for sample, _ in told] == made
    for sample, predicted in told:
        assert predicted == pytest.approx(sample.seconds, rel=0.1)


@exact
@given(st.integers(0, 2**32), st.floats(0.0, 0.1))
def test_noise_moves_a_fit_little_and_no_cost_is_negative(seed: int, noise: float) -> None:
    cost = load_profile("llama-7b-a10").step
    factors = 1 + noise * np.random.default_rng(seed).uniform(-1, 1, len(SHAPES))
    noisy = [
        dataclasses.replace(one, seconds=one.seconds * factor)
        for one, factor in zip(samples(cost), factors.tolist(), strict=True)
    ]
    found = fit_steps(noisy)
    assert all(getattr(found, field.name) >= 0 for field in dataclasses.fields(found))
    assert all(abs(relative_error(one, found)) < 2 * noise + 0.02 for one in samples(cost))


@exact
@given(st.floats(1e8, 1e11), st.floats(0, 1e-3))
def test_copies_are_fitted(bandwidth: float, launch: float) -> None:
    cost = CopyCost(bandwidth, launch)
    made = [
        CopySample(copies, size, cost.seconds(size, copies))
        for copies in (1, 8, 64)
        for size in (10**6, 10**8)
    ]
    found = fit_copies(made)
    for sample in made:
        assert sample.predicted(found) == pytest.approx(sample.seconds, rel=0.02)
    for sample, predicted in held_out(made, predict_copy):
        assert predicted == pytest.approx(sample.seconds, rel=0.3)


@exact
@given(st.floats(1e8, 1e11), st.floats(0, 1e-3), st.floats(1e-5, 1e-2))
def test_links_are_fitted(bandwidth: float, launch: float, latency: float) -> None:
    cost = LinkCost(bandwidth, launch, latency)
    made = [
        CopySample(copies, size, cost.seconds(size, copies) + latency)
        for copies in (1, 8, 64)
        for size in (10**6, 10**8)
    ]
    found = fit_link(made)
    for sample in made:
        assert found.seconds(sample.num_bytes, sample.copies) + found.latency == pytest.approx(
            sample.seconds, rel=0.02
        )
    for sample, predicted in held_out(made, predict_link):
        assert predicted == pytest.approx(sample.seconds, rel=0.3)


def test_too_little_to_fit() -> None:
    with pytest.raises(ValueError, match="5 steps are too few"):
        fit_steps(samples(StepCost())[:5])
    one = CopySample(1, 1, 1.0)
    for few in ([], [one]):
        with pytest.raises(ValueError, match="cop"):
            fit_copies(few)
    with pytest.raises(ValueError, match="2 copies"):
        fit_link([one, one])


def test_where_more_bytes_take_no_longer() -> None:
    odd = [CopySample(1, size, seconds) for size, seconds in ((10, 4.0), (100, 2.0), (1000, 1.0))]
    assert fit_copies(odd).bandwidth == 1000
    assert fit_link(odd).bandwidth == 1000


def test_a_profile_is_one_kind_of_instance() -> None:
    assert len({load_profile(name).name for name in profile_names()}) == len(profile_names())
    assert all(isinstance(load_profile(name), CostProfile) for name in profile_names())
