"""`dspark train --dry-run`: estimates what a run needs from a few steps whose results are discarded."""

from __future__ import annotations

import resource
import sys
import time
from itertools import islice

import torch
from rich.table import Table

from dspark_core.training.data.feature_cache import gigabytes
from services.cli.drafters.train_setup import Setup, disk_bytes, free_bytes

TIMED_STEPS = 3


def dry_run_table(setup: Setup) -> Table:
    """Runs one step to warm up and three that are timed."""
    trainer, config = setup.trainer, setup.config
    steps = trainer.run()
    next(steps)
    started = time.perf_counter()
    reports = list(islice(steps, TIMED_STEPS))
    per_step = (time.perf_counter() - started) / max(len(reports), 1)
    total = trainer.config.steps
    positions = sum(report.positions for report in reports) / max(len(reports), 1)
    tokens = int(setup.source.token_counts(setup.target.config.vocab_size).sum())
    epochs = total * trainer.config.sequences_per_step / len(setup.source)
    table = Table(title="dry run: nothing was written", show_header=False)
    for name, value in (
        ("algorithm", config.drafter.algorithm),
        ("trained parameters", f"{trainer.parameters:,}"),
        ("data", f"{len(setup.source):,} sequences, {tokens:,} tokens"),
        ("steps", f"{total:,} of {trainer.config.sequences_per_step} sequences: {epochs:.2f} epochs"),
        ("positions per step", f"{positions:,.0f}"),
        ("memory", _memory()),
        ("checkpoint", f"{trainer.state_bytes / 1e6:,.0f} MB each, {config.output.keep} kept"),
        (
            "disk",
            f"{gigabytes(disk_bytes(setup))} needed, {gigabytes(free_bytes(config.output.directory))} free",
        ),
        ("speed", f"{per_step:.2f} s per step, {positions / per_step:,.0f} positions/s"),
        ("estimated time", f"{_duration(total * per_step)}, without validation"),
    ):
        table.add_row(name, value)
    return table


def _memory() -> str:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory at peak"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB at peak"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
