"""Speeds of instances, as far as noisy measurements tell them apart."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.events import Joined, PlaceRequested, Reported
from cluster.dispatcher.speeds import ALIKE, MOST, Speeds
from instance.budget import StepCosts
from tests.unit.dispatching import ask, dispatcher, info, placed, report, sequence

TRUE = StepCosts(0.024, 2e-4, 1e-8, 1e-4, 2.4e-6)


def scaled(factor: float) -> StepCosts:
    return StepCosts(
        TRUE.base * factor,
        TRUE.prefill * factor,
        TRUE.prefill_context * factor,
        TRUE.decode * factor,
        TRUE.decode_context * factor,
    )


@given(
    st.lists(st.floats(0.2, 5.0), min_size=1, max_size=40),
    st.integers(2, 8),
    st.randoms(use_true_random=False),
)
def test_equal_instances_that_measure_the_same_in_another_order_are_alike(
    figures: list[float], count: int, rng: random.Random
) -> None:
    speeds = Speeds()
    for number in range(count):
        rng.shuffle(figures)
        for factor in figures:
            speeds.observe(number, scaled(factor))
    # A figure told twice in a row counts once, so means may differ by what fell together.
    if len(set(figures)) == len(figures):
        assert speeds.relative() == {}


def test_equal_instances_seldom_differ_however_noisy_their_figures() -> None:
    rng = random.Random(1)
    told_apart = 0
    for _ in range(50):
        speeds = Speeds()
        for number in range(16):
            for _ in range(30):
                speeds.observe(number, scaled(math.exp(rng.gauss(0.0, 0.5))))
        told_apart += len(speeds.relative())
    assert told_apart <= 50 * 16 * 0.01


@given(
    st.lists(st.floats(0.05, 20.0), min_size=2, max_size=12), st.integers(1, 60), st.floats(0, 0.05)
)
def test_speeds_lie_between_the_common_and_the_measured_one(
    factors: list[float], figures: int, noise: float
) -> None:
    rng, speeds = random.Random(7), Speeds()
    for _ in range(figures):
        for number, factor in enumerate(factors):
            speeds.observe(number, scaled(factor * math.exp(rng.uniform(-noise, noise))))
    ordered = sorted(factors)
    half = len(ordered) // 2
    centre = math.sqrt(ordered[half] * ordered[-half - 1])
    slack = 1 + 4 * noise + 1e-9
    for number, speed in speeds.relative().items():
        assert 1 / MOST <= speed <= MOST
        assert speed >= ALIKE or speed <= 1 / ALIKE
        raw = centre / factors[number]
        assert (speed <= raw * slack) if speed > 1 else (speed >= raw / slack)


def test_another_kind_of_device_is_told_apart() -> None:
    rng, speeds = random.Random(3), Speeds()
    for _ in range(40):
        for number in range(8):
            kind = 1 / 3 if number == 0 else 1.0
            speeds.observe(number, scaled(kind * math.exp(rng.gauss(0.0, 0.1))))
    found = speeds.relative()
    assert set(found) == {0}
    assert 2.2 < found[0] < 3.2
    # One that started anew is not judged by its former life.
    speeds.forget(0)
    assert speeds.relative() == {}


def test_costs_that_make_no_sense_are_not_learned_from() -> None:
    speeds = Speeds()
    assert not speeds.observe(0, None)
    assert not speeds.observe(0, StepCosts())
    assert speeds.observe(0, TRUE)
    assert not speeds.observe(0, TRUE)


def test_a_faster_instance_is_given_more() -> None:
    core = dispatcher()
    numbers = iter(range(1, 1000))
    for name in ("slow", "fast"):
        core.handle(Joined(info(name)), 0.0)
    busy = {"slow": (), "fast": (sequence("other", 300),)}
    for step in range(40):
        for name, held in busy.items():
            costs = scaled((1.0 if name == "slow" else 0.25) * (1 + 0.001 * (step % 2)))
            told = report(name, next(numbers), held, costs=costs)
            core.handle(Reported(told), 0.0)
    assert placed(core.handle(PlaceRequested(ask("r")), 0.1)) == ["fast"]
