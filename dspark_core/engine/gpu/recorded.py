"""Records a computation once per shape and replays it on new inputs.

On CUDA a replay launches hundreds of kernels at once (`CudaGraphs`). A recorded computation reads its inputs
from a fixed buffer; nothing on the host may depend on their values: no reading back, no data-dependent shape,
no branch.
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
"""A capture begins by synchronising the device, which CUDA forbids while another thread captures."""

PREPARE_SECONDS = 120.0
"""Longest time for compiling and recording at start; remaining shapes are recorded at their first use."""

Outputs = tuple[Tensor, ...]
Shape = TypeVar("Shape", bound=Hashable)
Compute = Callable[[Tensor, Shape], Outputs]
"""(values [input_values] int64, shape) -> outputs; reads only the leading values that the shape needs."""


@dataclass(frozen=True, slots=True)
class Recording:
    replay: Callable[[], None]
    outputs: Outputs
    """Overwritten by each replay."""


class Recorder(Protocol):
    def record(self, compute: Callable[[], Outputs]) -> Recording:
        """Raises RuntimeError if that fails, for example for lack of memory."""
        ...


class CudaGraphs:
    """Graphs that share a memory pool; at most one of them may run at a time."""

    WARM_UPS = 2
    """Runs before a capture, which compile kernels and initialise libraries."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Always the same stream: cuBLAS keeps a workspace of tens of MiB for every stream it was used on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._failed: list[torch.cuda.CUDAGraph] = []
        """Kept alive: together with a graph PyTorch frees its stream's workspaces, which other graphs use."""

    def record(self, compute: Callable[[], Outputs]) -> Recording:
        # A failed capture leaves its stream current: the context restores the caller's.
        with _RECORDING, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            try:
                return self._record(compute)
            except RuntimeError:
                # A failed capture leaves its pool unusable for further captures.
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
            # Another thread may allocate meanwhile; that must not become part of the graph.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                outputs = compute()
        except RuntimeError:
            self._failed.append(graph)
            raise
        return Recording(graph.replay, outputs)


class RecordedPasses(Generic[Shape]):
    """Recordings of one computation for every shape in use, over one shared input buffer.

    The computation is passed with every call and must always be the same. Keeping the owner's bound method
    here would create a reference cycle that holds the owner's memory until a garbage collection.
    """

    def __init__(self, recorder: Recorder, *, name: str, input_values: int, device: torch.device) -> None:
        """`input_values`: the most that any shape reads. `name` of the passes for log messages."""
        self._name = name
        self._recorder = recorder
        self._device = device
        self._values = torch.zeros(input_values, dtype=torch.int64, device=device)
        self._recordings: dict[Shape, Recording] = {}
        self._unrecorded: set[Shape] = set()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes recorded so far."""
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
        """Records missing `shapes` in this order, ahead of their first use.

        Inputs are all zeros meanwhile, so a pass over zeros must not touch any request's state. Shapes that
        exceed the time limit are recorded at first use; those that cannot be recorded are computed launch by
        launch.
        """
        missing = [one for one in shapes if one not in self._recordings and one not in self._unrecorded]
        if not missing:
            return
        self._values.zero_()  # the last pass's values mean something else for another shape
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
        """values [at most input_values] int64 on the CPU. Outputs are valid until the next run."""
        self._values[: len(values)].copy_(to_device(values, self._device))
        recording = self._recordings.get(shape) or self._record(shape, compute)
        if recording is None:
            return compute(self._values, shape)
        recording.replay()
        return recording.outputs

    def _record(self, shape: Shape, compute: Compute[Shape]) -> Recording | None:
        """Returns None if recording fails; the shape is then computed launch by launch from then on."""
        if shape in self._unrecorded:
            return None
        try:
            recording = self._recorder.record(lambda: compute(self._values, shape))
        except RuntimeError as error:
            # PyTorch, the driver, cuBLAS and Triton all report lack of memory differently. Any other device
            # error will show up in the computation itself.
            level = logging.DEBUG if self._unrecorded else logging.WARNING
            _log.log(
                level, "cannot record %s of %s, computing them launch by launch: %s", self._name, shape, error
            )
            self._unrecorded.add(shape)
            return None
        self._recordings[shape] = recording
        return recording
