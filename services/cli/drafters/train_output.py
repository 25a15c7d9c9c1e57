"""The output directory of a training run: whose it is, and what the run in it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.training.file_lock import lock
from dspark_core.training.run import BEST, CHECKPOINTS, LOG, NEWEST
from dspark_core.training.workers import Workers
from services.cli.drafters.train_config import TrainConfig

VOCAB, CONFIG, TENSORBOARD = "draft_vocab.pt", "config.json", "tensorboard"
_LOCK = "lock"


@contextmanager
def claimed(config: TrainConfig, workers: Workers, *, resume: bool, fresh: bool) -> Iterator[None]:
    """Keeps other trainings out of the directory. Raises ConfigError if one is at work there, if it holds a
    run and neither flag is given, or if the run to resume has another target or drafter."""
    output = config.output.directory
    if has_run(output) and not (resume or fresh):
        raise ConfigError(f"{output} already has a run: --resume continues it, --fresh deletes it")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.directory {output} cannot be created: {error}") from error
    if not os.access(output, os.W_OK):
        raise ConfigError(f"output.directory {output}: no permission to write")
    with (output / _LOCK).open("wb") as held:
        if workers.is_first:
            lock(held.fileno(), f"a run in {output}")
        if resume and has_run(output):
            _require_same_run(config, output / CONFIG)
        yield


def begin(config: TrainConfig, draft_vocab_ids: Tensor | None, *, fresh: bool) -> None:
    """Deletes the old run if `fresh`, and records this run's configuration and draft vocabulary. To be called
    once nothing can be rejected any more."""
    output = config.output.directory
    if fresh:
        _clear(output)
    partial = (output / CONFIG).with_suffix(".partial")
    partial.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.rename(output / CONFIG)
    if draft_vocab_ids is not None:
        partial = (output / VOCAB).with_suffix(".partial")
        torch.save(draft_vocab_ids, partial)
        partial.rename(output / VOCAB)


def has_run(output: Path) -> bool:
    return any((output / CHECKPOINTS).glob("*.pt"))


def _clear(output: Path) -> None:
    for name in (CHECKPOINTS, NEWEST, BEST, TENSORBOARD):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (LOG, VOCAB, CONFIG):
        (output / name).unlink(missing_ok=True)


def _require_same_run(config: TrainConfig, path: Path) -> None:
    """Raises ConfigError if target or drafter differ: the meaning of the weights must not change mid-run."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        sections = {section: dict(before[section]) for section in ("target", "drafter")}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not the configuration of a run ({error!r}): restore it, or delete it to go on "
            "without comparing target and drafter"
        ) from error
    now = config.model_dump(mode="json")
    for section, values in sections.items():
        for name, value in now[section].items():
            if values.get(name) != value:
                raise ConfigError(
                    f"{section}.{name} is {value!r}, the run in {path.parent} has {values.get(name)!r}: "
                    "--fresh starts over, or choose another output.directory"
                )
