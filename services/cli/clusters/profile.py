"""Measure how long target steps and drafts take on this machine.

Step times are measured over requests, tokens per request and context length, and refined where they jump;
draft times over requests. Each is the lower quartile of several passes. A verifier whose DSPARK_PROFILE names
the JSON file does not measure at startup.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.building import BuiltTarget, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS
from dspark_core.engine.profiling.draft_profiler import DEFAULT_REQUESTS, profile_draft_time
from dspark_core.engine.profiling.profile_file import replica_kind, write_profile
from dspark_core.engine.profiling.profiler import ProfileSettings, profile_step_time, request_counts
from dspark_core.errors import ConfigError
from dspark_core.evaluation.plots import require_matplotlib
from services.cli.arguments import add_engine_arguments, add_stack_arguments, stack_options
from services.cli.clusters.profile_plot import draw_profile
from services.cli.clusters.tables import open_table, table_console
from services.cli.output_files import require_writable
from services.embedded.options import StackOptions


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = ProfileSettings()
    parser = commands.add_parser("profile", help="measure step and draft times", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the profile to FILE as JSON"
    )
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="plot the profile to a PNG")
    parser.add_argument("--quick", action="store_true", help="rough measurement in about three seconds")
    parser.add_argument(
        "--seconds",
        type=float,
        default=defaults.budget_seconds,
        metavar="S",
        help="time budget of the step measurements (default: %(default)g)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=defaults.repeats,
        metavar="N",
        help="passes per shape (default: %(default)s)",
    )
    parser.add_argument(
        "--max-requests",
        type=int,
        default=32,
        metavar="N",
        help="largest batch to measure (default: %(default)s)",
    )
    add_stack_arguments(parser, template=False)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    options = stack_options(arguments)
    if arguments.out is not None:
        require_writable(arguments.out)
    if arguments.plot is not None:
        require_matplotlib()
        if arguments.plot.suffix.lower() != ".png":
            raise ConfigError(f"--plot must end in .png, got {arguments.plot}")
        require_writable(arguments.plot, "--plot")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = table_console()
    target = build_target(options.engine)
    model = RoundTimeModel(_step_time(target, options, settings, console))
    if options.drafter is not None:
        model = replace(model, draft=_draft_time(target, options, arguments.max_requests, settings))
    console.print(f"{model.verify.key}", soft_wrap=True)
    console.print(step_table(model))
    if model.draft.requests:
        console.print(draft_table(model.draft))
    if arguments.out is not None:
        write_profile(arguments.out, model)
        console.print(f"written to {arguments.out}", soft_wrap=True)
    if arguments.plot is not None:
        draw_profile(model, arguments.plot)
        console.print(f"written to {arguments.plot}", soft_wrap=True)
    return 0


def _settings(arguments: argparse.Namespace) -> ProfileSettings:
    """Raises ConfigError."""
    if arguments.max_requests < 1:
        raise ConfigError(f"--max-requests must be >= 1, got {arguments.max_requests}")
    settings = ProfileSettings(
        requests=request_counts(arguments.max_requests),
        lookup_tokens=1 + BLOCK_TOKENS if arguments.lookup else None,
        repeats=arguments.repeats,
        budget_seconds=arguments.seconds,
    )
    return settings.quick() if arguments.quick else settings


def _step_time(
    target: BuiltTarget, options: StackOptions, settings: ProfileSettings, console: Console
) -> StepTimeModel:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring steps", total=None)

        def on_point(point: StepPoint) -> None:
            progress.update(
                task,
                description=f"{point.requests} requests, {point.batch_tokens} tokens: "
                f"{1000 * point.seconds:.1f} ms",
            )

        kind = replica_kind(options.engine, target.engine)
        return profile_step_time(target.engine, settings, key=kind, on_point=on_point)


def _draft_time(
    target: BuiltTarget, options: StackOptions, max_requests: int, settings: ProfileSettings
) -> DraftTimeModel:
    drafter = build_drafter(options.engine, target.shared)
    drafter.prepare()
    counts = [count for count in DEFAULT_REQUESTS if count <= max_requests]
    return profile_draft_time(
        LocalDraftSource(drafter),
        target.engine,
        counts,
        repeats=settings.repeats,
        budget_seconds=settings.budget_seconds / 2,
    )


def step_table(model: RoundTimeModel) -> Table:
    """Rows are requests, columns tokens per request; contexts other than the usual have rows of their own."""
    points = model.verify.points
    usual = model.verify.surface.context_per_request
    columns = sorted({p.batch_tokens // p.requests for p in points if p.batch_tokens % p.requests == 0})
    table = open_table("step time, ms")
    for head in ("requests", "context\nof each", *(f"x {count}" for count in columns)):
        table.add_column(head, justify="right", no_wrap=True)
    rows = sorted(
        {
            (p.context_tokens // p.requests != usual, p.context_tokens // p.requests, p.requests)
            for p in points
        }
    )
    for _, context, requests in rows:
        row = {
            p.batch_tokens // p.requests: _milliseconds(p.seconds)
            for p in points
            if (p.requests, p.context_tokens // p.requests) == (requests, context)
            and p.batch_tokens % p.requests == 0
        }
        table.add_row(str(requests), str(context), *(row.get(count, "") for count in columns))
    between = sum(p.batch_tokens % p.requests != 0 for p in points)
    if between:
        table.caption = f"and {between} points in between"
    return table


def _milliseconds(seconds: float) -> str:
    """Tenths of a millisecond are noise once a step takes a second."""
    return f"{1000 * seconds:.1f}" if seconds < 1.0 else f"{1000 * seconds:.0f}"


def draft_table(draft: DraftTimeModel) -> Table:
    table = Table()
    for head in ("requests", "draft block, ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for requests, seconds in zip(draft.requests, draft.draft_seconds, strict=True):
        table.add_row(str(requests), f"{1000 * seconds:.1f}")
    return table
