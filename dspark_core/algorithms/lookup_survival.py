"""How likely looked-up tokens stand, given what was promised of earlier ones and what became of them.

What is promised was measured on answers of many kinds; how a request is sampled, and what is asked,
moves it. So promises are corrected by how wrong promises like them were of late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

CLASSES = 10
"""Promises of [0, 0.1), [0.1, 0.2), ... are corrected apart."""
PRIOR_WEIGHT = 4.0
"""Tokens of whose promises nothing is doubted, to begin with."""
MEMORY = 0.995
"""What is kept with each token judged in its class: the last two hundred matter."""
LEAST, MOST = 0.01, 0.99


@dataclass(slots=True)
class LookupSurvival:
    """Of requests that are sampled alike. Feed every verified block to `learn`."""

    _surprise: list[float] = field(default_factory=lambda: [0.0] * CLASSES)
    """Accepted less promised."""
    _judged: list[float] = field(default_factory=lambda: [0.0] * CLASSES)
    _shifts: list[float] = field(default_factory=lambda: [0.0] * CLASSES)

    def confidences(self, promised: Sequence[float]) -> tuple[float, ...]:
        """c_1, c_2, ... of a block of which so much is `promised`, token by token."""
        shifts = self._shifts
        return tuple([min(max(p + shifts[_class_of(p)], LEAST), MOST) for p in promised])

    def learn(self, promised: Sequence[float], verified: int, accepted: int) -> None:
        """The first `accepted` of `verified` tokens stood; those after the first loss were not judged."""
        for place, promise in enumerate(promised[: min(accepted + 1, verified)]):
            known = _class_of(promise)
            self._surprise[known] = MEMORY * self._surprise[known] + (place < accepted) - promise
            self._judged[known] = MEMORY * self._judged[known] + 1.0
            self._shifts[known] = self._surprise[known] / (self._judged[known] + PRIOR_WEIGHT)


def _class_of(promise: float) -> int:
    return min(int(promise * CLASSES), CLASSES - 1)
