"""Tells from a few steps how a machine changed: slower as a whole, or for each token that is added.

A throttled processor is slower at everything. One that lost cores, or shares them, reads weights as fast as
before and computes slower, so that a step of single tokens takes what it did and every draft token more: to
plan by a slower machine is wrong then, as it changes nothing about how much to verify. The two look alike as
long as all steps hold as much; steps with and without draft tokens tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Final

KEPT_STEPS = 16
CHANGE_STEPS = 4
"""So many in a row of one kind, with added tokens or without, all much too slow or all much too fast: the
machine is another one. Stalls seldom come like this."""
FEW_STEPS = 3
"""Medians of so many are believed: one of them may be a stall."""
SETTLED_STEPS = 8
"""After a change, until which steps are gathered to tell what it was."""
SURPRISING = math.log(1.4)
"""What is less is left to the slower learning of points and scale."""
APART = 0.25
"""By how much steps must differ in what they hold to be compared, in parts of a step of single tokens."""


@dataclass(frozen=True, slots=True)
class TakenStep:
    added: float
    """By the profile, what its draft tokens add to a step of the same requests, in parts of that."""
    taken: float
    """What it took, in parts of such a step."""
    surprise: float
    """Log ratio to what was expected of it."""


@dataclass(frozen=True, slots=True)
class StepHistory:
    """The latest steps, or those since the machine changed; immutable."""

    steps: tuple[TakenStep, ...] = ()
    changed: bool = False
    """The steps begin with a change."""

    def after(self, step: TakenStep) -> StepHistory:
        steps = (*self.steps[1 - KEPT_STEPS :], step)
        changed = self.changed and len(self.steps) < KEPT_STEPS
        if changed and len(steps) < SETTLED_STEPS:
            return StepHistory(steps, changed)
        alike = [i for i, one in enumerate(steps) if (one.added < APART) == (step.added < APART)]
        latest = [steps[index].surprise for index in alike[-CHANGE_STEPS:]]
        if len(latest) == CHANGE_STEPS and (min(latest) > SURPRISING or max(latest) < -SURPRISING):
            return StepHistory(steps[alike[-CHANGE_STEPS] :], changed=True)
        return StepHistory(steps, changed)

    @property
    def ambiguous(self) -> bool:
        """The machine changed a moment ago, and steps of single tokens would tell how."""
        if not self.changed or len(self.steps) >= SETTLED_STEPS:
            return False
        low, high = self._kinds()
        return len(low) < FEW_STEPS <= len(high)

    def shift(self) -> tuple[float, float | None] | None:
        """How many times as slow as profiled since it changed, as a whole, and beyond that for added tokens
        (None: nothing was added). None: it did not change, or how cannot be told."""
        if not self.changed:
            return None
        low, high = self._kinds()
        if len(low) < FEW_STEPS or 0 < len(high) < FEW_STEPS:
            return None
        base, base_added = median(one.taken for one in low), median(one.added for one in low)
        if not high:
            return base / (1.0 + base_added), None
        top, top_added = median(one.taken for one in high), median(one.added for one in high)
        slope = max((top - base) / (top_added - base_added), 0.0)
        whole = base - slope * base_added
        return (whole, slope / whole) if whole > 0.0 else None

    def _kinds(self) -> tuple[list[TakenStep], list[TakenStep]]:
        """The latest that hold single tokens or hardly more, and those that hold much more."""
        latest = FEW_STEPS + 2
        low = [step for step in self.steps if step.added < APART / 2]
        return low[-latest:], [step for step in self.steps if step.added >= APART][-latest:]


NO_HISTORY: Final = StepHistory()
