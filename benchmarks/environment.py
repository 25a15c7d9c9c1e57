"""What a figure was measured on: what an evaluation records, and what matters for speed besides."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime

from dspark_core.evaluation.environment import describe_environment

_SPEED_FLAGS = ("amx_bf16", "avx512_bf16", "avx2")


def describe_machine() -> dict[str, object]:
    return {
        **describe_environment(datetime.now(UTC)),
        "commit": _commit(),
        "processor": _processor(),
        "load_average_1m": os.getloadavg()[0],
    }


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
