"""Tables keep every figure, on a narrow terminal and in a pipe."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console
from rich.table import Table

from dspark_core.simulation.replay import ReplayResult
from dspark_core.simulation.trace_reader import Trace
from services.cli.clusters import replay
from services.cli.clusters.profile import step_table
from services.cli.clusters.simulation_inputs import DEFAULT_ROUND_TIME, read_round_time
from services.cli.clusters.tables import PIPED_COLUMNS, table_console


def shown(table: Table, columns: int) -> str:
    console = Console(file=io.StringIO(), width=columns)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_pipe_is_wide_unless_the_environment_says_how_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table_console().width == PIPED_COLUMNS
    monkeypatch.setenv("COLUMNS", "120")
    assert table_console().width == 120


@pytest.mark.parametrize("times", [1.0, 30.0])
def test_a_profile_fits_80_columns(times: float) -> None:
    model = read_round_time(DEFAULT_ROUND_TIME)
    points = [dataclasses.replace(p, seconds=times * p.seconds) for p in model.verify.points]
    scaled = dataclasses.replace(model, verify=dataclasses.replace(model.verify, points=tuple(points)))
    table = shown(step_table(scaled), 80)
    assert "…" not in table
    longest = max(p.seconds for p in points if p.batch_tokens % p.requests == 0)
    assert f" {1000 * longest:.{0 if longest >= 1 else 1}f} " in table
    assert table.split() == shown(step_table(scaled), 200).split()


def test_a_replay_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    fields = {one.name: 7 for one in dataclasses.fields(ReplayResult)}
    result = ReplayResult(**fields | {"planner": "cluster:unpriced"})  # type: ignore[arg-type]
    replay._show([result], Trace(rounds=(), prefill_rounds=0, curves={}, models=(), cut_lines=0))
    table = capsys.readouterr().out
    assert "…" not in table
    assert "cluster:unpriced" in table
