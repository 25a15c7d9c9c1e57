"""Recorded rounds planned again: known outcomes are counted, unknown ones estimated, bad lines named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_core.algorithms.loop_time import LoopTimeModel
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.tracing.trace_format import (
    TracedCurve,
    TracedRequest,
    TraceHeader,
    encode,
)
from dspark_core.errors import ConfigError
from dspark_core.simulation.planner_names import NAMES
from dspark_core.simulation.replay import RECORDED, replay
from dspark_core.simulation.trace_reader import read_trace
from services.cli.main import main
from tests.unit.simulation.worlds import FLAT, STEP_SECONDS, round_time, traced

HEADER = encode(TraceHeader(replica_id="v", model="tiny", sample=1.0))


def asked(
    name: str, survival: tuple[float, ...], verified: int, accepted: int, floor: float = 0.0
) -> TracedRequest:
    return TracedRequest(
        sequence_id=name,
        survival=survival,
        planned=verified,
        verified=verified,
        accepted=accepted,
        min_tokens_per_second=floor,
    )


ROUNDS = [
    traced(1, asked("a", (0.9, 0.8, 0.4), 2, 2), asked("b", (0.5, 0.1, 0.1), 1, 0)),
    traced(2, asked("a", (0.8, 0.2, 0.1), 3, 1)),
]


def test_the_record_itself_is_told_as_it_was() -> None:
    result = replay(ROUNDS, FLAT, RECORDED)
    assert (result.rounds, result.request_rounds, result.verified) == (2, 3, 6)
    assert result.outcome_tokens == 6  # three bonus tokens, two accepted, one accepted
    assert result.expected_tokens == pytest.approx(3 + 0.9 + 0.8 + 0.5 + 0.8 + 0.2 + 0.1)
    assert result.seconds == pytest.approx(2 * (STEP_SECONDS + 0.004))
    assert (result.known_share, result.same_share) == (1.0, 1.0)


def test_no_speculation_commits_one_token_each_and_saves_the_drafting() -> None:
    result = replay(ROUNDS, FLAT, "none")
    assert (result.verified, result.outcome_tokens) == (0, 3)
    assert result.seconds == pytest.approx(2 * STEP_SECONDS)


def test_what_was_rejected_stays_rejected_and_what_was_never_tried_is_estimated() -> None:
    result = replay(ROUNDS, FLAT, "fixed:3")
    # Request a of round 1 had both its tokens accepted: the third stands with 0.4 / 0.8.
    assert result.outcome_tokens == pytest.approx(3 + 2.5 + 0 + 1)
    assert result.known_share == pytest.approx(2 / 3)


def test_a_round_slower_than_the_model_stays_slower_under_every_planner() -> None:
    slow = [traced(1, asked("a", (0.9,), 1, 1), step=2 * STEP_SECONDS)]
    assert replay(slow, FLAT, "none").seconds == pytest.approx(2 * STEP_SECONDS)


def test_a_floor_that_the_plan_does_not_hold_is_counted() -> None:
    promised = [traced(1, asked("a", (0.9, 0.8), 0, 0, floor=70.0))]
    times = round_time(per_token=0.0, draft=0.004)
    assert replay(promised, times, "none").unmet_floors == 1
    assert replay(promised, times, "fixed:2").unmet_floors == 0


def test_looked_up_tokens_are_there_for_everybody_and_cost_no_drafting() -> None:
    free = [traced(n, replace(asked("a", (0.9, 0.8), 2, 2), looked_up=True)) for n in range(40)]
    times = round_time(per_token=0.0, draft=0.004)
    for planner in ("dspark", "cluster", "fixed:2"):
        result = replay(free, times, planner)
        assert (result.verified, result.outcome_tokens) == (80, 120), planner
        assert result.seconds == pytest.approx(40 * STEP_SECONDS), planner


def test_every_planner_pays_the_round_loop_as_recorded_or_else_as_the_curve_has_it() -> None:
    rested = traced(1, asked("a", (0.9,), 1, 1))
    told = replace(FLAT, loop=LoopTimeModel(0.003, 0.0))
    for planner, drafting in ((RECORDED, 0.004), ("none", 0.0), ("dspark", 0.004)):
        results = [replay([one], told, planner) for one in (rested, replace(rested, loop_seconds=0.005))]
        assert [one.seconds - STEP_SECONDS - drafting for one in results] == pytest.approx([0.003, 0.005])


def test_a_loop_that_takes_long_makes_it_worth_to_verify_more() -> None:
    """A token at 55 % for 60 % more of the pass: a loss, unless the round has other costs."""
    times = RoundTimeModel(StepTimeModel.of_curve((1, 2), (0.010, 0.016)))
    short = traced(1, replace(asked("a", (0.55,), 1, 1), looked_up=True, coupled=True), step=0.016)
    for planner in ("algorithm1", "coupled"):
        assert replay([short], times, planner).verified == 0
        assert replay([replace(short, loop_seconds=0.005)], times, planner).verified == 1


def test_a_floor_is_held_against_the_whole_round() -> None:
    promised = traced(1, asked("a", (), 0, 0, floor=45.0))
    assert replay([promised], FLAT, "none").unmet_floors == 0
    assert replay([replace(promised, loop_seconds=0.005)], FLAT, "none").unmet_floors == 1


@pytest.mark.parametrize("planner", [name.replace(":N", ":2").replace(":P", ":0.5") for name in NAMES])
def test_every_planner_can_be_replayed(planner: str) -> None:
    undrafted = traced(3, asked("a", (), 0, 0), asked("c", (), 0, 0))
    result = replay([*ROUNDS, undrafted] * 10, round_time(), planner)
    assert result.rounds == 30
    assert result.request_rounds == 50
    assert result.undrafted_share == 0.4
    assert 50 <= result.outcome_tokens <= 50 + result.verified


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([HEADER, b"{\n"], r"t.jsonl:2: not valid JSON"),
        ([encode(ROUNDS[0])], r"t.jsonl:1: a trace must begin with a header"),
        ([HEADER.replace(b"trace-1", b"trace-9")], r"t.jsonl:1: schema must be 'dspark-trace-1'"),
        ([HEADER, encode(ROUNDS[0]).replace(b'"accepted":2', b'"accepted":5')], r"t.jsonl:2: accepted <="),
        ([HEADER], "no decoding round"),
        ([HEADER, b"\xff\xfe\n"], "is not UTF-8"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path: Path, lines: list[bytes], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_trace([write(tmp_path / "t.jsonl", *lines)])


def test_a_line_cut_short_by_a_kill_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", HEADER, encode(ROUNDS[0]), encode(ROUNDS[1])[:40])
    trace = read_trace([path])
    assert (len(trace.rounds), trace.cut_lines) == (1, 1)


def test_the_replay_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = encode(TracedCurve(version="c", document=round_time().to_dict()))
    path = write(tmp_path / "t.jsonl", HEADER, curve, *map(encode, ROUNDS))
    out = tmp_path / "replay.json"
    assert main(["replay", str(path), "--planner", "none", "fixed:2", "--out", str(out)]) == 0
    assert "fixed:2" in capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    assert [one["planner"] for one in results] == ["recorded", "none", "fixed:2"]
    assert main(["replay", str(path), "--planner", "best"]) == 2
    assert "unknown planner 'best'" in capsys.readouterr().err


def test_the_simulate_command_takes_a_file_and_lets_flags_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sim.yaml"
    config.write_text("verifiers: 1\nusers: 4\nrequests: 30\nanswer_tokens: 8\nplanners: [none, cluster]\n")
    out, plots = tmp_path / "sim.json", tmp_path / "plots"
    files = ["--config", str(config), "--out", str(out), "--plots", str(plots)]
    assert main(["simulate", *files, "--users", "2", "--frontier", "1", "2"]) == 0
    document = json.loads(out.read_text())
    assert document["scenario"]["users"] == 2
    assert [one["planner"] for one in document["summaries"]] == ["none", "cluster"]
    assert {path.name for path in plots.iterdir()} == {"frontier.png", "verify_length.png"}
    assert main(["simulate", "--plots", str(plots)]) == 2
    assert "--frontier" in capsys.readouterr().err
    assert main(["simulate", "--users", "0", "--arrivals-per-second", "-1"]) == 2
    assert "arrivals_per_second" in capsys.readouterr().err
