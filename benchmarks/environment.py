"""Describes the machine of a measurement: what an evaluation records, plus what affects speed."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from dspark_core.evaluation.environment import describe_environment

_SPEED_FLAGS = ("amx_bf16", "avx512_bf16", "avx2")


def describe_machine() -> dict[str, object]:
    return {
        **describe_environment(datetime.now(UTC)),
        "commit": _commit(),
        "processor": _processor(),
        "load_average_1m": os.getloadavg()[0],
    }


def describe_arguments(
    arguments: argparse.Namespace, *, without: Collection[str] = ("out",)
) -> dict[str, str]:
    """The arguments of a benchmark. Files are reduced to their names, since their location is irrelevant."""
    return {name: _plain(value) for name, value in vars(arguments).items() if name not in without}


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, Path):
        return value.name
    head, _, file = str(value).rpartition("/")
    return head[: head.find("=") + 1] + file if "=" in head else file


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return platform.processor()
    values = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{next(values, 'unknown')} ({', '.join(flag for flag in _SPEED_FLAGS if flag in flags)})"


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
