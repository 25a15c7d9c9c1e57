"""The processes that train together: a single one by default, or those torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Workers:
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The worker that writes files and reports to the user."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over all workers. Collective: every worker must call it."""
        if self.size == 1:
            return values
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


ALONE = Workers()


@contextmanager
def started_by_torchrun(device: torch.device) -> Iterator[Workers]:
    """Join the process group; a single worker when torchrun did not start this process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Workers(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The named device; plain `cuda` becomes this worker's own GPU."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
