"""Resolves the device name a user gives to a device of this machine."""

from __future__ import annotations

import re

import torch
from torch import nn

from dspark_core.errors import ConfigError

AUTO = "auto"
"""CUDA if PyTorch sees a device, else the CPU."""

_NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device_name(name: str, setting: str = "device") -> None:
    """Raises ConfigError, naming the setting, for an invalid name, whatever devices this machine has."""
    if not _NAMES.fullmatch(name):
        raise ConfigError(f"{setting} must be auto, cpu, cuda or cuda:N, got {name!r}")


def resolve_device(name: str) -> torch.device:
    """Raises ConfigError for a device that this machine does not have."""
    check_device_name(name)
    available = torch.cuda.is_available()
    if name == "cpu" or (name == AUTO and not available):
        return torch.device("cpu")
    if not available:
        why = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        raise ConfigError(f"device {name!r}: PyTorch {torch.__version__} {why}; use device cpu")
    device = torch.device("cuda" if name == AUTO else name)
    index = torch.cuda.current_device() if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        last = "" if count == 1 else f" to cuda:{count - 1}"
        raise ConfigError(f"device {name!r} does not exist: there is cuda:0{last}")
    return torch.device("cuda", index)


def device_of(module: nn.Module) -> torch.device:
    """The device of its parameters."""
    return next(module.parameters()).device


def describe_device(device: torch.device) -> str:
    """A name for people and for profile keys."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
