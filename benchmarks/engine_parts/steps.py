"""Step times of a target engine by (requests, tokens per request, context)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    requests: int
    tokens: int  # per request
    context: int  # positions before them, per request

    def __str__(self) -> str:
        return f"{self.requests} x {self.tokens}"


def one_request(tokens: Sequence[int], context: int) -> list[Shape]:
    return [Shape(1, count, context) for count in tokens]


def many_requests(requests: Sequence[int], tokens: int, context: int) -> list[Shape]:
    return [Shape(count, tokens, context) for count in requests]


def pages_needed(shapes: Sequence[Shape], page_tokens: int) -> int:
    return 1 + max(s.requests * -(-(s.context + s.tokens) // page_tokens) for s in shapes)


def measure_steps(
    engine: TargetEngine, shapes: Sequence[Shape], *, repeats: int, advance: Callable[[], None]
) -> dict[Shape, list[float]]:
    """Seconds of every repeat. Shapes are interleaved, so that a slow moment affects all alike."""
    return measure_in_turns({"": engine}, shapes, repeats=repeats, advance=advance)[""]


def measure_in_turns(
    engines: Mapping[str, TargetEngine],
    shapes: Sequence[Shape],
    *,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, dict[Shape, list[float]]]:
    """Like `measure_steps` for several engines, which take turns on each shape. The second of two equal steps
    is timed, because in serving a step follows a similar one and finds its data in the caches."""
    batches = {(name, shape): _runs(engine, shape) for shape in shapes for name, engine in engines.items()}
    seconds: dict[str, dict[Shape, list[float]]] = {name: {shape: [] for shape in shapes} for name in engines}
    for repeat in range(repeats + 1):
        for (name, shape), runs in batches.items():
            engines[name].forward(runs)
            started = time.perf_counter()
            engines[name].forward(runs)
            if repeat:  # the first one allocates memory and warms caches
                seconds[name][shape].append(time.perf_counter() - started)
            advance()
    return seconds


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def _runs(engine: TargetEngine, shape: Shape) -> list[Run]:
    """Each request has its own pages, so that every context is actually read."""
    per_request = -(-(shape.context + shape.tokens) // engine.page_tokens)
    return [
        Run(
            [7] * shape.tokens,
            shape.context,
            range(1 + index * per_request, 1 + (index + 1) * per_request),
            shape.tokens,
        )
        for index in range(shape.requests)
    ]
