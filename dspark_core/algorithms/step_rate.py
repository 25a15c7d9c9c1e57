"""How long a target pass takes as a function of its batch tokens: the paper's SPS(B).

A curve is measured once at start, refined by `observed` while serving, and travels as a plain
dictionary. No torch here, so the scheduler's image stays small.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepRateCurve:
    """Measured points, linear in between.

    Below the first point a step takes as long as there; beyond the last it goes on at the last
    slope, or stays level where that slope is negative.
    """

    batch_tokens: tuple[int, ...]
    """Strictly increasing, at least 1."""
    step_seconds: tuple[float, ...]
    """Positive and finite, one for each entry of `batch_tokens`."""

    def __post_init__(self) -> None:
        tokens, seconds = self.batch_tokens, self.step_seconds
        if not tokens:
            raise ConfigError("batch_tokens of a step-rate curve must not be empty")
        if len(tokens) != len(seconds):
            raise ConfigError(
                f"step_seconds must have one value for each of {len(tokens)} batch_tokens, got {len(seconds)}"
            )
        if tokens[0] < 1 or any(a >= b for a, b in pairwise(tokens)):
            raise ConfigError(f"batch_tokens must be >= 1 and strictly increasing, got {tokens}")
        for count, value in zip(tokens, seconds, strict=True):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"step_seconds at {count} batch tokens must be positive, got {value}")

    def seconds(self, batch_tokens: int) -> float:
        """Expected duration of a step over so many tokens."""
        tokens, seconds = self.batch_tokens, self.step_seconds
        if batch_tokens > tokens[-1] and len(tokens) > 1:
            slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])
            return seconds[-1] + max(slope, 0.0) * (batch_tokens - tokens[-1])
        return sum(share * seconds[index] for index, share in self._shares(batch_tokens))

    def steps_per_second(self, batch_tokens: int) -> float:
        return 1.0 / self.seconds(batch_tokens)

    def with_overhead(self, seconds: float) -> StepRateCurve:
        """The curve of whole rounds: each step also waits `seconds` for drafts and the network."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"overhead seconds must be >= 0, got {seconds}")
        return StepRateCurve(self.batch_tokens, tuple(value + seconds for value in self.step_seconds))

    def monotone(self) -> StepRateCurve:
        """The nearest curve (least squares) that never falls: measuring noise is no reason to think
        a larger batch faster, and a dip would stop or mislead the planner."""
        pools: list[tuple[float, int]] = []  # mean, points; adjacent violators are merged
        for value in self.step_seconds:
            mean, count = value, 1
            while pools and pools[-1][0] >= mean:
                previous, points = pools.pop()
                mean = (previous * points + mean * count) / (points + count)
                count += points
            pools.append((mean, count))
        return StepRateCurve(self.batch_tokens, tuple(mean for mean, count in pools for _ in range(count)))

    def observed(
        self, batch_tokens: int, seconds: float, *, rate: float = 0.05, clip: float = 2.0
    ) -> StepRateCurve:
        """Moves the points next to a step that was timed towards it.

        Exponential averaging of the ratio to the expectation, shared between the two points by
        nearness; `clip` bounds what one outlier (a stall, a cold cache) can do.
        """
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens of an observed step must be >= 1, got {batch_tokens}")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"seconds of an observed step must be positive, got {seconds}")
        if not (0.0 < rate <= 1.0 and clip > 1.0):
            raise ConfigError(f"rate must be in (0, 1] and clip > 1, got {rate} and {clip}")
        ratio = min(max(seconds / self.seconds(batch_tokens), 1.0 / clip), clip)
        updated = list(self.step_seconds)
        for index, share in self._shares(batch_tokens):
            updated[index] *= 1.0 + rate * share * (ratio - 1.0)
        return StepRateCurve(self.batch_tokens, tuple(updated))

    def _shares(self, batch_tokens: int) -> tuple[tuple[int, float], ...]:
        """Points that speak for a batch size, with their weights."""
        tokens = self.batch_tokens
        if batch_tokens <= tokens[0]:
            return ((0, 1.0),)
        if batch_tokens >= tokens[-1]:
            return ((len(tokens) - 1, 1.0),)
        right = bisect_left(tokens, batch_tokens)
        share = (batch_tokens - tokens[right - 1]) / (tokens[right] - tokens[right - 1])
        return ((right - 1, 1.0 - share), (right, share))

    def to_dict(self) -> dict[str, list[int] | list[float]]:
        """JSON-able; `from_dict` is its inverse."""
        return {"batch_tokens": list(self.batch_tokens), "step_seconds": list(self.step_seconds)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> StepRateCurve:
        """Raises `ConfigError` naming the field that is missing or not a list of numbers."""
        tokens = _numbers(data, "batch_tokens")
        if not all(value.is_integer() for value in tokens):
            raise ConfigError(f"batch_tokens must be whole numbers, got {tokens}")
        return cls(tuple(int(value) for value in tokens), tuple(_numbers(data, "step_seconds")))


def _numbers(data: Mapping[str, object], field: str) -> list[float]:
    values = data.get(field)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{field} of a step-rate curve must be a list of numbers, got {values!r}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ConfigError(f"{field} of a step-rate curve must be a list of numbers, got {values!r}")
    return [float(value) for value in values]
