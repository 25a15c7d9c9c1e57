"""Tensors from a worker process to ours without copying them through a pipe.

A pass of 64 requests leaves tens of megabytes of logits. The worker keeps one buffer for each kind of result
and writes over it; what travels is a handle, once, and shapes. Handles are PyTorch's: shared memory on a
processor, CUDA's inter-process handles on a GPU.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor, multiprocessing

SPARE = 1.5
"""How much larger than its first contents a buffer is made: every new one is mapped anew."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """A tensor in a buffer of the worker; good until its next pass."""

    name: str
    version: int
    shape: tuple[int, ...]
    handle: bytes | None
    """Of the buffer, when it is new to the reader."""


class SharedWriter:
    """In the worker."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}

    def publish(self, name: str, rows: Tensor) -> SharedRows:
        """Complete when the caller has waited for the device."""
        buffer, handle = self._buffers.get(name), None
        if buffer is None or buffer.dtype is not rows.dtype or len(buffer) < rows.numel():
            buffer = rows.new_empty(int(rows.numel() * SPARE) + 1)
            handle = _handle(buffer)
            self._buffers[name] = buffer
            self._versions[name] = self._versions.get(name, 0) + 1
        buffer[: rows.numel()].view(rows.shape).copy_(rows)
        return SharedRows(name, self._versions[name], tuple(rows.shape), handle)


class SharedReader:
    """In the process that asked."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[int, Tensor]] = {}

    def read(self, rows: SharedRows) -> Tensor:
        """A view. Raises ValueError for a buffer whose handle never came."""
        if rows.handle is not None:
            self._buffers[rows.name] = rows.version, pickle.loads(rows.handle)
        version, buffer = self._buffers.get(rows.name, (None, torch.empty(0)))
        if version != rows.version:
            raise ValueError(f"buffer {rows.name!r} in version {rows.version} was never announced")
        return buffer[: torch.Size(rows.shape).numel()].view(rows.shape)


def _handle(buffer: Tensor) -> bytes:
    """By a name where it is shared memory: open files would need a connection of multiprocessing's own."""
    if buffer.is_cuda:
        return bytes(ForkingPickler.dumps(buffer))
    strategy = multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    try:
        return bytes(ForkingPickler.dumps(buffer.share_memory_()))  # type: ignore[no-untyped-call]
    finally:
        multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
