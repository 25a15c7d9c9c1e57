"""A trace records what rounds did, stays within its size limit, and never delays a round."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.tracing import trace_writer
from dspark_core.engine.tracing.trace_format import (
    TracedCurve,
    TracedRequest,
    TracedRound,
    TraceHeader,
    TraceRecord,
    decode,
    encode,
)
from dspark_core.engine.tracing.trace_writer import TraceOptions, TraceWriter, rotated
from dspark_core.engine.tracing.traced_plans import TracingPlanSource
from dspark_core.errors import ConfigError
from tests.unit.engine.tiny import ScriptedDrafts, make_loop, prompts, request, run

HEADER = TraceHeader(replica_id="v", model="tiny", sample=1.0)
CURVE = TracedCurve(version="c1", document={"batch_tokens": [1, 8], "step_seconds": [0.01, 0.02]})


def traced(number: int) -> TracedRound:
    return TracedRound(
        at=1000.0 + number,
        round=number,
        planner="local",
        curve_version="c1",
        batch_tokens=4,
        step_seconds=0.0125,
        draft_seconds=0.001,
        context_tokens=77,
        requests=(
            TracedRequest(
                sequence_id="a", survival=(0.9, 0.5), planned=2, verified=2, accepted=1, coupled=True
            ),
            TracedRequest(
                sequence_id="b", survival=(), planned=0, verified=0, accepted=0, min_tokens_per_second=20.0
            ),
        ),
    )


def read(path: Path) -> list[TraceRecord]:
    return [decode(line) for line in path.read_text().splitlines()]


@given(st.lists(st.floats(0, 1), max_size=7), st.data())
def test_a_round_survives_writing_and_reading(confidences: list[float], data: st.DataObject) -> None:
    survival, product = [], 1.0
    for one in confidences:
        product = round(product * one, 5)
        survival.append(product)
    verified = data.draw(st.integers(0, len(survival)))
    accepted = data.draw(st.integers(0, verified))
    told = TracedRequest(
        sequence_id="s", survival=tuple(survival), planned=verified, verified=verified, accepted=accepted
    )
    before = TracedRound(
        at=1.5,
        round=3,
        planner="scheduler",
        curve_version="",
        batch_tokens=9,
        step_seconds=0.25,
        draft_seconds=0.0,
        requests=(told,),
    )
    assert decode(encode(before).decode()) == before


def test_prefill_is_what_a_pass_held_besides_anchors_and_drafts() -> None:
    assert traced(1).decode_tokens == 4
    assert traced(1).prefill_tokens == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"requests": [{"id": "a", "survival": [0.5, 0.6]}]}, "never rise"),
        ({"requests": {}}, "requests must be a list"),
        ({"step_seconds": "fast"}, "step_seconds must be a number"),
        ({"round": -1}, "round must be a whole number"),
        ({"kind": "plan"}, "kind must be header, curve or round, got 'plan'"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(change: dict[str, object], complaint: str) -> None:
    row = json.loads(encode(traced(1))) | change
    with pytest.raises(ConfigError, match=complaint):
        decode(json.dumps(row))


def test_the_writer_keeps_order_and_begins_with_header(tmp_path: Path) -> None:
    writer = TraceWriter(TraceOptions(path=tmp_path / "deep" / "trace.jsonl", sample=1.0), HEADER)
    writer.put(CURVE)
    for number in range(50):
        writer.put(traced(number))
    writer.close()
    assert read(tmp_path / "deep" / "trace.jsonl") == [HEADER, CURVE, *map(traced, range(50))]


def test_files_rotate_within_the_bound_and_each_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    options = TraceOptions(path=path, sample=1.0, max_bytes=4096, max_files=3)
    writer = TraceWriter(options, HEADER, queued=1000)
    writer.put(CURVE)
    for number in range(300):
        writer.put(traced(number))
    writer.close()
    files = [rotated(path, 2), rotated(path, 1), path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 4096 for file in files)
    assert all(read(file)[:2] == [HEADER, CURVE] for file in files)
    kept = [record.round for file in files for record in read(file) if isinstance(record, TracedRound)]
    assert kept == list(range(300 - len(kept), 300))


def test_a_line_cut_short_by_a_kill_is_removed_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(encode(HEADER) + encode(traced(1)) + encode(traced(2))[:30])
    writer = TraceWriter(TraceOptions(path=path), HEADER)
    writer.put(traced(3))
    writer.close()
    assert read(path) == [HEADER, traced(1), HEADER, traced(3)]


def test_what_does_not_fit_the_queue_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(TraceOptions(path=path), HEADER, queued=1)
    for number in range(5000):
        writer.put(traced(number))
    writer.close()
    written = [record for record in read(path) if isinstance(record, TracedRound)]
    assert writer.dropped > 0
    assert len(written) + writer.dropped == 5000


def test_a_path_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the trace"):
        TraceWriter(TraceOptions(path=tmp_path), HEADER)


@pytest.mark.parametrize("field", [{"sample": 0.0}, {"sample": 1.5}, {"max_bytes": 10}, {"max_files": 0}])
def test_bad_options_are_named(field: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        TraceOptions(path=tmp_path / "x", **field)  # type: ignore[arg-type]


@pytest.mark.parametrize("sample", [1.0, 0.25])
def test_a_traced_loop_commits_the_same_and_records_its_share(tmp_path: Path, sample: float) -> None:
    questions = prompts(3)
    plain = run(make_loop(drafts=ScriptedDrafts()), [request(str(i), p) for i, p in enumerate(questions)])
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(TraceOptions(path=path, sample=sample), HEADER)
    source = TracingPlanSource(
        FullPlanSource(), writer, sample=sample, planner_name=lambda: "full", curve=CURVE.document
    )
    loop = make_loop(drafts=ScriptedDrafts(), planner=source)
    assert run(loop, [request(str(i), p) for i, p in enumerate(questions)]) == plain
    writer.close()
    _, curve, *rounds = read(path)
    assert isinstance(curve, TracedCurve)
    decoded = [one for one in rounds if isinstance(one, TracedRound) and one.requests]
    assert decoded
    for one in decoded:
        assert one.planner == "full"
        assert one.curve_version == curve.version
        assert [r.planned for r in one.requests] == [len(r.survival) for r in one.requests]
        assert all(r.coupled for r in one.requests)  # greedy
        assert one.context_tokens >= len(one.requests)
    numbers = [one.round for one in rounds if isinstance(one, TracedRound)]
    assert numbers == list(range(round(1 / sample), numbers[-1] + 1, round(1 / sample)))


class FullDisk:
    """Accepts ten more bytes and then none, while `full`."""

    def __init__(self) -> None:
        self._write = os.write
        self.full = False

    def write(self, file: int, data: bytes) -> int:
        if not self.full or len(data) < 100:
            return self._write(file, data)
        self._write(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_once_and_leaves_no_broken_line(tmp_path, monkeypatch, caplog) -> None:
    disk = FullDisk()
    monkeypatch.setattr(trace_writer.os, "write", disk.write)
    writer = TraceWriter(TraceOptions(path=tmp_path / "t.jsonl"), HEADER)
    writer.put(traced(1))
    eventually_now(lambda: len((tmp_path / "t.jsonl").read_text().splitlines()) == 2)
    disk.full = True
    for number in range(2, 7):
        writer.put(traced(number))
        eventually_now(lambda lost=number - 1: writer.dropped == lost)
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1
    disk.full = False
    writer.put(traced(7))
    writer.close()
    assert [record.round for record in read(tmp_path / "t.jsonl") if isinstance(record, TracedRound)] == [
        1,
        7,
    ]
    assert "is written again, 5 records lost" in caplog.text


@pytest.mark.parametrize("room", ["deleted", "moved", "directory deleted"])
def test_a_file_that_was_removed_is_begun_anew(tmp_path: Path, room: str) -> None:
    """A full disk gets its room back only when nobody has the file open."""
    path, aside = tmp_path / "traces" / "t.jsonl", tmp_path / "aside"
    writer = TraceWriter(TraceOptions(path=path), HEADER)
    writer.put(CURVE)
    writer.put(traced(1))
    eventually_now(lambda: len(path.read_text().splitlines()) == 3)
    before = len(open_files())
    path.replace(aside)
    if room != "moved":
        aside.unlink()
    if room == "directory deleted":
        path.parent.rmdir()
    writer.put(traced(2))
    eventually_now(lambda: path.exists() and len(path.read_text().splitlines()) == 3)
    assert len(open_files()) <= before
    writer.close()
    assert read(path) == [HEADER, CURVE, traced(2)]
    assert writer.dropped == 0


def open_files() -> list[int]:
    """Those still open, of the descriptors there could be."""
    found = []
    for file in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(file)
            found.append(file)
    return found


def test_attempts_to_write_on_a_full_disk_leave_no_file_open(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "t.jsonl"
    writer = TraceWriter(TraceOptions(path=path), HEADER)
    before = len(open_files())
    monkeypatch.setattr(trace_writer.os, "write", full)
    path.unlink()
    for number in range(1, 4):
        writer.put(traced(number))
        eventually_now(lambda lost=number: writer.dropped == lost)
    assert len(open_files()) <= before
    monkeypatch.undo()
    writer.put(traced(4))
    writer.close()
    assert read(path) == [HEADER, traced(4)]


def full(file: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def eventually_now(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
