"""`dspark simulate` and `dspark replay` as commands: what they refuse before the work, and their files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dspark_core.engine.tracing.trace_format import TracedCurve, TracedRequest, TraceHeader, encode
from dspark_core.simulation.domains import DEFAULTS
from dspark_core.simulation.scenario import HELP, Scenario
from services.cli.clusters import replay, simulate
from services.cli.clusters.simulation_inputs import DEFAULT_ROUND_TIME
from services.cli.main import main
from services.common.exits import EXIT_CONFIG
from tests.unit.simulation.worlds import round_time, traced

DOCUMENT = Path(__file__).parents[3] / "docs" / "simulation.md"
SMALL = ["--verifiers", "1", "--users", "2", "--requests", "4", "--planner", "none"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_trace(path: Path) -> Path:
    request = TracedRequest(sequence_id="a", survival=(0.9, 0.8), planned=2, verified=2, accepted=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = encode(TraceHeader(replica_id="v", model="tiny", sample=1.0))
    curve = encode(TracedCurve(version="c", document=round_time().to_dict()))
    rounds = [encode(traced(number, request)) for number in range(1, 9)]
    path.write_bytes(b"".join([header, curve, *rounds]))
    return path


def test_the_documented_scenario_is_a_valid_one(folder: Path, capsys) -> None:
    (block,) = re.findall(r"```yaml\n(# sim\.yaml.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    config = folder / "sim.yaml"
    config.write_text(block.replace("requests: 5000", "requests: 20"), encoding="utf-8")
    (folder / "profile.json").write_bytes(DEFAULT_ROUND_TIME.read_bytes())
    for name in ("chat", "math", "code"):
        write_trace(folder / f"{name}.jsonl")
    assert main(["simulate", "--config", str(config)]) == 0
    without = [line for line in config.read_text().splitlines() if not line.startswith("traces")]
    config.write_text("\n".join(without), encoding="utf-8")
    assert main(["simulate", "--config", str(config)]) == 0
    assert capsys.readouterr().err == ""


def test_every_field_of_a_scenario_has_a_flag_with_a_help_and_a_word_in_the_document(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    document = DOCUMENT.read_text(encoding="utf-8")
    for one in dataclasses.fields(Scenario):
        assert f"--{one.name.replace('_', '-')} " in told
        assert one.metadata[HELP] in told
        assert one.name in document


def test_traces_that_would_be_one_domain_are_refused(folder: Path, capsys) -> None:
    traces = [write_trace(folder / place / "rounds.jsonl") for place in ("a", "b")]
    assert main(["simulate", *SMALL, "--trace", *map(str, traces)]) == EXIT_CONFIG
    told = f"traces {traces[0]} and {traces[1]} would both be the domain 'rounds'"
    assert told in capsys.readouterr().err


def test_traces_and_a_file_of_domains_exclude_each_other_and_flags_win(folder: Path, capsys) -> None:
    trace, config = write_trace(folder / "rounds.jsonl"), folder / "sim.json"
    both = ["--trace", str(trace), "--domains-file", str(DEFAULTS)]
    assert main(["simulate", *SMALL, *both]) == EXIT_CONFIG
    assert f"got the trace {trace} and {DEFAULTS}" in capsys.readouterr().err
    config.write_text(json.dumps({"traces": [str(trace)], "domains_file": str(DEFAULTS)}))
    assert main(["simulate", *SMALL, "--config", str(config)]) == EXIT_CONFIG
    config.write_text(json.dumps({"traces": ["missing.jsonl"]}))
    assert main(["simulate", *SMALL, "--config", str(config), "--domains-file", str(DEFAULTS)]) == 0
    config.write_text(json.dumps({"domains_file": "missing.json"}))
    assert main(["simulate", *SMALL, "--config", str(config), "--trace", str(trace)]) == 0


@pytest.mark.parametrize("planner", ["simulate", "replay"])
def test_results_go_into_a_folder_that_is_not_there_yet(planner: str, folder: Path) -> None:
    trace, out = write_trace(folder / "rounds.jsonl"), folder / "new" / "er" / "result.json"
    arguments = {"simulate": SMALL, "replay": [str(trace), "--planner", "none"]}[planner]
    assert main([planner, *arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["format"] == {"simulate": "dspark-simulation-1",
                                                     "replay": "dspark-replay-1"}[planner]  # fmt: skip


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("too late")

    for module, name in ((simulate, "read_round_time"), (replay, "read_trace")):
        monkeypatch.setattr(module, name, work)
    (folder / "file").write_text("")
    for command in (["simulate", *SMALL], ["simulate", *SMALL, "--size"], ["replay", "rounds.jsonl"]):
        assert main([*command, "--out", str(folder)]) == EXIT_CONFIG
        assert f"--out must be a file, got the directory {folder}" in capsys.readouterr().err
        assert main([*command, "--out", str(folder / "file" / "x.json")]) == EXIT_CONFIG
        assert f"cannot write to {folder / 'file'}" in capsys.readouterr().err


def test_a_folder_for_plots_that_cannot_be_made_is_told_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(simulate, "read_round_time", lambda *_: pytest.fail("too late"))
    (folder / "file").write_text("")
    for plots in (folder / "file", folder / "file" / "plots"):
        assert main(["simulate", *SMALL, "--frontier", "1", "--plots", str(plots)]) == EXIT_CONFIG
        assert f"cannot write to {plots}" in capsys.readouterr().err


def test_pools_for_one_load_and_a_sweep_over_loads_exclude_each_other(capsys) -> None:
    assert main(["simulate", "--arrivals-per-second", "3", "--size", "--frontier", "4"]) == EXIT_CONFIG
    assert "cannot be used with --frontier" in capsys.readouterr().err
