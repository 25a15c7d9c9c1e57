"""Profiles on disk: JSON documents of round-time models, keyed by the kind of replica."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.building import EngineOptions
from dspark_core.engine.devices import describe_device
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.records import ReplicaKind


def replica_kind(options: EngineOptions, engine: TargetEngine) -> ReplicaKind:
    """The kind of an engine with these options in this process.

    Includes what computes and the weights: native kernels take a fraction of the time of PyTorch's operators,
    and weights matter as much.
    """
    return ReplicaKind(
        model=options.target_model,
        engine=f"{engine.computed_by}, {options.weights} weights",
        hardware=hardware_name(engine.device),
        dtype=options.dtype,
    )


def hardware_name(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads used."""
    if device.type == "cuda":
        return describe_device(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def write_profile(path: Path, model: RoundTimeModel) -> None:
    """Replaces the file atomically. Raises ConfigError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(model.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write the profile {path}: {error}") from error


def read_profile(path: Path) -> RoundTimeModel:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ConfigError(f"a profile must be a JSON object, got {type(document).__name__}")
        return RoundTimeModel.from_dict(document)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the profile {path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path} is no profile: {error}") from error


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(values, platform.machine())
