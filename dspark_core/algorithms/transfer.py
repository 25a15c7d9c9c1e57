"""Copies host values to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; the same tensor if it is there already.

    A copy from pageable memory would wait for all work queued on the device; one from pinned
    memory is just queued.
    """
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
