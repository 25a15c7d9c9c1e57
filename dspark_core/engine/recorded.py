"""Computations that are recorded once per shape and then replayed on new inputs.

On CUDA a replay is one launch for hundreds of kernels (`CudaGraphs`). What is recorded reads its inputs
from memory that stays, and must depend on their values in no other way: no reading back, no shape that
comes of one, no branch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device

_log = logging.getLogger(__name__)

_RECORDING = threading.Lock()
"""A capture waits for the device when it begins, which CUDA forbids while another thread captures."""

PREPARE_SECONDS = 120.0
"""Of a start, at most for compiling and recording ahead. What is left is recorded when it first comes."""

Outputs = tuple[Tensor, ...]
Shape = TypeVar("Shape", bound=Hashable)
Compute = Callable[[Tensor, Shape], Outputs]
"""Of values [input_values] int64, as far as the shape goes."""


@dataclass(frozen=True, slots=True)
class Recording:
    replay: Callable[[], None]
    outputs: Outputs
    """Written over by each replay."""


class Recorder(Protocol):
    def record(self, compute: Callable[[], Outputs]) -> Recording:
        """Raises RuntimeError where that cannot be done, for want of memory for one."""
        ...


class CudaGraphs:
    """Graphs that share their memory: at most one of them runs at a time."""

    WARM_UPS = 2
    """Kernels are compiled, and libraries set up, before anything is captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Always the same: cuBLAS keeps a workspace, tens of MiB, for every stream it was ever used on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._failed: list[torch.cuda.CUDAGraph] = []
        """Kept: with a graph PyTorch also frees the workspaces of its stream, which the others still use."""

    def record(self, compute: Callable[[], Outputs]) -> Recording:
        # A capture that fails leaves its stream the current one: the caller's is to be so again.
        with _RECORDING, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            try:
                return self._record(compute)
            except RuntimeError:
                # Memory that the allocator keeps for a capture under way is none for the next.
                self._pool = torch.cuda.graph_pool_handle()
                raise

    def _record(self, compute: Callable[[], Outputs]) -> Recording:
        side = self._stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may allocate meanwhile: that is no part of the graph.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                outputs = compute()
        except RuntimeError:
            self._failed.append(graph)
            raise
        return Recording(graph.replay, outputs)


class RecordedPasses(Generic[Shape]):
    """A computation for each shape it was asked for, over one array of inputs.

    What computes comes with each call, always the same: a method of the owner's, kept here, would keep all of
    the owner's memory until a garbage collection.
    """

    def __init__(self, recorder: Recorder, *, name: str, input_values: int, device: torch.device) -> None:
        """`input_values`: the most that any shape takes. `name`: of the passes, for people."""
        self._name = name
        self._recorder = recorder
        self._device = device
        self._values = torch.zeros(input_values, dtype=torch.int64, device=device)
        self._recordings: dict[Shape, Recording] = {}
        self._unrecorded: set[Shape] = set()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Recorded so far."""
        return tuple(self._recordings)

    @torch.inference_mode()
    def prepare(
        self,
        shapes: Sequence[Shape],
        compute: Compute[Shape],
        *,
        seconds: float = PREPARE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Records those of `shapes` that are not yet, in this order, before somebody waits for their passes.

        Inputs are zeros meanwhile, so all zeros must be a pass that computes nothing of anybody's. What no
        longer fits the time, or the memory, is dealt with when it first comes.
        """
        missing = [one for one in shapes if one not in self._recordings and one not in self._unrecorded]
        if not missing:
            return
        self._values.zero_()  # those of the last pass mean something else to another shape
        started, recorded, tried = clock(), 0, 0
        for shape in missing:
            if clock() - started >= seconds:
                break
            tried += 1
            recorded += self._record(shape, compute) is not None
        _log.info(
            "recorded %d of %d sizes of %s in %.1f s%s",
            recorded,
            len(missing),
            self._name,
            clock() - started,
            "" if tried == len(missing) else f"; {len(missing) - tried} follow when they first come",
        )

    def run(self, shape: Shape, values: Tensor, compute: Compute[Shape]) -> Outputs:
        """values [at most input_values] int64, on the CPU. Outputs are good until the next run."""
        self._values[: len(values)].copy_(to_device(values, self._device))
        recording = self._recordings.get(shape) or self._record(shape, compute)
        if recording is None:
            return compute(self._values, shape)
        recording.replay()
        return recording.outputs

    def _record(self, shape: Shape, compute: Compute[Shape]) -> Recording | None:
        """None where that fails: the shape is computed launch by launch from then on."""
        if shape in self._unrecorded:
            return None
        try:
            recording = self._recorder.record(lambda: compute(self._values, shape))
        except RuntimeError as error:
            # Want of memory has many names: PyTorch's own, the driver's, cuBLAS's, Triton's. What else may be
            # wrong with the device, the computation itself will meet.
            level = logging.DEBUG if self._unrecorded else logging.WARNING
            _log.log(
                level, "cannot record %s of %s, computing them launch by launch: %s", self._name, shape, error
            )
            self._unrecorded.add(shape)
            return None
        self._recordings[shape] = recording
        return recording
