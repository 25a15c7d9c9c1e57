"""Passes tensors from a worker process to this one without copying them through a pipe.

A pass of 64 requests produces tens of megabytes of logits. The worker keeps and overwrites one buffer per
kind of result; only shapes and, once, a handle are sent. Handles are PyTorch's: shared memory on a
CPU, CUDA IPC handles on a GPU.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor, multiprocessing

SPARE = 1.5
"""Size of a new buffer relative to its first contents, because every new buffer must be mapped again."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """A tensor in a buffer of the worker; valid until its next pass."""

    name: str
    version: int
    shape: tuple[int, ...]
    handle: bytes | None
    """Handle of the buffer if it is new to the reader."""


class SharedWriter:
    """Runs in the worker."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}

    def publish(self, name: str, rows: Tensor) -> SharedRows:
        """The data is complete once the caller has synchronised with the device."""
        buffer, handle = self._buffers.get(name), None
        if buffer is None or buffer.dtype is not rows.dtype or len(buffer) < rows.numel():
            buffer = rows.new_empty(int(rows.numel() * SPARE) + 1)
            handle = _handle(buffer)
            self._buffers[name] = buffer
            self._versions[name] = self._versions.get(name, 0) + 1
        buffer[: rows.numel()].view(rows.shape).copy_(rows)
        return SharedRows(name, self._versions[name], tuple(rows.shape), handle)


class SharedReader:
    """Runs in the requesting process."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[int, Tensor]] = {}

    def read(self, rows: SharedRows) -> Tensor:
        """Returns a view. Raises ValueError for a buffer whose handle was never received."""
        if rows.handle is not None:
            self._buffers[rows.name] = rows.version, pickle.loads(rows.handle)
        version, buffer = self._buffers.get(rows.name, (None, torch.empty(0)))
        if version != rows.version:
            raise ValueError(f"buffer {rows.name!r} in version {rows.version} was never announced")
        return buffer[: torch.Size(rows.shape).numel()].view(rows.shape)


def _handle(buffer: Tensor) -> bytes:
    """By name for shared memory, since file descriptors would need a separate multiprocessing connection."""
    if buffer.is_cuda:
        return bytes(ForkingPickler.dumps(buffer))
    strategy = multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    try:
        return bytes(ForkingPickler.dumps(buffer.share_memory_()))  # type: ignore[no-untyped-call]
    finally:
        multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
