"""Averages several checkpoints of one drafter; the mean is often better than any of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.drafter_checkpoint import WEIGHTS_FILE
from dspark_core.models.drafter_config import CONFIG_FILE, read_any_config
from dspark_core.models.tensor_files import open_tensors, save_tensors


def average_checkpoints(output: Path, inputs: Sequence[Path]) -> None:
    """Write `output` atomically, in the inputs' dtype.

    Raises ConfigError or CheckpointError naming the directory that does not match the first.
    """
    if len(inputs) < 2:
        raise ConfigError(f"averaging needs at least two checkpoints, got {len(inputs)}")
    if output.exists():
        raise ConfigError(f"{output} exists already")
    first, config = _read(inputs[0]), read_any_config(inputs[0])
    sums = {name: value.double() for name, value in first.items()}
    for directory in inputs[1:]:
        if read_any_config(directory) != config:
            raise ConfigError(f"{directory} has another configuration than {inputs[0]}")
        tensors = _read(directory)
        for name, value in first.items():
            found = tensors.get(name)
            if found is None or found.shape != value.shape:
                raise CheckpointError(f"{directory}: {name} is not as in {inputs[0]}")
            if not value.is_floating_point() and not torch.equal(found, value):
                raise CheckpointError(f"{directory}: {name} differs from that of {inputs[0]}")
            sums[name] += found
    mean = {name: (sums[name] / len(inputs)).to(value.dtype) for name, value in first.items()}
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_tensors(mean, partial / WEIGHTS_FILE)
        shutil.copyfile(inputs[0] / CONFIG_FILE, partial / CONFIG_FILE)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    try:
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
