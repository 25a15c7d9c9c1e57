"""Learns a step-rate curve from the steps a verifier reports.

The curve's own refinement only moves points it has; this adds the points it lacks, so that a
verifier that was not profiled at start gets a curve too.
"""

from __future__ import annotations

from bisect import insort

from dspark_core.algorithms.step_rate import StepRateCurve

# Points nearer than this ratio speak for each other.
_SPACING = 1.25
# From 1 token at that spacing, 64 points reach beyond a million tokens.
_MAX_POINTS = 64
# How far a single step may place a new point from what the curve so far expects there.
_MAX_SURPRISE = 2.0


def refined(curve: StepRateCurve | None, batch_tokens: int, seconds: float) -> StepRateCurve:
    """The curve after one more timed step; both numbers must be positive."""
    if curve is None:
        return StepRateCurve((batch_tokens,), (seconds,))
    near = any(
        batch_tokens <= point * _SPACING and point <= batch_tokens * _SPACING for point in curve.batch_tokens
    )
    if near or len(curve.batch_tokens) >= _MAX_POINTS:
        return curve.observed(batch_tokens, seconds)
    expected = curve.seconds(batch_tokens)
    placed = min(max(seconds, expected / _MAX_SURPRISE), expected * _MAX_SURPRISE)
    points = list(zip(curve.batch_tokens, curve.step_seconds, strict=True))
    insort(points, (batch_tokens, placed))
    return StepRateCurve(tuple(tokens for tokens, _ in points), tuple(value for _, value in points))
