"""Simulate a cluster with the planners used in serving and measured round times.

Every scenario field is both a flag and a field of --config (YAML or JSON; flags win). By default, drafts are
accepted as measured with the shipped drafter and round times are those of the demo model on the machine named
in docs/simulation.md; pass --domains-file or --trace and --curve to simulate your own model and hardware.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_core.errors import ConfigError
from dspark_core.simulation.domains import (
    DEFAULTS,
    RecordedRequest,
    domain_of_trace,
    read_domains,
    stack_domains,
)
from dspark_core.simulation.planner_names import NAMES, planner_factory
from dspark_core.simulation.plots import draw_frontier, require_matplotlib
from dspark_core.simulation.records import Summary
from dspark_core.simulation.running import FrontierPoint, World, frontier, simulate, size_pools
from dspark_core.simulation.scenario import HELP, Scenario
from dspark_core.simulation.trace_reader import read_trace
from services.cli.clusters.simulate_tables import frontier_table, pool_lines, summary_table
from services.cli.clusters.simulation_inputs import DEFAULT_ROUND_TIME, read_mapping, read_round_time
from services.cli.clusters.tables import table_console
from services.cli.output_files import require_writable, require_writable_folder, write_output

SIMULATED_PLANNERS = ("none", "mtp1", "fixed:4", "algorithm1", "cluster")
FILE_FIELDS = ("planners", "curve", "domains_file", "traces")
"""Fields of --config besides those of the scenario."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("simulate", help="simulate a cluster", description=__doc__)
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="scenario as YAML or JSON")
    parser.add_argument(
        "--planner",
        nargs="+",
        default=None,
        metavar="NAME",
        help=f"planners to compare, out of {', '.join(NAMES)} (default: {' '.join(SIMULATED_PLANNERS)})",
    )
    parser.add_argument(
        "--size", action="store_true", help="find the fewest verifiers and drafters that serve the load"
    )
    parser.add_argument(
        "--frontier",
        type=int,
        nargs="+",
        default=None,
        metavar="USERS",
        help="sweep these loads, in users per verifier",
    )
    _add_files(parser)
    _add_scenario(parser)
    parser.set_defaults(run=run)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--curve",
        type=Path,
        default=None,
        metavar="FILE",
        help="round times, as written by `dspark profile --out` (default: the demo model's)",
    )
    parser.add_argument(
        "--domains-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="recorded drafts by domain, as written by benchmarks.record_domains (default: the demo model's)",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        nargs="+",
        default=None,
        metavar="FILE",
        help="take drafts from these traces instead; each file is a domain",
    )
    parser.add_argument(
        "--plots", type=Path, default=None, metavar="DIR", help="write plots of the --frontier to DIR"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the figures to FILE as JSON"
    )


def _add_scenario(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scenario")
    for one in dataclasses.fields(Scenario):
        flag, text = f"--{one.name.replace('_', '-')}", one.metadata[HELP]
        if one.name == "domains":
            group.add_argument(flag, default=None, metavar="NAME=SHARE", nargs="+", help=text)
        elif one.type == "bool":
            group.add_argument(flag, action="store_const", const=True, default=None, help=text)
        else:
            kind = int if one.type == "int" else float
            help_text = f"{text} (default: {one.default:g})"
            group.add_argument(flag, type=kind, default=None, metavar="N", help=help_text)


def run(arguments: argparse.Namespace) -> int:
    config = read_mapping(arguments.config) if arguments.config else {}
    scenario = _scenario(arguments, config)
    planners = arguments.planner or _texts(config, "planners") or list(SIMULATED_PLANNERS)
    for name in planners:
        planner_factory(name, cohorts=scenario.cohorts)
    _check(arguments)
    world = _world(arguments, config)
    console = table_console()
    if arguments.size:
        return _size(world, scenario, planners, console, arguments.out)
    summaries = _simulate(world, scenario, planners, console)
    console.print(summary_table(summaries, scenario))
    for line in pool_lines(summaries[-1], scenario):
        console.print(line)
    frontiers = _frontier(arguments, world, scenario, planners, console)
    _write(arguments.out, scenario, summaries, frontiers)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError, before the long work, for options that would fail after it."""
    if arguments.out is not None:
        require_writable(arguments.out)
    if arguments.plots is not None:
        require_matplotlib()
        if arguments.frontier is None:
            raise ConfigError("--plots needs --frontier with the loads to sweep, e.g. --frontier 1 2 4 8")
        require_writable_folder(arguments.plots)
    if arguments.size and arguments.frontier is not None:
        raise ConfigError("--size (pools for one load) cannot be used with --frontier (a sweep of loads)")
    if arguments.frontier is not None and min(arguments.frontier) < 1:
        raise ConfigError(f"--frontier takes users per verifier >= 1, got {min(arguments.frontier)}")


def _simulate(world: World, scenario: Scenario, planners: Sequence[str], console: Console) -> list[Summary]:
    summaries = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        for name in planners:
            task = progress.add_task(name, total=scenario.requests)
            started = time.perf_counter()

            def on_ended(count: int, task: Any = task) -> None:  # noqa: ANN401
                progress.update(task, completed=count)

            summaries.append(simulate(world, scenario, name, on_ended))
            console.print(f"{name}: {summaries[-1].rounds} rounds in {time.perf_counter() - started:.1f} s")
    return summaries


def _frontier(
    arguments: argparse.Namespace,
    world: World,
    scenario: Scenario,
    planners: Sequence[str],
    console: Console,
) -> dict[str, tuple[FrontierPoint, ...]]:
    if arguments.frontier is None:
        return {}
    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("frontier", total=len(planners) * len(arguments.frontier))
        found = frontier(world, scenario, planners, arguments.frontier, lambda: progress.advance(task))
    console.print(frontier_table(found))
    if arguments.plots is not None:
        title = f"{scenario.verifiers} verifiers, simulated"
        for path in draw_frontier(found, arguments.plots, title):
            console.print(f"written to {path}")
    return found


def _size(
    world: World, scenario: Scenario, planners: Sequence[str], console: Console, out: Path | None
) -> int:
    found = {}
    for name in planners:
        with console.status(name) as status:
            pools = size_pools(
                world,
                scenario,
                name,
                lambda verifiers, drafters, name=name: status.update(  # type: ignore[misc]
                    f"{name}: {verifiers} verifiers, {drafters or verifiers} drafters"
                ),
            )
        found[name] = pools
        console.print(
            f"{name}: {pools.verifiers} verifiers and {pools.drafters} drafters serve "
            f"{scenario.arrivals_per_second:g} requests per second"
        )
    if out is not None:
        document = {name: dataclasses.asdict(pools) for name, pools in found.items()}
        write_output(out, json.dumps(document, indent=2) + "\n")
    return 0


def _scenario(arguments: argparse.Namespace, config: Mapping[str, Any]) -> Scenario:
    values = {name: value for name, value in config.items() if name not in FILE_FIELDS}
    for one in dataclasses.fields(Scenario):
        given = getattr(arguments, one.name)
        if given is not None:
            values[one.name] = _shares(given) if one.name == "domains" else given
    if not values.get("users") and not values.get("arrivals_per_second"):
        values["users"] = 16 * values.get("verifiers", Scenario(users=1).verifiers)
    return Scenario.of(values, beside=FILE_FIELDS)


def _shares(texts: Sequence[str]) -> dict[str, float]:
    shares = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ConfigError(f"--domains takes NAME=SHARE, got {text!r}") from None
    return shares


def _world(arguments: argparse.Namespace, config: Mapping[str, Any]) -> World:
    curve = arguments.curve or _path(config, "curve") or DEFAULT_ROUND_TIME
    return World(stack_domains(_domains(arguments, config)), read_round_time(curve))


def _domains(
    arguments: argparse.Namespace, config: Mapping[str, Any]
) -> Mapping[str, Sequence[RecordedRequest]]:
    traces, file = arguments.trace, arguments.domains_file
    if traces is None and file is None:  # either flag overrides both fields
        traces = [Path(one) for one in _texts(config, "traces")]
        file = _path(config, "domains_file")
    if traces and file is not None:
        raise ConfigError(f"give either traces or a domains file, got the trace {traces[0]} and {file}")
    if not traces:
        return read_domains(file or DEFAULTS)
    named: dict[str, Path] = {}
    for path in traces:
        if path.stem in named:
            raise ConfigError(
                f"traces {named[path.stem]} and {path} would both be the domain {path.stem!r}: rename one"
            )
        named[path.stem] = path
    return {name: domain_of_trace(read_trace([path])) for name, path in named.items()}


def _path(config: Mapping[str, Any], name: str) -> Path | None:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be a file name, got {value!r}")
    return None if value is None else Path(value)


def _texts(config: Mapping[str, Any], name: str) -> list[str]:
    values = config.get(name, [])
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{name} must be a list of strings, got {values!r}")
    return values


def _write(
    out: Path | None,
    scenario: Scenario,
    summaries: Sequence[Summary],
    frontiers: Mapping[str, Sequence[FrontierPoint]],
) -> None:
    if out is None:
        return
    document = {
        "format": "dspark-simulation-1",
        "scenario": dataclasses.asdict(scenario),
        "summaries": [dataclasses.asdict(one) for one in summaries],
        "frontiers": {
            name: [dataclasses.asdict(one) for one in points] for name, points in frontiers.items()
        },
    }
    write_output(out, json.dumps(document, indent=2) + "\n")
