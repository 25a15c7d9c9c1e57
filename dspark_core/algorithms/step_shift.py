"""Detects from a few steps how a machine changed: slower overall, or only per added token.

A throttled processor is slower at everything. One that lost or shares cores reads weights as fast as before
but computes slower, so a step of single tokens takes as long as before while every draft token costs more.
Planning with a slower machine overall would then be wrong, because it does not change how much to
verify. The two are indistinguishable while all steps hold the same; steps with and without draft tokens
tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Final

KEPT_STEPS = 16
CHANGE_STEPS = 4
"""The machine has changed if this many steps in a row of one kind, with added tokens or without, are all much
too slow or all much too fast. Stalls rarely look like this."""
FEW_STEPS = 3
"""Minimum number of steps for a median, so that a single stall does not count."""
SETTLED_STEPS = 8
"""Number of steps after a change that are collected to tell its kind."""
SURPRISING = math.log(1.4)
"""Smaller deviations are left to the slower learning of points and scale."""
APART = 0.25
"""Minimum `added` of steps that count as holding more than single tokens."""


@dataclass(frozen=True, slots=True)
class TakenStep:
    added: float
    """Profiled extra time of its draft tokens, relative to the same requests without them."""
    taken: float
    """Measured time, relative to the profiled time of the same requests without draft tokens."""
    surprise: float
    """Log ratio of measured to expected time."""


@dataclass(frozen=True, slots=True)
class StepHistory:
    """The latest steps, or those since the machine last changed; immutable."""

    steps: tuple[TakenStep, ...] = ()
    changed: bool = False
    """Whether the steps start with a change."""

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
        """The machine just changed, and steps of single tokens are needed to tell how."""
        if not self.changed or len(self.steps) >= SETTLED_STEPS:
            return False
        low, high = self._kinds()
        return len(low) < FEW_STEPS <= len(high)

    def shift(self) -> tuple[float, float | None] | None:
        """(overall slowdown relative to the profile, further slowdown of added tokens or None if no step had
        any) since the last change; None: no change, or its kind is still unknown."""
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
        """The latest steps with few or no added tokens, and the latest with many."""
        latest = FEW_STEPS + 2
        low = [step for step in self.steps if step.added < APART / 2]
        return low[-latest:], [step for step in self.steps if step.added >= APART][-latest:]


NO_HISTORY: Final = StepHistory()
