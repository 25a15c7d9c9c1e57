"""Host values to the device that computes with them, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` themselves where they are there already.

    A copy from pageable memory would wait for everything the device has been given to do; one from pinned
    memory is one more thing in its queue.
    """
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
