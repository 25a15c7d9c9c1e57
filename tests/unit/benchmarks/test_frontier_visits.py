"""A run that was stopped goes on with what the same code measured on the same processor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import frontier
from benchmarks.frontier_parts.stack import SliceResult
from benchmarks.frontier_parts.visits import Visit, keep, read_kept
from tests.unit.benchmarks.test_frontier_claims import measured

HERE = {"commit": "a1", "processor": "fast", "load_average_1m": 0.5}


def visit(turn: int, concurrency: int = 2, **environment: object) -> Visit:
    return Visit(turn=turn, environment=HERE | environment, slices=(measured("a", concurrency, 100),))


def test_visits_of_other_code_or_another_processor_are_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "visits.jsonl"
    ours = visit(0, load_average_1m=2.0)
    for one in (ours, visit(1, commit="b2"), visit(2, processor="slow")):
        keep(file, one)
    assert read_kept(file, HERE) == [ours]
    assert [one.turn for one in read_kept(file, HERE | {"commit": "b2"})] == [1]


def test_a_visit_cut_short_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "visits.jsonl"
    keep(file, visit(0))
    whole = file.read_text()
    file.write_text(whole + whole[:30])
    assert read_kept(file, HERE) == [visit(0)]
    keep(file, visit(1))
    assert read_kept(file, HERE) == [visit(0), visit(1)]


class Stack:
    """Measures nothing."""

    loaded = 0
    methods = (frontier.SCHEDULED, frontier.MTP1, frontier.NO_SPECULATION)

    def __init__(self, arguments: argparse.Namespace) -> None:
        type(self).loaded += 1

    def visit(self, concurrency: int, turn: int, seconds: float) -> Iterator[SliceResult]:
        for method in self.methods:
            yield measured(method, concurrency, 100, verified=10)


def test_figures_on_disk_are_written_with_where_they_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "frontier.json"
    monkeypatch.setattr(frontier, "Stack", Stack)
    monkeypatch.setattr(sys, "argv", ["frontier", "--quick", "--out", str(out)])
    for now, loaded in ((HERE, 1), (HERE | {"load_average_1m": 9.0}, 1), (HERE | {"commit": "b2"}, 2)):
        monkeypatch.setattr(frontier, "describe_machine", lambda now=now: now)
        assert frontier.main() == 0
        assert Stack.loaded == loaded
        assert json.loads(out.read_text())["environment"] == (HERE if loaded == 1 else now)
