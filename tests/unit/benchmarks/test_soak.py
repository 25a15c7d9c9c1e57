"""What a soak calls growth, and a short one of the real stack."""

from __future__ import annotations

import dataclasses
import random

import pytest

from benchmarks.soak_parts.mixture import WEIGHTS, Kind, draw
from benchmarks.soak_parts.process import Sample
from benchmarks.soak_parts.verdict import Bounds, growth, held_pages

FLAT = Sample(
    minute=0.0,
    rss_mb=900.0,
    open_files=14,
    tasks=14,
    threads=6,
    objects=360_000,
    free_kv_fraction=1.0,
    tokens_per_second=200.0,
    preemptions=0,
)


def samples(count: int = 24, **slopes: float) -> list[Sample]:
    """Fields that grow by so much each sample."""
    return [
        dataclasses.replace(
            FLAT,
            minute=float(minute),
            **{name: getattr(FLAT, name) + minute * slope for name, slope in slopes.items()},
        )
        for minute in range(count)
    ]


def grown(found: list[Sample]) -> set[str]:
    return {one.name for one in growth(found, Bounds()) if not one.held}


def test_what_stays_the_same_or_falls_has_not_grown() -> None:
    assert grown(samples()) == set()
    assert grown(samples(rss_mb=-1.0, open_files=-0.2)) == set()


@pytest.mark.parametrize(
    ("field", "slope", "name"),
    [
        ("rss_mb", 3.0, "resident MB"),
        ("open_files", 0.5, "open files"),
        ("tasks", 0.5, "asyncio tasks"),
        ("threads", 0.2, "threads"),
        ("objects", 3000.0, "Python objects"),
    ],
)
def test_a_leak_is_named(field: str, slope: float, name: str) -> None:
    assert grown(samples(**{field: slope})) == {name}


def test_warming_up_and_a_single_spike_are_no_leak() -> None:
    warming = samples()
    warming[:3] = [dataclasses.replace(one, rss_mb=600.0) for one in warming[:3]]
    warming[20] = dataclasses.replace(warming[20], rss_mb=1200.0, tasks=40)
    assert grown(warming) == set()


def test_pages_held_by_nobody_are_told_by_the_minute() -> None:
    found = samples()
    found[7] = dataclasses.replace(found[7], free_kv_fraction=0.995)
    assert held_pages(found) == [7.0]


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="3 samples after warm-up; growth needs 4 or more"):
        growth(samples(4), Bounds())


def test_every_kind_is_asked_and_repeated_requests_are_equal() -> None:
    rng = random.Random(1)
    asked = [draw(rng, "m") for _ in range(2000)]
    for kind, weight in WEIGHTS.items():
        share = sum(ask.kind is kind for ask in asked) / len(asked)
        assert share == pytest.approx(weight, abs=0.03)
    bodies: dict[str, dict[str, object]] = {}
    for ask in asked:
        if ask.repeats is not None:
            body = {name: value for name, value in ask.body.items() if name != "stream"}
            assert bodies.setdefault(ask.repeats, body) == body
    assert all(ask.repeats is None for ask in asked if ask.kind in (Kind.SAMPLED, Kind.CANCELLED, Kind.BAD))
