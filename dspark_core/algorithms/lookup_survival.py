"""How likely looked-up tokens stand, learned from what became of earlier ones.

The longer the text has agreed with its earlier place, the likelier the next token agrees too, and
every accepted token makes the agreement longer. So one number per length of agreement tells the
whole block: survival a_k is the product of the rates at lengths m, m + 1, ..., m + k - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_core.algorithms.suffix_match import MAX_MATCH

PRIOR_RATES = (0.24, 0.5, 0.64, 0.7, 0.73, 0.75, 0.78, 0.8, 0.85, 0.88, 0.9, 0.91, 0.92, 0.92, 0.93, 0.94)
"""By length of agreement 1, 2, ...: measured on greedy answers to the benchmarks of docs/results.md."""
PRIOR_WEIGHT = 4.0
"""Tokens that the prior counts for."""
MEMORY = 0.995
"""What of the counts is kept with each token judged at that length: the last two hundred matter."""


@dataclass(slots=True)
class LookupSurvival:
    """Of requests that are sampled alike. Feed every verified block to `learn`."""

    _accepted: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT * rate for rate in PRIOR_RATES])
    _judged: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT] * len(PRIOR_RATES))

    def confidences(self, agreed: int, count: int) -> tuple[float, ...]:
        """c_1, ... c_count of a block looked up where `agreed` >= 1 tokens agree."""
        rates = [a / j for a, j in zip(self._accepted, self._judged, strict=True)]
        return tuple(rates[min(agreed + k, MAX_MATCH) - 1] for k in range(count))

    def learn(self, agreed: int, verified: int, accepted: int) -> None:
        """The first `accepted` of `verified` tokens stood; those after the first loss were not judged."""
        for k in range(min(accepted + 1, verified)):
            place = min(agreed + k, MAX_MATCH) - 1
            self._accepted[place] = MEMORY * self._accepted[place] + (k < accepted)
            self._judged[place] = MEMORY * self._judged[place] + 1.0
