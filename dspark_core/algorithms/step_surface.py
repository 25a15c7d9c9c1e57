"""Interpolates scattered step-time points: rows of equal request count, plus the cost of context.

Within a row, step time is linear between points. Between rows it is mixed at the *same batch
tokens*, so that a staircase (padded token buckets, tile sizes) stays in place; a row that does
not reach there is continued parallel to its neighbour, which makes the surface exact wherever the
truth is linear. Context adds its fitted cost per token read and per token attended to.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark_core.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One measured step."""

    requests: int
    batch_tokens: int
    """Total over all requests: anchors and draft tokens."""
    context_tokens: int
    """Tokens already cached, summed over the requests."""
    seconds: float

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ConfigError(f"requests of a step must be >= 1, got {self.requests}")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens of a step must be >= 1, got {self.batch_tokens}")
        if self.context_tokens < 0:
            raise ConfigError(f"context_tokens of a step must be >= 0, got {self.context_tokens}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(
                f"seconds of a step over {self.batch_tokens} tokens must be positive, got {self.seconds}"
            )


class _Row:
    """Points of one request count at the reference context, by batch tokens."""

    def __init__(self, requests: int, points: Sequence[tuple[int, StepPoint]]) -> None:
        ordered = sorted(points, key=lambda pair: pair[1].batch_tokens)
        self.requests = requests
        self.indices = [index for index, _ in ordered]
        self._index_array = np.array(self.indices)
        self.tokens = np.array([point.batch_tokens for _, point in ordered], dtype=np.float64)
        self.token_list = [point.batch_tokens for _, point in ordered]
        self.first, self.last = self.token_list[0], self.token_list[-1]

    def at(self, tokens: Floats, point_seconds: Floats) -> Floats:
        """Constant below the first point, extrapolated at the last slope (never negative) beyond the last."""
        seconds = point_seconds.take(self._index_array)
        inside: Floats = np.interp(tokens, self.tokens, seconds)
        if len(seconds) > 1 and tokens.size and tokens[-1] > self.last:
            slope = (seconds[-1] - seconds[-2]) / (self.tokens[-1] - self.tokens[-2])
            inside = inside + max(float(slope), 0.0) * np.maximum(tokens - self.last, 0.0)
        return inside

    def one(self, tokens: float, measured: Sequence[float], corrections: Sequence[float]) -> float:
        """`at` for one batch size, in scalar arithmetic."""
        if tokens <= self.first or len(self.indices) == 1:
            return _corrected(self.indices[0], measured, corrections)
        right = min(bisect_left(self.token_list, tokens), len(self.indices) - 1)
        left_tokens, right_tokens = self.token_list[right - 1], self.token_list[right]
        before = _corrected(self.indices[right - 1], measured, corrections)
        after = _corrected(self.indices[right], measured, corrections)
        slope = (after - before) / (right_tokens - left_tokens)
        if tokens > right_tokens:
            return after + max(slope, 0.0) * (tokens - right_tokens)
        return before + slope * (tokens - left_tokens)

    def shares(self, tokens: int) -> list[tuple[int, float]]:
        """Points that determine the time at a batch size, with their weights."""
        if tokens <= self.first:
            return [(self.indices[0], 1.0)]
        if tokens >= self.last:
            return [(self.indices[-1], 1.0)]
        right = bisect_left(self.token_list, tokens)
        left_tokens, right_tokens = self.token_list[right - 1], self.token_list[right]
        share = (tokens - left_tokens) / (right_tokens - left_tokens)
        return [(self.indices[right - 1], 1.0 - share), (self.indices[right], share)]


class StepSurface:
    """Geometry of the points. Corrections are passed with each call, as they change every round."""

    def __init__(self, points: Sequence[StepPoint]) -> None:
        if not points:
            raise ConfigError("points of a step-time model must not be empty")
        self.context_per_request = _reference_context(points)
        by_requests: dict[int, list[tuple[int, StepPoint]]] = defaultdict(list)
        for index, point in enumerate(points):
            if self._extra_context(point.requests, point.context_tokens) == 0:
                by_requests[point.requests].append((index, point))
        _refuse_duplicates(by_requests)
        self._rows = [_Row(requests, row) for requests, row in sorted(by_requests.items())]
        self._row_requests = [row.requests for row in self._rows]
        self._measured = np.array([point.seconds for point in points])
        self._measured_list = [point.seconds for point in points]
        self.per_context_token, self.per_attended_token = self._fit_context(points)

    def seconds(
        self, requests: int, tokens: Floats, context_tokens: int, corrections: Sequence[float] = ()
    ) -> Floats:
        """Seconds at ascending batch tokens [n] -> [n]."""
        measured = self._measured
        if corrections:
            measured = measured * np.exp(corrections)
        base = self._base(requests, tokens, measured)
        extra = self._extra_context(requests, context_tokens)
        if extra == 0 or (self.per_context_token == 0 and self.per_attended_token == 0):
            return base
        cost = extra * (self.per_context_token + self.per_attended_token / requests * tokens)
        # Far below the reference context the fit must not approach zero.
        return np.maximum(base + cost, 0.25 * base)

    def at(
        self, requests: int, tokens: float, context_tokens: int, corrections: Sequence[float] = ()
    ) -> float:
        """`seconds` of one step, in scalar arithmetic if its row was measured: numpy on single elements is
        several times slower, and rounds of one request use little else."""
        low, high, _ = self._between(requests)
        if low is not high:
            given = np.array([tokens], dtype=np.float64)
            return float(self.seconds(requests, given, context_tokens, corrections)[0])
        base = low.one(tokens, self._measured_list, corrections)
        extra = self._extra_context(requests, context_tokens)
        cost = extra * (self.per_context_token + self.per_attended_token / requests * tokens)
        return max(base + cost, 0.25 * base)

    def shares(self, requests: int, tokens: int) -> list[tuple[int, float]]:
        """Points that determine a step's time, with weights that sum to one."""
        low, high, weight = self._between(requests)
        if low is high:
            return low.shares(tokens)
        weight = min(weight, 1.0)
        return [(index, (1.0 - weight) * share) for index, share in low.shares(tokens)] + [
            (index, weight * share) for index, share in high.shares(tokens)
        ]

    def _base(self, requests: int, tokens: Floats, measured: Floats) -> Floats:
        """Seconds at the reference context."""
        low, high, weight = self._between(requests)
        if low is high:
            return low.at(tokens, measured)
        at_low, at_high = low.at(tokens, measured), high.at(tokens, measured)
        below, above = at_low, at_high
        low_end, high_start = measured[low.indices[-1]], measured[high.indices[0]]
        # Where a row is continued, the other's steepest or noisiest piece must not carry it below both.
        if tokens.size and tokens[0] < high.first:
            edge = np.array([float(high.first)])
            parallel = high_start + at_low - low.at(edge, measured)
            least = np.minimum(at_low, high_start)
            if low.last < high.first:  # nothing was measured in between, so a line is the best guess
                least = np.interp(tokens, (low.last, high.first), (low_end, high_start))
                least = np.where(tokens > low.last, least, np.minimum(at_low, high_start))
            above = np.where(tokens < high.first, np.maximum(parallel, least), at_high)
        if tokens.size and tokens[-1] > low.last and high.last > low.last:
            edge = np.array([float(low.last)])
            parallel = low_end + at_high - high.at(edge, measured)
            below = np.where(tokens > low.last, np.maximum(parallel, np.minimum(low_end, at_high)), at_low)
        if weight > 1:  # beyond the last row, where more requests are never assumed to be cheaper
            return below + weight * np.maximum(above - below, 0.0)
        mixed: Floats = (1.0 - weight) * below + weight * above
        return mixed

    def _between(self, requests: int) -> tuple[_Row, _Row, float]:
        """The rows around a request count and the weight of the second; above 1 beyond the last row."""
        rows = self._rows
        if len(rows) == 1 or requests <= rows[0].requests:
            return rows[0], rows[0], 0.0
        right = min(bisect_left(self._row_requests, requests), len(rows) - 1)
        low, high = rows[right - 1], rows[right]
        if requests == high.requests:
            return high, high, 0.0
        return low, high, (requests - low.requests) / (high.requests - low.requests)

    def _extra_context(self, requests: int, context_tokens: int) -> float:
        """Context in excess of the rows' reference; 0 if the profile never varied the context."""
        # Compared as it was divided: multiplied back, many quotients differ from it in the last bit.
        if self.context_per_request is None or context_tokens / requests == self.context_per_request:
            return 0.0
        return context_tokens - self.context_per_request * requests

    def _fit_context(self, points: Sequence[StepPoint]) -> tuple[float, float]:
        """Seconds per context token, and per pair of query and context token, both >= 0."""
        factors, targets = [], []
        for point in points:
            extra = self._extra_context(point.requests, point.context_tokens)
            if extra != 0:
                base = self._base(point.requests, np.array([float(point.batch_tokens)]), self._measured)
                factors.append((extra, extra * point.batch_tokens / point.requests))
                targets.append(point.seconds - float(base[0]))
        if not factors:
            return 0.0, 0.0
        return _non_negative_fit(np.array(factors), np.array(targets))


def _corrected(index: int, measured: Sequence[float], corrections: Sequence[float]) -> float:
    return measured[index] * math.exp(corrections[index]) if corrections else measured[index]


def _reference_context(points: Sequence[StepPoint]) -> float | None:
    """The context per request of most points; None if no value covers half of them (as in live steps)."""
    (most, count), *_ = Counter(point.context_tokens / point.requests for point in points).most_common(1)
    return most if 2 * count >= len(points) and (count > 1 or len(points) == 1) else None


def _refuse_duplicates(rows: Mapping[int, Sequence[tuple[int, StepPoint]]]) -> None:
    for requests, row in rows.items():
        (tokens, count), *_ = Counter(point.batch_tokens for _, point in row).most_common(1)
        if count > 1:
            raise ConfigError(
                f"points must differ, got {count} of {requests} requests and {tokens} batch_tokens"
            )


def _non_negative_fit(factors: Floats, targets: Floats) -> tuple[float, float]:
    """Least squares with two non-negative coefficients; factors [n, 2]."""
    both, *_ = np.linalg.lstsq(factors, targets, rcond=None)
    if both[0] >= 0 and both[1] >= 0:
        return float(both[0]), float(both[1])
    alone = [max(float(f @ targets) / float(f @ f), 0.0) for f in factors.T]
    errors = [float(((f * value - targets) ** 2).sum()) for f, value in zip(factors.T, alone, strict=True)]
    return (alone[0], 0.0) if errors[0] <= errors[1] else (0.0, alone[1])
