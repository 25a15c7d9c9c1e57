"""How long a target step takes as a function of what it holds: requests, batch tokens, context tokens.

The paper's SPS(B) knows the batch tokens only; 64 tokens of one request and 64 requests of one token
each differ by far more than scheduling can win. Measured points say what hardware does, staircases
included; `observed` follows live steps. A model with points of one request count is the paper's
curve, and is what an old curve document becomes. No torch here, so the scheduler's image stays small.
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
"""Share of a live step's surprise that moves the model as a whole: a machine grew slower or faster."""
POINT_RATE = 0.03
"""Share of a step's surprise, beyond that of the steps before it, that moves the points next to it:
the profile was wrong there. What all steps share is the scale's."""
POINT_DOUBT = 8.0
"""Steps that a point's profile counts for: live ones near it move it by 1 / (8 + how many there were), until
that is less than `POINT_RATE`."""
POINT_LEAK = 0.002
"""What a point forgets of both with each step elsewhere, or one no plan visits again stayed dear for ever."""
TOKEN_FACTOR_SECONDS = 1.5
"""With this time constant of steps that hold none it is forgotten that added tokens are dear or cheap."""
LEAST_TOKEN_FACTOR, MAX_TOKEN_FACTOR = 0.25, 16.0
MAX_SURPRISE = 2.0
"""How far one step may be from what was expected: a stall says little about the next step."""
NEW_POINT_RATIO = 1.25
"""A learned model takes a step as a new point when no point lies within this ratio of it."""
MAX_POINTS = 256
UNKNOWN_KIND = ReplicaKind(model="", engine="", hardware="", dtype="")


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Measured points and what live steps taught since. Immutable: `observed` returns another one."""

    points: tuple[StepPoint, ...]
    key: ReplicaKind = UNKNOWN_KIND
    learned: bool = False
    """The points are live steps, not a profile: new ones are added as they come."""
    scale: float = 1.0
    """How much slower than its points the machine runs now."""
    corrections: tuple[float, ...] = ()
    """Log ratio of each point to its measurement; empty: none."""
    drift: float = 0.0
    """Running mean of the log surprise of live steps: what the scale has yet to follow."""
    steps: int = 0
    """Live steps so far."""
    seen: tuple[float, ...] = ()
    """Of each point the live steps next to it, fading; empty: none."""
    token_factor: float = 1.0
    """How many times as much as by the points each token adds now to those of one for every request."""
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
        """The paper's one-dimensional SPS(B): neither requests nor context matter."""
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
        """A model that starts from one live step, where nothing was profiled."""
        return cls((StepPoint(requests, batch_tokens, context_tokens, seconds),), key, learned=True)

    @classmethod
    def of_step_times(cls, told: Iterable[StepTime]) -> StepTimeModel:
        """From the points of a model elsewhere, as `step_times` gives them."""
        return cls(tuple(StepPoint(t.requests, t.batch_tokens, t.context_tokens, t.seconds) for t in told))

    def step_times(self) -> tuple[StepTime, ...]:
        """The measured points, for the wire."""
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
        """After one more timed step. One outlier (a stall, a cold cache) moves it by a bounded share."""
        point = StepPoint(requests, batch_tokens, context_tokens, seconds)  # refuses impossible values
        expected = self.seconds(requests, batch_tokens, context_tokens)
        surprise = math.log(min(max(seconds / expected, 1.0 / MAX_SURPRISE), MAX_SURPRISE))
        if self.learned and len(self.points) < MAX_POINTS and not self._has_near(point):
            return self._with_point(replace(point, seconds=expected / self.scale * math.exp(surprise)))
        # What steps share is the machine's, not the fault of the points they met; the first ones tell most.
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
        # What was cut off at the bound is there again in the next step, however far the scale moved.
        drift = shared if abs(surprise) >= math.log(MAX_SURPRISE) else shared - followed
        history = self.history
        if not self.learned:  # whose points are not sure enough to compare steps of different ones
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
        """Where the latest steps agree that the machine is another one, it is taken to be that at once. The
        newest took so many seconds."""
        factor = self.token_factor
        if factor != 1.0 and self.history.steps and self.history.steps[-1].added < APART:
            # Or what is not verified again stayed dear for ever.
            factor **= math.exp(-seconds / TOKEN_FACTOR_SECONDS)
        shift = self.history.shift()
        if shift is not None:
            scale, told = shift
            told = min(max(factor if told is None else told, LEAST_TOKEN_FACTOR), MAX_TOKEN_FACTOR)
            if abs(math.log(scale / self.scale)) > SURPRISING or abs(math.log(told / factor)) > SURPRISING:
                return self._with(scale=scale, token_factor=told, drift=0.0)
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
        """Shares the surface, which a round should not pay for building again."""
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
        """JSON-able; `from_dict` is its inverse."""
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
        """Also of the older `{"batch_tokens": [...], "step_seconds": [...]}`.

        Raises `ConfigError` naming the field that is missing or wrong.
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
    """What a step takes, of times measured for it: other work only adds to one, and one may be lucky."""
    return sorted(seconds)[len(seconds) // 4]


def monotone(seconds: Iterable[float]) -> tuple[float, ...]:
    """The nearest values (least squares) that never fall: measuring noise is no reason to think a
    larger batch faster, and a dip would stop or mislead a planner."""
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
