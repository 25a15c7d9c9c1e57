"""Evaluates frontiers: medians over slices, interpolation between loads, and checks of the paper's claims.

Pure functions of slices. A frontier point is one load: tokens per second per user against tokens per second
of all users.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.frontier_parts.stack import SliceResult

TOLERANCE = 0.03
"""How far the scheduled frontier may be below the best static one."""
MIN_LIGHT_LOAD_LENGTH = 0.5
"""Minimum verify length at the lightest load; a smaller one cannot show a decrease with load."""
MODERATE_SHARE = 0.6
"""The moderate floor, as a share of MTP-1's fastest speed per user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    method: str
    concurrency: int
    tokens_per_second: float
    """Of all users together; median over slices."""
    tokens_per_second_per_user: float
    tokens_per_second_range: tuple[float, float]
    verify_length: float
    accepted_length: float
    slices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    name: str
    target: str
    measured: str
    holds: bool | None
    """None: not enough data to judge."""


def summarise(slices: Sequence[SliceResult]) -> tuple[FrontierPoint, ...]:
    """One point per method and concurrency, in the order they first appear."""
    cells: dict[tuple[str, int], list[SliceResult]] = {}
    for one in slices:
        cells.setdefault((one.method, one.concurrency), []).append(one)
    return tuple(_point(method, concurrency, members) for (method, concurrency), members in cells.items())


def _point(method: str, concurrency: int, members: Sequence[SliceResult]) -> FrontierPoint:
    speeds = [one.tokens / one.seconds for one in members]
    request_rounds = max(1, sum(one.request_rounds for one in members))
    return FrontierPoint(
        method=method,
        concurrency=concurrency,
        tokens_per_second=statistics.median(speeds),
        tokens_per_second_per_user=statistics.median(speeds) / concurrency,
        tokens_per_second_range=(min(speeds), max(speeds)),
        verify_length=sum(one.verified for one in members) / request_rounds,
        accepted_length=1.0 + sum(one.accepted for one in members) / request_rounds,
        slices=len(members),
    )


class Frontier:
    """The points of one method, by load."""

    def __init__(self, points: Sequence[FrontierPoint]) -> None:
        self.points = sorted(points, key=lambda point: point.concurrency)

    @property
    def fastest_user(self) -> float:
        """Highest tokens per second per user at any load."""
        return max((point.tokens_per_second_per_user for point in self.points), default=0.0)

    def throughput_at(self, floor: float) -> float | None:
        """Highest total tokens per second with every user at `floor` or faster; None: no load allows that.

        Interpolates linearly between measured loads.
        """
        pairs = [(p.tokens_per_second_per_user, p.tokens_per_second) for p in self.points]
        found = [total for speed, total in pairs if speed >= floor]
        for (speed, total), (next_speed, next_total) in pairwise(pairs):
            if speed >= floor > next_speed:
                share = (speed - floor) / (speed - next_speed)
                found.append(total + share * (next_total - total))
        return max(found, default=None)

    def speed_at(self, throughput: float) -> float | None:
        """Highest tokens per second per user while all together reach `throughput`; None: none does."""
        pairs = [(p.tokens_per_second, p.tokens_per_second_per_user) for p in self.points]
        found = [speed for total, speed in pairs if total >= throughput]
        for (total, speed), (next_total, next_speed) in pairwise(pairs):
            if total < throughput <= next_total:
                share = (throughput - total) / (next_total - total)
                found.append(speed + share * (next_speed - speed))
        return max(found, default=None)


def frontier_of(points: Sequence[FrontierPoint], method: str) -> Frontier:
    return Frontier([point for point in points if point.method == method])


def check_claims(
    points: Sequence[FrontierPoint],
    *,
    scheduled: str,
    statics: Sequence[str],
    baseline: str,
    moderate_floor: float | None = None,
    strict_floor: float | None = None,
) -> tuple[Claim, ...]:
    """`statics`: the methods that ignore load; `baseline`: MTP-1 or its stand-in."""
    ours, theirs = frontier_of(points, scheduled), frontier_of(points, baseline)
    floor = moderate_floor or MODERATE_SHARE * theirs.fastest_user
    return (
        _never_below(points, ours, statics),
        _falls_with_load(ours),
        _matched_throughput(ours, theirs, baseline),
        _moderate_floor(ours, theirs, baseline, floor),
        _strict_floor(ours, theirs, baseline, strict_floor),
    )


def _never_below(points: Sequence[FrontierPoint], ours: Frontier, statics: Sequence[str]) -> Claim:
    worst = None
    for point in ours.points:
        rivals = [p for p in points if p.method in statics and p.concurrency == point.concurrency]
        for rival in rivals:
            ratio = point.tokens_per_second / rival.tokens_per_second
            if worst is None or ratio < worst[0]:
                worst = (ratio, rival)
    measured = "no static method measured"
    if worst is not None:
        ratio, rival = worst
        measured = f"worst {100 * (ratio - 1):+.1f} % ({rival.method} at {rival.concurrency} users)"
    return Claim(
        name="against the best static, every load",
        target=f">= {-100 * TOLERANCE:.0f} %",
        measured=measured,
        holds=None if worst is None else worst[0] >= 1.0 - TOLERANCE,
    )


def _falls_with_load(ours: Frontier) -> Claim:
    lengths = [point.verify_length for point in ours.points]
    # A tenth of a token is measurement noise. A planner that hardly ever speculates does not adapt to load.
    falls = all(later <= earlier + 0.1 for earlier, later in pairwise(lengths))
    falls = falls and bool(lengths) and lengths[0] >= MIN_LIGHT_LOAD_LENGTH
    return Claim(
        name="verify length by load",
        target="falls",
        measured=" ".join(f"{length:.2f}" for length in lengths) or "not measured",
        holds=falls if len(lengths) > 1 else None,
    )


def _matched_throughput(ours: Frontier, theirs: Frontier, baseline: str) -> Claim:
    gains = []
    for point in theirs.points:
        speed = ours.speed_at(point.tokens_per_second)
        if speed is not None:
            gains.append(speed / point.tokens_per_second_per_user - 1.0)
    measured = "no load reaches the same throughput"
    if gains:
        measured = f"median {100 * statistics.median(gains):+.0f} % ({_range(gains)}, {len(gains)} loads)"
    return Claim(
        name=f"speed of a user at matched throughput, over {baseline}",
        target=">= +60 %",
        measured=measured,
        holds=statistics.median(gains) >= 0.6 if gains else None,
    )


def _range(gains: Sequence[float]) -> str:
    return f"{100 * min(gains):+.0f} .. {100 * max(gains):+.0f} %"


def _moderate_floor(ours: Frontier, theirs: Frontier, baseline: str, floor: float) -> Claim:
    got, had = ours.throughput_at(floor), theirs.throughput_at(floor)
    measured, gain = "a method cannot hold it", None
    if got is not None and had is not None:
        gain = got / had - 1.0
        measured = f"{100 * gain:+.0f} % ({got:.0f} against {had:.0f} tokens/s)"
    return Claim(
        name=f"throughput at a moderate floor of {floor:.1f} tokens/s, over {baseline}",
        target=">= +51 %",
        measured=measured,
        holds=None if gain is None else gain >= 0.51,
    )


def _strict_floor(ours: Frontier, theirs: Frontier, baseline: str, floor: float | None) -> Claim:
    strict = floor or 1.02 * theirs.fastest_user
    got = ours.throughput_at(strict)
    kept = theirs.throughput_at(strict)
    measured = f"{'cannot be held' if got is None else f'{got:.0f} tokens/s'}; {baseline}: "
    measured += "cannot" if kept is None else f"{kept:.0f} tokens/s"
    return Claim(
        name=f"a strict floor of {strict:.1f} tokens/s that {baseline} cannot hold",
        target="held",
        measured=measured,
        holds=None if not theirs.points else got is not None and kept is None,
    )
