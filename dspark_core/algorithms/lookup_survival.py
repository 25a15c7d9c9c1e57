"""Corrects the predicted acceptance of looked-up tokens by how such predictions fared recently.

Predictions were measured on answers of many kinds, while the sampling settings and the prompt shift the
actual rates. So each prediction is corrected by the recent error of predictions of similar size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

CLASSES = 10
"""Predictions in [0, 0.1), [0.1, 0.2), ... are corrected separately."""
PRIOR_WEIGHT = 4.0
"""Weight of the initial assumption that predictions are right, in tokens."""
MEMORY = 0.995
"""Decay per token judged in a class: about the last two hundred count."""
LEAST, MOST = 0.01, 0.99


@dataclass(slots=True)
class LookupSurvival:
    """For requests that are sampled alike. Every verified block goes to `learn`."""

    _surprise: list[float] = field(default_factory=lambda: [0.0] * CLASSES)
    """Accepted minus predicted, decayed."""
    _judged: list[float] = field(default_factory=lambda: [0.0] * CLASSES)
    _shifts: list[float] = field(default_factory=lambda: [0.0] * CLASSES)

    def confidences(self, promised: Sequence[float]) -> tuple[float, ...]:
        """Corrected c_1, c_2, ... of a block whose predictions are `promised`."""
        shifts = self._shifts
        return tuple([min(max(p + shifts[_class_of(p)], LEAST), MOST) for p in promised])

    def learn(self, promised: Sequence[float], verified: int, accepted: int) -> None:
        """Learns from one block; tokens after the first rejected one were not judged."""
        for place, promise in enumerate(promised[: min(accepted + 1, verified)]):
            known = _class_of(promise)
            self._surprise[known] = MEMORY * self._surprise[known] + (place < accepted) - promise
            self._judged[known] = MEMORY * self._judged[known] + 1.0
            self._shifts[known] = self._surprise[known] / (self._judged[known] + PRIOR_WEIGHT)


def _class_of(promise: float) -> int:
    return min(int(promise * CLASSES), CLASSES - 1)
