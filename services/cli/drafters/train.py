"""Train a drafter from a YAML configuration, or average checkpoints.

dspark train --config configs/smollm2-dspark.yaml --dry-run
dspark train --config run.yaml --set optimisation.steps=2000 --resume
torchrun --nproc-per-node 8 -m services.cli.main train --config run.yaml
dspark train average OUT IN IN...
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from dspark_core.errors import ConfigError
from dspark_core.training.allocator import keep_freed_memory
from dspark_core.training.averaging import average_checkpoints
from dspark_core.training.run import BEST, LOG, NEWEST, TrainingRun
from dspark_core.training.run_log import JsonLog, TensorBoardLog
from dspark_core.training.workers import Workers, own_device, started_by_torchrun
from services.cli.drafters.train_config import TrainConfig, read_config
from services.cli.drafters.train_dry_run import dry_run_table
from services.cli.drafters.train_output import TENSORBOARD, begin, claimed
from services.cli.drafters.train_progress import ProgressView
from services.cli.drafters.train_setup import (
    Setup,
    build_run,
    build_setup,
    build_validator,
)
from services.cli.exits import leave_at_once
from services.cli.write_errors import write_errors
from services.common.exits import EXIT_INTERRUPTED


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a drafter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file, required for training; see docs/training.md"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a field of the file; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="estimate sizes and times from a few steps; write nothing"
    )
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if any")
    going_on.add_argument("--fresh", action="store_true", help="delete the run in the output directory first")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(title="other actions", metavar="ACTION")
    average = actions.add_parser("average", help="average several checkpoints")
    average.add_argument("out", type=Path, help="directory to write")
    average.add_argument("inputs", type=Path, nargs="+", help="checkpoint directories of the same drafter")
    average.set_defaults(run=run_average)


def run_average(arguments: argparse.Namespace) -> int:
    with write_errors(f"{arguments.out} was not written"):
        average_checkpoints(arguments.out, arguments.inputs)
    print(f"mean of {len(arguments.inputs)} checkpoints written to {arguments.out}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    if arguments.config is None:
        raise ConfigError("dspark train needs --config")
    config = read_config(arguments.config, arguments.set)
    device = _device(config)
    if config.optimisation.threads is not None:
        torch.set_num_threads(config.optimisation.threads)
    if device.type == "cpu":
        keep_freed_memory()
    with started_by_torchrun(device) as workers:
        status = _run_as(workers, config, arguments)
    if workers.size > 1:
        # DTensor's caches keep the mesh, and with it the process group and gloo's threads, alive past this
        # point. If such a thread releases the last collective's tensors while the interpreter shuts down, the
        # process aborts (PyTorch 2.13: in a quarter of all runs of a small sharded module), and torchrun
        # reports a finished run as failed.
        leave_at_once(status)
    return status


def _run_as(workers: Workers, config: TrainConfig, arguments: argparse.Namespace) -> int:
    try:
        if arguments.dry_run:
            return _dry_run(build_setup(config, workers), workers)
        with write_errors("--resume continues from the last checkpoint"):
            resume, fresh = arguments.resume, arguments.fresh
            with claimed(config, workers, resume=resume, fresh=fresh):
                return _train(build_setup(config, workers, resume=resume), fresh)
    except KeyboardInterrupt:
        print("dspark: interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dry_run(setup: Setup, workers: Workers) -> int:
    build_validator(setup)  # rejects the same prompts as the run would
    table = dry_run_table(setup)
    if workers.is_first:
        Console().print(table)
    return 0


def _train(setup: Setup, fresh: bool) -> int:
    run, trainer = build_run(setup), setup.trainer
    workers = trainer.workers
    resumed = not fresh and run.resume()
    if workers.is_first:
        begin(setup.config, setup.draft_vocab_ids, fresh=fresh)
    workers.barrier()
    console = Console(stderr=True, quiet=not workers.is_first)
    with ProgressView(trainer.config.steps, trainer.step, console) as view, _stopping(run):
        if workers.is_first:
            _attach(run, setup, view)
            begins = f"resumed at step {trainer.step}" if resumed else "started"
            console.print(
                f"{begins}: {len(setup.source):,} sequences, {trainer.parameters:,} parameters, "
                f"{trainer.config.steps} steps",
                highlight=False,
                soft_wrap=True,
            )
            if (old := run.set_aside) is not None and old.best_step is not None:
                console.print(
                    f"validation has changed: the best so far, {old.best_length:.3f} at step "
                    f"{old.best_step}, is not compared with what follows",
                    soft_wrap=True,
                )
        run.run()
    if workers.is_first:
        _print_end(run, console)
    return 0 if run.finished else EXIT_INTERRUPTED


def _attach(run: TrainingRun, setup: Setup, view: ProgressView) -> None:
    output = setup.config.output
    run.listen(view)
    due = run.state.validation_due
    run.listen(JsonLog(output.directory / LOG, setup.trainer.step, validation_due=due))
    if output.tensorboard:
        run.listen(TensorBoardLog(output.directory / TENSORBOARD, setup.trainer.step))


def _print_end(run: TrainingRun, console: Console) -> None:
    output, step = run.settings.output, run.trainer.step
    if not run.finished:
        console.print(f"stopped at step {step}; --resume continues from there")
        return
    console.print(f"step {step}: {output / NEWEST}", soft_wrap=True)
    if run.state.best_step is not None:
        best = f"accepted length {run.state.best_length:.3f} at step {run.state.best_step}"
        console.print(f"best: {best}: {output / BEST}", soft_wrap=True)


def _device(config: TrainConfig) -> torch.device:
    try:
        device = own_device(config.optimisation.device)
    except RuntimeError as error:
        raise ConfigError(f"optimisation.device: {config.optimisation.device!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"optimisation.device is {config.optimisation.device!r}, but there is no CUDA GPU")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def _stopping(run: TrainingRun) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the run after the current step, with its state saved; the second ends
    it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if run.stop.is_set():
            raise KeyboardInterrupt
        print("dspark: stopping after this step", file=sys.stderr)
        run.stop.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
