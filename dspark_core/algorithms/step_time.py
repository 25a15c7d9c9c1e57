"""Models how long a target step takes as a function of requests, batch tokens and context tokens.

The paper's SPS(B) depends on batch tokens only, but 64 tokens of one request and 64 requests of one token
each differ by far more than scheduling can win. Measured points capture the hardware's behaviour,
staircases included; `observed` follows live steps. A model whose points share one request count is the
paper's curve, and legacy curve documents load as such. No torch here, so the scheduler's image stays small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_core.algorithms.step_shift import APART, NO_HISTORY, SURPRISING, StepHistory, TakenStep
from dspark_core.algorithms.step_surface import Floats, StepPoint, StepSurface
from dspark_core.errors import ConfigError
from dspark_core.records import ReplicaKind, StepTime

SCALE_RATE = 0.1
"""Share of a live step's surprise that scales the whole model, as when the machine got slower or faster."""
POINT_RATE = 0.03
"""Minimum share of a step's surprise, beyond the running mean, that moves the points next to it: the profile
was wrong there. What all steps have in common is left to the scale."""
POINT_DOUBT = 8.0
"""Weight of a point's profile in steps: the n-th live step near it moves it by 1 / (8 + n), until that drops
below `POINT_RATE`."""
POINT_LEAK = 0.002
"""Decay of point corrections and counts per step, so that points no plan visits do not stay slow forever."""
TOKEN_FACTOR_SECONDS = 1.5
"""Time constant, in time of steps without added tokens, with which `token_factor` returns to 1."""
LEAST_TOKEN_FACTOR, MAX_TOKEN_FACTOR = 0.25, 16.0
MAX_SURPRISE = 2.0
"""Bound on the factor by which one step may deviate: a stall says little about the next step."""
NEW_POINT_RATIO = 1.25
"""A learned model adds a step as a new point if no existing point lies within this ratio."""
MAX_POINTS = 256
UNKNOWN_KIND = ReplicaKind(model="", engine="", hardware="", dtype="")


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Measured points and what live steps added. Immutable: `observed` returns a new model."""

    points: tuple[StepPoint, ...]
    key: ReplicaKind = UNKNOWN_KIND
    learned: bool = False
    """The points are live steps rather than a profile, and new ones are added as they come."""
    scale: float = 1.0
    """Current slowdown of the machine relative to the points."""
    corrections: tuple[float, ...] = ()
    """Log ratio of each point's current value to its measurement; empty: none."""
    drift: float = 0.0
    """Running mean of the log surprise of live steps that the scale has not yet followed."""
    steps: int = 0
    """Number of live steps so far."""
    seen: tuple[float, ...] = ()
    """Per point, the decayed number of live steps next to it; empty: none."""
    token_factor: float = 1.0
    """Current factor on the time that tokens beyond one per request add."""
    history: StepHistory = NO_HISTORY
    surface: StepSurface = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale of a step-time model must be positive, got {self.scale}")
        if not (math.isfinite(self.token_factor) and self.token_factor > 0):
            raise ConfigError(f"token_factor of a step-time model must be positive, got {self.token_factor}")
        if self.corrections and len(self.corrections) != len(self.points):
            raise ConfigError(
                f"corrections must have one value for each of {len(self.points)} points, "
                f"got {len(self.corrections)}"
            )
        object.__setattr__(self, "surface", StepSurface(self.points))

    @classmethod
    def of_curve(cls, batch_tokens: Sequence[int], step_seconds: Sequence[float]) -> StepTimeModel:
        """The paper's one-dimensional SPS(B): requests and context do not matter."""
        if len(batch_tokens) != len(step_seconds):
            raise ConfigError(
                f"step_seconds must have one value for each of {len(batch_tokens)} batch_tokens, "
                f"got {len(step_seconds)}"
            )
        pairs = zip(batch_tokens, step_seconds, strict=True)
        return cls(tuple(StepPoint(1, tokens, 0, seconds) for tokens, seconds in pairs))

    @classmethod
    def learn(
        cls,
        requests: int,
        batch_tokens: int,
        context_tokens: int,
        seconds: float,
        key: ReplicaKind = UNKNOWN_KIND,
    ) -> StepTimeModel:
        """A model that starts from one live step, for use without a profile."""
        return cls((StepPoint(requests, batch_tokens, context_tokens, seconds),), key, learned=True)

    @classmethod
    def of_step_times(cls, steps: Iterable[StepTime]) -> StepTimeModel:
        """From another model's points, as returned by `step_times`."""
        return cls(tuple(StepPoint(t.requests, t.batch_tokens, t.context_tokens, t.seconds) for t in steps))

    def step_times(self) -> tuple[StepTime, ...]:
        """The measured points, in wire form."""
        return tuple(
            StepTime(
                requests=point.requests,
                batch_tokens=point.batch_tokens,
                context_tokens=point.context_tokens,
                seconds=point.seconds,
            )
            for point in self.points
        )

    def seconds(self, requests: int, batch_tokens: float, context_tokens: int = 0) -> float:
        """Expected duration of a step; `context_tokens` is the sum over its requests."""
        seconds = self.surface.at(requests, batch_tokens, context_tokens, self.corrections)
        if self.token_factor != 1.0:
            plain = self.surface.at(requests, requests, context_tokens, self.corrections)
            seconds += (self.token_factor - 1.0) * max(seconds - plain, 0.0)
        return self.scale * seconds

    def table(
        self, requests: int, batch_tokens: Sequence[int] | npt.NDArray[Any], context_tokens: int = 0
    ) -> Floats:
        """Expected durations for many batch sizes -> [len(batch_tokens)]."""
        tokens = np.asarray(batch_tokens, dtype=np.float64)
        seconds = self.surface.seconds(requests, tokens, context_tokens, self.corrections)
        if self.token_factor != 1.0:
            plain = self.surface.at(requests, requests, context_tokens, self.corrections)
            seconds = seconds + (self.token_factor - 1.0) * np.maximum(seconds - plain, 0.0)
        return self.scale * seconds

    def observed(
        self, requests: int, batch_tokens: int, context_tokens: int, seconds: float
    ) -> StepTimeModel:
        """Updates on one more timed step. An outlier (a stall, a cold cache) has a bounded effect."""
        point = StepPoint(requests, batch_tokens, context_tokens, seconds)  # validates the values
        expected = self.seconds(requests, batch_tokens, context_tokens)
        surprise = math.log(min(max(seconds / expected, 1.0 / MAX_SURPRISE), MAX_SURPRISE))
        if self.learned and len(self.points) < MAX_POINTS and not self._has_near(point):
            return self._with_point(replace(point, seconds=expected / self.scale * math.exp(surprise)))
        # What steps have in common is the machine's doing, not the points'; the first steps tell most.
        shared = self.drift + max(SCALE_RATE, 1.0 / (1.0 + self.steps)) * (surprise - self.drift)
        kept = 1.0 if self.learned else 1.0 - POINT_LEAK
        nothing = (0.0,) * len(self.points)
        corrections = [kept * value for value in self.corrections or nothing]
        seen = [kept * value for value in self.seen or nothing]
        for index, share in self.surface.shares(requests, batch_tokens):
            moved = max(POINT_RATE, 1.0 / (POINT_DOUBT + seen[index]))
            corrections[index] += moved * share * (surprise - shared)
            seen[index] += share
        followed = SCALE_RATE * surprise
        scale = self.scale * math.exp(followed)
        # A surprise cut off at the bound will recur in the next step, however far the scale moved.
        drift = shared if abs(surprise) >= math.log(MAX_SURPRISE) else shared - followed
        history = self.history
        if not self.learned:  # learned points are too uncertain to compare steps across them
            surprised = math.log(seconds / expected)
            history = history.after(self._taken(requests, batch_tokens, context_tokens, seconds, surprised))
        return self._moved(scale, tuple(corrections), drift, tuple(seen), history)._shifted(seconds)

    def _taken(
        self, requests: int, batch_tokens: int, context_tokens: int, seconds: float, surprise: float
    ) -> TakenStep:
        plain = self.surface.at(requests, requests, context_tokens, self.corrections)
        profiled = self.surface.at(requests, batch_tokens, context_tokens, self.corrections)
        return TakenStep(added=max(profiled / plain - 1.0, 0.0), taken=seconds / plain, surprise=surprise)

    def _shifted(self, seconds: float) -> StepTimeModel:
        """Adopts a change of the machine at once if the latest steps agree on it, and decays `token_factor`.
        `seconds`: duration of the newest step."""
        factor = self.token_factor
        if factor != 1.0 and self.history.steps and self.history.steps[-1].added < APART:
            # Otherwise tokens that are no longer verified would stay expensive forever.
            factor **= math.exp(-seconds / TOKEN_FACTOR_SECONDS)
        shift = self.history.shift()
        if shift is not None:
            scale, found = shift
            token_factor = min(max(factor if found is None else found, LEAST_TOKEN_FACTOR), MAX_TOKEN_FACTOR)
            if (
                abs(math.log(scale / self.scale)) > SURPRISING
                or abs(math.log(token_factor / factor)) > SURPRISING
            ):
                return self._with(scale=scale, token_factor=token_factor, drift=0.0)
        return self if factor == self.token_factor else self._with(token_factor=factor)

    def _moved(
        self,
        scale: float,
        corrections: tuple[float, ...],
        drift: float,
        seen: tuple[float, ...],
        history: StepHistory,
    ) -> StepTimeModel:
        return self._with(
            scale=scale,
            corrections=corrections,
            drift=drift,
            steps=self.steps + 1,
            seen=seen,
            history=history,
        )

    def _with(self, **changes: object) -> StepTimeModel:
        """A modified copy that shares the surface, which is too expensive to rebuild every round."""
        other = object.__new__(StepTimeModel)
        for name in _FIELDS:
            object.__setattr__(other, name, changes.get(name, getattr(self, name)))
        return other

    def _has_near(self, point: StepPoint) -> bool:
        return any(
            _near(point.requests, known.requests) and _near(point.batch_tokens, known.batch_tokens)
            for known in self.points
        )

    def _with_point(self, point: StepPoint) -> StepTimeModel:
        nothing = (0.0,) * len(self.points)
        corrections, seen = (*(self.corrections or nothing), 0.0), (*(self.seen or nothing), 0.0)
        return replace(self, points=(*self.points, point), corrections=corrections, seen=seen)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible; inverse of `from_dict`."""
        key = self.key
        return {
            "key": {
                "model": key.model,
                "engine": key.engine,
                "hardware": key.hardware,
                "dtype": key.dtype,
            },
            "points": [[p.requests, p.batch_tokens, p.context_tokens, p.seconds] for p in self.points],
            "learned": self.learned,
            "scale": self.scale,
            "token_factor": self.token_factor,
            "corrections": list(self.corrections),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepTimeModel:
        """Also accepts the legacy `{"batch_tokens": [...], "step_seconds": [...]}`.

        Raises `ConfigError` naming the missing or invalid field.
        """
        if "points" not in data and "batch_tokens" in data:
            return cls.of_curve(
                [_whole(value, "batch_tokens") for value in _list(data, "batch_tokens")],
                [_number(value, "step_seconds") for value in _list(data, "step_seconds")],
            )
        key = data.get("key", {})
        if not isinstance(key, Mapping) or not all(isinstance(value, str) for value in key.values()):
            raise ConfigError(f"key of a step-time model must hold text fields, got {key!r}")
        fields = {name: key.get(name, "") for name in ("model", "engine", "hardware", "dtype")}
        return cls(
            tuple(_point(row) for row in _list(data, "points")),
            ReplicaKind(**fields),
            learned=bool(data.get("learned", False)),
            scale=_number(data.get("scale", 1.0), "scale"),
            token_factor=_number(data.get("token_factor", 1.0), "token_factor"),
            corrections=tuple(_number(v, "corrections") for v in _list(data, "corrections", missing=())),
        )


_FIELDS = tuple(one.name for one in fields(StepTimeModel))


def lower_quartile(seconds: Sequence[float]) -> float:
    """A step's time from repeated measurements: other work only adds to it, and the minimum may be luck."""
    return sorted(seconds)[len(seconds) // 4]


def monotone(seconds: Iterable[float]) -> tuple[float, ...]:
    """Isotonic regression (least squares): noise is no reason to believe a larger batch is faster, and a dip
    would stop or mislead a planner."""
    pools: list[tuple[float, int]] = []  # mean, points; adjacent violators are merged
    for value in seconds:
        mean, count = value, 1
        while pools and pools[-1][0] >= mean:
            previous, points = pools.pop()
            mean = (previous * points + mean * count) / (points + count)
            count += points
        pools.append((mean, count))
    return tuple(mean for mean, count in pools for _ in range(count))


def _near(value: int, point: int) -> bool:
    return value <= point * NEW_POINT_RATIO and point <= value * NEW_POINT_RATIO


def _point(row: object) -> StepPoint:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 4:
        raise ConfigError(
            f"points must be [requests, batch_tokens, context_tokens, seconds] each, got {row!r}"
        )
    requests, tokens, context = (_whole(value, "points") for value in row[:3])
    return StepPoint(requests, tokens, context, _number(row[3], "points"))


def _list(data: Mapping[str, Any], field: str, missing: Sequence[object] | None = None) -> Sequence[object]:
    values = data.get(field, missing)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{field} of a step-time model must be a list, got {values!r}")
    return values


def _number(value: object, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{field} of a step-time model must hold numbers, got {value!r}")
    return float(value)


def _whole(value: object, field: str) -> int:
    number = _number(value, field)
    if not number.is_integer():
        raise ConfigError(f"{field} of a step-time model must hold whole numbers, got {value!r}")
    return int(number)
