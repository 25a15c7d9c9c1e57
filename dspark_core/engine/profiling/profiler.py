"""Measures step times of a target engine on a small grid of (requests, tokens per request, context).

Coarse points come first; the rest of the budget refines them: repeats against noise, then points inside the
largest jumps, until each stair is located to a single token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import UNKNOWN_KIND, StepTimeModel, lower_quartile
from dspark_core.engine.profiling.profile_passes import ProfilePasses
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.records import ReplicaKind

MIN_JUMP = 0.1
"""Relative rise between neighbouring points above which a stair is searched between them."""

STAIR_TURNS = 3
"""How often a point inside a jump is timed, each time in turn with its neighbours."""

LOOKUP_REQUESTS = 4
"""Looked-up blocks are measured for at most this many requests: more rarely verify one in the same step."""

WRITING_SHARE = 0.2
"""Largest share of the budget for writing the pages that timed passes then read."""

Shape = tuple[int, int, int]  # requests, tokens, context per request


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    tokens_per_request: tuple[int, ...] = (1, 2, 4, 8)
    lookup_tokens: int | None = None
    """Tokens of a looked-up block with its anchor; None: no lookup."""
    max_batch_tokens: int | None = None
    """Limit on a step's tokens, from which the first two points are exempt; None: no limit."""
    context_tokens: int = 128
    """Context per request, except where the cost of context is measured."""
    long_context_tokens: int = 1024
    repeats: int = 5
    budget_seconds: float = 10.0
    """Points and repeats that no longer fit are left out, except the three coarsest points."""

    def __post_init__(self) -> None:
        for name in ("requests", "tokens_per_request"):
            values = getattr(self, name)
            if not values or values[0] < 1 or any(a >= b for a, b in pairwise(values)):
                raise ConfigError(f"{name} of a profile must be >= 1 and increasing, got {values}")
        usual = self.tokens_per_request[-1]
        if self.lookup_tokens is not None and self.lookup_tokens <= usual:
            raise ConfigError(f"lookup_tokens of a profile must be > {usual}, got {self.lookup_tokens}")
        if self.context_tokens < 1 or self.long_context_tokens < self.context_tokens:
            raise ConfigError(
                "a profile needs 1 <= context_tokens <= long_context_tokens, got "
                f"{self.context_tokens} and {self.long_context_tokens}"
            )
        if self.repeats < 1:
            raise ConfigError(f"repeats of a profile must be >= 1, got {self.repeats}")
        if not self.budget_seconds > 0:
            raise ConfigError(f"budget_seconds of a profile must be > 0, got {self.budget_seconds}")

    def quick(self) -> ProfileSettings:
        """Coarser settings that take a third of the time or less."""
        coarse = tuple(count for count in self.requests if count in (1, 4, 16)) or self.requests[:1]
        return replace(
            self,
            requests=coarse,
            tokens_per_request=self.tokens_per_request[:1] + self.tokens_per_request[-1:],
            repeats=min(self.repeats, 3),
            budget_seconds=min(self.budget_seconds, 3.0),
        )


def request_counts(most: int) -> tuple[int, ...]:
    """Request counts to measure for steps of up to `most` requests: powers of two."""
    return tuple(2**power for power in range(most.bit_length()))


def profile_step_time(
    engine: TargetEngine,
    settings: ProfileSettings | None = None,
    *,
    key: ReplicaKind = UNKNOWN_KIND,
    clock: Callable[[], float] = time.perf_counter,
    on_point: Callable[[StepPoint], None] = lambda _: None,
) -> StepTimeModel:
    """Times passes shaped like verification, as lower quartiles; calls `on_point` for each new shape.

    Writes into arbitrary pages, so it must run before the engine serves. First prepares the engine for such
    passes, which does not count towards the budget.
    """
    settings = settings or ProfileSettings()
    engine.prepare(max(settings.requests))
    bench = _Bench(engine, settings, clock, on_point)
    bench.write_pages()
    bench.measure_grid()
    bench.repeat()
    bench.search_stairs()
    return StepTimeModel(bench.points(), key)


@dataclass(slots=True)
class _Bench:
    engine: TargetEngine
    settings: ProfileSettings
    clock: Callable[[], float]
    on_point: Callable[[StepPoint], None]
    seconds: dict[Shape, list[float]] = field(default_factory=dict)
    started: float = field(init=False)
    passes: ProfilePasses = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.passes = ProfilePasses(self.engine)

    @property
    def left(self) -> float:
        return self.settings.budget_seconds - (self.clock() - self.started)

    def write_pages(self) -> None:
        """Writes pages for WRITING_SHARE of the budget, at least one chunk."""
        while self.passes.write_chunk():
            if self.left < (1.0 - WRITING_SHARE) * self.settings.budget_seconds:
                return

    def measure_grid(self) -> None:
        for shape in self._shapes():
            # Assume two passes, whose time grows at most in proportion to the tokens.
            largest = max(self.seconds, key=lambda known: known[1], default=None)
            guess = 0.0
            if largest is not None:
                guess = 2 * min(self.seconds[largest]) * max(1.0, shape[1] / largest[1])
            if len(self.seconds) >= 3 and guess > self.left:
                continue
            self._measure(shape, warm_up=True)

    def repeat(self) -> None:
        """Repeats points interleaved, so that a busy moment does not affect one point alone.

        The longest step is timed `repeats` times, the others more often, in inverse proportion to the root of
        their time: short ones matter most for few users, vary most, and cost little.
        """
        longest = max(min(times) for times in self.seconds.values())
        waiting = set(self.seconds)
        while waiting:
            shape = min(waiting, key=lambda one: (self._weight(one), one))
            # Keep a quarter of the budget for stairs.
            room = self.left - 0.25 * self.settings.budget_seconds
            done = self._weight(shape) >= (self.settings.repeats - 1) * math.sqrt(longest)
            if done or min(self.seconds[shape]) >= room:
                waiting.remove(shape)
            else:
                self._measure(shape)

    def _weight(self, shape: Shape) -> float:
        """Weight of the repeats so far; 0 for a point without repeats, so that the first turn includes long
        steps as well."""
        times = self.seconds[shape]
        return (len(times) - 1) * math.sqrt(min(times))

    def search_stairs(self) -> None:
        """Halves intervals with a jump until the jump is one token wide or turns out to be a slope."""
        # How often in a row halving an interval showed a straight line, by its left end. Once is not enough:
        # two stairs may cancel out.
        straight: dict[Shape, int] = {}
        while (found := self._largest_jump(straight)) is not None:
            left, right = found
            if (3 * STAIR_TURNS + 1) * min(self.seconds[right]) > self.left:
                return
            middle = (left[0], (left[1] + right[1]) // 2, left[2])
            self._measure_between(left, middle, right)
            times = straight.get(left, 0) + 1 if self._is_slope(left, middle, right) else 0
            straight[left] = straight[middle] = times

    def _measure_between(self, left: Shape, middle: Shape, right: Shape) -> None:
        """Times the middle point in turn with its neighbours and places it relative to them. The machine's
        speed may have changed since the neighbours were measured, which would otherwise look like a stair."""
        share = (middle[1] - left[1]) / (right[1] - left[1])
        self._measure(middle, warm_up=True)
        self.seconds[middle].clear()
        places = []
        for _ in range(STAIR_TURNS):
            before, inside, after = (self._time(shape) for shape in (left, middle, right))
            places.append(inside / (before + share * (after - before)))
        straight = self._typical(left) + share * (self._typical(right) - self._typical(left))
        self.seconds[middle] += [place * straight for place in places]

    def points(self) -> tuple[StepPoint, ...]:
        """The measured points, made monotone: other work on the machine only adds time, so if a smaller step
        took longer than a larger one, the smaller one was disturbed and gets the larger one's time."""
        typical = {shape: self._typical(shape) for shape in sorted(self.seconds)}
        return tuple(
            StepPoint(
                requests,
                tokens,
                requests * context,
                min(
                    seconds
                    for (more, longer, reach), seconds in typical.items()
                    if more >= requests and longer >= tokens and reach >= context
                ),
            )
            for requests, tokens, context in typical
        )

    def _shapes(self) -> Iterator[Shape]:
        """Coarse to fine: both ends of the smallest request count's row, then by size, then long contexts."""
        per_request = [t for t in self.settings.tokens_per_request if t < self.engine.max_context_tokens]
        largest = per_request[-1]
        looked_up = self.settings.lookup_tokens or 0
        if looked_up >= self.engine.max_context_tokens:
            looked_up = 0
        room = self.engine.max_context_tokens - max(largest, looked_up)
        context = min(self.settings.context_tokens, room)
        long_context = min(self.settings.long_context_tokens, room)
        counts = self.settings.requests
        grid = [(r, r * t, context) for r in counts for t in per_request]
        if looked_up:
            grid += [(r, r * looked_up, context) for r in counts if r <= LOOKUP_REQUESTS]
        most = self.settings.max_batch_tokens or math.inf
        grid = [shape for shape in grid if shape[1] <= most]
        first = {(counts[0], counts[0] * t, context) for t in (per_request[0], largest)}
        yield from sorted(first)
        yield from sorted((shape for shape in grid if shape not in first), key=lambda shape: shape[1])
        if long_context > context:
            # One token and many: separates the cost of reading context from that of attending to it.
            fitting = [count for count in counts[: len(counts) // 2 + 1] if count * largest <= most]
            middle = max(fitting, default=counts[0])
            yield counts[0], counts[0] * per_request[0], long_context
            yield middle, middle * largest, long_context

    def _largest_jump(self, straight: Mapping[Shape, int]) -> tuple[Shape, Shape] | None:
        """The interval with the largest relative rise above MIN_JUMP that can be halved and is not known to
        be straight, or None."""
        best: tuple[float, tuple[Shape, Shape]] | None = None
        shapes = sorted(self.seconds, key=lambda shape: (shape[2], shape[0], shape[1]))
        for left, right in pairwise(shapes):
            same_row = (left[0], left[2]) == (right[0], right[2])
            if not same_row or right[1] - left[1] < 2 or straight.get(left, 0) >= 2:
                continue
            jump = self._typical(right) / self._typical(left) - 1.0
            if jump > MIN_JUMP and (best is None or jump > best[0]):
                best = jump, (left, right)
        return None if best is None else best[1]

    def _is_slope(self, left: Shape, middle: Shape, right: Shape) -> bool:
        """Whether the middle point lies on the straight line between its neighbours."""
        share = (middle[1] - left[1]) / (right[1] - left[1])
        before, after = self._typical(left), self._typical(right)
        return abs(self._typical(middle) - (before + share * (after - before))) < MIN_JUMP * before

    def _typical(self, shape: Shape) -> float:
        return lower_quartile(self.seconds[shape])

    def _measure(self, shape: Shape, *, warm_up: bool = False) -> None:
        if warm_up:
            # The first call also pays for allocation and kernel selection.
            self.passes.verify(self.passes.runs(*shape))
        elapsed = self._time(shape)
        self.seconds.setdefault(shape, []).append(elapsed)
        if warm_up:
            requests, tokens, context = shape
            self.on_point(StepPoint(requests, tokens, requests * context, elapsed))

    def _time(self, shape: Shape) -> float:
        runs = self.passes.runs(*shape)
        started = self.clock()
        self.passes.verify(runs)
        return self.clock() - started
