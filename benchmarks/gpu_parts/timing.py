"""Times work on a device from launch to result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    actions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int
) -> dict[str, float]:
    """Median seconds by name. Each repeat runs every action once, so that a slow moment slows all alike; the
    first two repeats, which compile and record, are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 2):
        for name, action in actions.items():
            synchronize(device)
            started = time.perf_counter()
            action()
            synchronize(device)
            if repeat > 1:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine_rates(
    device: torch.device, dtype: torch.dtype, *, megabytes: int, size: int
) -> tuple[float, float]:
    """Measured bytes read per second, and operations per second of a large matrix product."""
    memory = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    a = torch.randn(size, size, device=device).to(dtype)
    times = interleaved({"read": memory.sum, "product": lambda: a @ a}, device, repeats=10)
    return memory.numel() * 4 / times["read"], 2 * size**3 / times["product"]
