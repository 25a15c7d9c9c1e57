"""Plan traced rounds again with other planners and report what each would have gained.

Traces are written by `dspark up --trace FILE` or by a verifier with DSPARK_TRACE_FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.errors import ConfigError
from dspark_core.simulation.planner_names import NAMES, planner_factory
from dspark_core.simulation.replay import RECORDED, ReplayResult, replay
from dspark_core.simulation.trace_reader import Trace, read_trace
from services.cli.clusters.simulation_inputs import read_round_time
from services.cli.clusters.tables import open_table, table_console
from services.cli.output_files import require_writable, write_output

REPLAYED_PLANNERS = (
    "none",
    "fixed:2",
    "fixed:7",
    "threshold:0.5",
    "algorithm1",
    "delayed",
    "coupled",
    "cluster",
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("replay", help="plan traced rounds with other planners", description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+", help="trace files, oldest first")
    parser.add_argument(
        "--planner",
        nargs="+",
        default=list(REPLAYED_PLANNERS),
        metavar="NAME",
        help=f"planners to compare, out of {', '.join(NAMES)} (default: {' '.join(REPLAYED_PLANNERS)})",
    )
    parser.add_argument(
        "--curve",
        type=Path,
        default=None,
        metavar="FILE",
        help="round times, as written by `dspark profile --out` (default: those in the trace)",
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="rounds to replay (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the figures to FILE as JSON"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be >= 1, got {arguments.limit}")
    for name in arguments.planner:
        planner_factory(name)  # rejects a misspelled name before the trace is read
    if arguments.out is not None:
        require_writable(arguments.out)
    trace = read_trace(arguments.traces)
    round_time = _round_time(trace, arguments.curve)
    rounds = trace.rounds[: arguments.limit]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in (RECORDED, *arguments.planner):
            task = progress.add_task(name, total=len(rounds))
            results.append(replay(rounds, round_time, name, on_round=partial(progress.advance, task)))
    _write(arguments, results, trace)
    _show(results, trace)
    return 0


def _round_time(trace: Trace, file: Path | None) -> RoundTimeModel:
    if file is not None:
        return read_round_time(file)
    if not trace.curves:
        raise ConfigError("the trace has no step times: pass those of `dspark profile` with --curve")
    return RoundTimeModel.from_dict(list(trace.curves.values())[-1])


def _write(arguments: argparse.Namespace, results: Sequence[ReplayResult], trace: Trace) -> None:
    if arguments.out is None:
        return
    document = {
        "format": "dspark-replay-1",
        "traces": [str(path) for path in arguments.traces],
        "models": list(trace.models),
        "results": [dataclasses.asdict(one) for one in results],
    }
    write_output(arguments.out, json.dumps(document, indent=2) + "\n")


def _show(results: Sequence[ReplayResult], trace: Trace) -> None:
    console = table_console()
    recorded = results[0]
    table = open_table(f"{recorded.rounds} rounds, {recorded.request_rounds} request rounds")
    table.add_column("planner", no_wrap=True)
    for head in (
        "verified\nper round",
        "tokens/s\nby survival",
        "tokens/s\nby outcome",
        "gain",
        "known",
        "as\nrecorded",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for one in results:
        gain = one.outcome_tokens_per_second / recorded.outcome_tokens_per_second - 1.0
        table.add_row(
            one.planner,
            f"{one.verify_length:.2f}",
            f"{one.expected_tokens_per_second:.1f}",
            f"{one.outcome_tokens_per_second:.1f}",
            f"{100 * gain:+.1f} %",
            f"{100 * one.known_share:.0f} %",
            f"{100 * one.same_share:.0f} %",
        )
    console.print(table)
    if recorded.undrafted_share > 0:
        share = 100 * recorded.undrafted_share
        console.print(
            f"{share:.0f} % of the request rounds were recorded without a draft, so there is nothing to plan"
        )
    if any(one.unmet_floors for one in results):
        broken = ", ".join(f"{one.planner} {one.unmet_floors}" for one in results)
        console.print(f"request rounds below their speed floor: {broken}")
    if trace.cut_lines:
        console.print(f"[yellow]incomplete last lines skipped: {trace.cut_lines}[/yellow]")
