"""How long steps take, learned from those that ran, and how much prefill a step may hold.

A decode waits for whatever shares its step. The learner fits the duration of a step as a
sum of non-negative costs, and the budget bounds the prefill tokens so that the step stays
inside the tightest target of the time per output token in its batch (chunked prefill under
a budget: Sarathi-Serve, OSDI '24; there the budget is profiled once and fixed).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from instance.fit import Fit
from instance.request import RequestClass, StepPlan

STRETCH = 3.5
"""Where no target is set: a step with prefill may take so many times one without."""
STRETCH_FOR_LESS_URGENT = 1.3
"""The same where the prefill is of a class less urgent than one of the decodes'. About as many
prompt positions cost little beside the weights that the decodes have read in any case."""
SLOWEST = 4.2
"""The slowest percentile of them may take so many times one without: where steps vary much,
prefill is given less than ``STRETCH`` allows."""
_TAIL = 4.0  # that percentile, in mean deviations (of a Laplace distribution: 3.9)
_LEAST_STRETCH = 2.0
MIN_CHUNK = 16
"""Prefill tokens that a step may always hold, so that prefills end under any target."""


class StepShape(NamedTuple):
    """What the duration of a step depends on.

    Attributes:
        prefill: Positions of rows that have several.
        prefill_context: Sum over them of the positions that each attends to.
        decodes: Rows of one position.
        decode_context: Sum over them of the positions that each attends to.
    """

    prefill: int = 0
    prefill_context: int = 0
    decodes: int = 0
    decode_context: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """The shape of a planned step."""
        prefill = prefill_context = decodes = decode_context = 0
        for _, start, length, _ in plan.rows:
            if length == 1:
                decodes += 1
                decode_context += start + 1
            else:
                prefill += length
                prefill_context += attended(start, length)
        return cls(prefill, prefill_context, decodes, decode_context)


def attended(start: int, length: int) -> int:
    """Sum of the positions that the positions from ``start`` on attend to, themselves too."""
    return length * start + length * (length + 1) // 2


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds: per step, and per unit of each field of ``StepShape``."""

    base: float = 0.0
    prefill: float = 0.0
    prefill_context: float = 0.0
    decode: float = 0.0
    decode_context: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """Expected duration of a step."""
        return (
            self.base
            + self.prefill * shape.prefill
            + self.prefill_context * shape.prefill_context
            + self.decode * shape.decodes
            + self.decode_context * shape.decode_context
        )

    def prefill_seconds(self, start: int, length: int) -> float:
        """What so many positions from ``start`` on add to the steps that compute them."""
        return self.prefill * length + self.prefill_context * attended(start, length)

    def prefill_within(self, seconds: float, start: int) -> float:
        """Most positions from ``start`` on that prefill computes in a time; may be infinite."""
        if seconds <= 0.0 or seconds == math.inf:
            return max(0.0, seconds)
        # length * a + length**2 * b = seconds
        a = self.prefill + self.prefill_context * (start + 0.5)
        b = self.prefill_context / 2
        if b > 0.0:
            return 2 * seconds / (a + math.sqrt(a * a + 4 * b * seconds))
        return seconds / a if a > 0.0 else math.inf


# Seconds before anything is measured: a step, a prefill position, a query-key pair of
# prefill, a decode row, a position that it reads. A guess for prefill that is too low would
# never be mended by trying: KV would be computed anew rather than copied.
_PRIOR = (1e-3, 2e-4, 1e-9, 1e-4, 1e-9)
# Weight that older steps keep at each new one.
_MEMORY = 0.99
# A step further from the fit than this many mean deviations counts as if it were as far; the
# deviations are relative to the fit, and never taken to be less than the least.
_CLIP = 3.0
_LEAST_DEVIATION = 0.02
_DEVIATION_SHARE = 0.1
_TRUSTED_AFTER = 8


class StepCostLearner:
    """Fits ``StepCosts`` to the steps as they end.

    Residuals are clipped, so that a step that the machine held up moves the fit little,
    while a lasting change is followed within some steps.

    Attributes:
        samples: Steps learned from.
        prefill_samples: Of these, steps that held prefill.
        deviation: How far steps are from the fit, relative to it: a mean of the latest.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.prefill_samples = 0
        self._fit = Fit(_PRIOR, _MEMORY)
        self._costs: StepCosts | None = None
        self.deviation = _LEAST_DEVIATION

    @property
    def costs(self) -> StepCosts:
        """The present fit; a guess before the first step."""
        if self._costs is None:
            self._costs = StepCosts(*self._fit.costs.tolist())
        return self._costs

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long; what is not a positive time is ignored."""
        if not 0.0 < seconds < math.inf or not (shape.prefill or shape.decodes):
            return
        # The first steps, and the first with prefill, have nothing to be compared with.
        if self.samples >= _TRUSTED_AFTER and (self.prefill_samples or not shape.prefill):
            seconds = self._clipped(seconds, self.costs.seconds(shape))
        self.samples += 1
        self.prefill_samples += bool(shape.prefill)
        self._fit.observe((1, *shape), seconds)
        self._costs = None

    def _clipped(self, seconds: float, expected: float) -> float:
        if expected <= 0.0:
            return seconds
        off = abs(seconds / expected - 1.0)
        within = min(off, _CLIP * self.deviation)
        deviation = self.deviation + _DEVIATION_SHARE * (within - self.deviation)
        self.deviation = max(_LEAST_DEVIATION, deviation)
        return expected * max(_LEAST_DEVIATION, 1.0 + math.copysign(within, seconds - expected))


class TokenBudget:
    """Bounds the prefill of a step by what its decodes can bear.

    Args:
        max_tokens: Of a step, decodes included.
        targets: Seconds per output token that each class may take, by class; 0 stands for
            ``stretch`` times the same step without prefill, or ``STRETCH_FOR_LESS_URGENT``
            times beside prefill of a less urgent class.

    Attributes:
        learner: Fed with every step that is worth it.
        prefill: What the last bounded step was allowed, in tokens.
    """

    def __init__(self, max_tokens: int, targets: tuple[float, ...] = ()) -> None:
        self.max_tokens = max_tokens
        self.learner = StepCostLearner()
        self.prefill = max_tokens
        self._targets = (*targets, *(0.0,) * (len(RequestClass) - len(targets)))
        self._had_prefill = False

    @property
    def learned(self) -> bool:
        """A step with prefill was measured, so that more can be told than ``max_tokens``."""
        return self.learner.prefill_samples > 0

    @property
    def stretch(self) -> float:
        """``STRETCH``, or less where the steps vary so much that their slowest percentile
        would take longer than ``SLOWEST`` allows."""
        within = SLOWEST / (1.0 + _TAIL * self.learner.deviation)
        return max(_LEAST_STRETCH, min(STRETCH, within))

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step ended. Of those that only decode the first after one with prefill counts:
        the others are like it, and would outweigh the few that tell what prefill costs."""
        if not plan.rows:
            return
        last = plan.rows[-1]
        prefill = last.length > 1 or not last.samples
        if prefill or self._had_prefill:
            self.learner.observe(StepShape.of(plan), seconds)
        self._had_prefill = prefill

    def beside(self, decodes: int) -> int:
        """Prefill tokens that a step with so many decodes has, going by the last one."""
        return max(0, min(self.prefill, self.max_tokens - decodes))

    def allow(
        self,
        decodes: int,
        decode_context: int,
        classes: Iterable[RequestClass],
        start: int,
        prompt: RequestClass,
    ) -> int:
        """Prefill tokens that may join a step of decodes.

        Args:
            decodes: Rows that decode.
            decode_context: Sum of the positions they attend to.
            classes: Those of the decodes.
            start: Where the first prefill goes on in its sequence.
            prompt: The class of that prefill.
        """
        most = self.max_tokens - decodes
        self.prefill = most
        if decodes and self.learned:
            costs = self.learner.costs
            alone = costs.seconds(StepShape(decodes=decodes, decode_context=decode_context))
            stretch = self.stretch
            gentle = min(stretch, STRETCH_FOR_LESS_URGENT)
            # Of several targets the tightest counts; a step alone may exceed it already.
            target = min(
                (
                    self._targets[one] or (gentle if one < prompt else stretch) * alone
                    for one in set(classes)
                ),
                default=math.inf,
            )
            within = costs.prefill_within(target - alone, start)
            self.prefill = max(min(MIN_CHUNK, most), int(min(within, most)))
        return self.prefill
