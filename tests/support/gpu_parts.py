"""A GPU engine's parts on a CPU: plain PyTorch instead of kernels, recomputation instead of graph replay."""

from __future__ import annotations

import torch

from dspark_core.engine.gpu.buckets import BucketGrid
from dspark_core.engine.gpu.recorded import Recording
from dspark_core.engine.gpu.settings import GpuSettings
from tests.support.pretend_cuda import OnGpu, read
from tests.support.reference_attention import attend_runs


class PlainKernels:
    """Also accepts `OnGpu` tensors and reads their values, which a kernel may do but the host may not."""

    def __init__(self, tile: int = 2) -> None:
        self._tile = tile
        self.windows: set[int | None] = set()

    def tile_queries(self, longest_run: int, **_: int) -> int:
        return self._tile

    def attend(self, q, keys, values, where, window):
        self.windows.add(window)
        check_tiles(where)
        plain = type(where)(
            read(where.runs), None, read(where.pages), where.tile_queries, where.page_tokens, where.two_way
        )
        out = attend_runs(read(q), read(keys), read(values), plain, window)
        return out.as_subclass(OnGpu) if q.is_cuda else out

    def store(self, k, v, keys, values, slots):
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)


def check_tiles(where) -> None:
    """Assert that every query of every run is in exactly one tile, as the real kernel requires."""
    runs = read(where.runs).tolist()
    asked = []
    for run, first in read(where.tiles).tolist():
        asked.extend((run, first + n) for n in range(where.tile_queries) if first + n < runs[run][1])
    assert sorted(asked) == [(run, n) for run, row in enumerate(runs) for n in range(row[1])]


class CallAgain:
    """A recorder whose replays recompute into the recorded outputs."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def record(self, compute):
        self.records += 1
        outputs = compute()
        for output in outputs:
            output.fill_(-1)  # results of the recording itself must not be used

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(outputs, compute(), strict=True):
                kept.copy_(new)

        return Recording(replay, outputs)


class KeepsNothing:
    """A recorder that, like a CUDA graph, does not keep the Python function alive."""

    def record(self, compute):
        return Recording(lambda: None, compute())


def plain_gpu(
    recorder: CallAgain | KeepsNothing | None = None,
    *,
    requests: tuple[int, ...] = (1, 2, 4, 8),
    tokens_per_request: tuple[int, ...] = (1, 3, 5),
    max_tokens: int = 40,
    kernels: object = None,
) -> GpuSettings:
    grid = BucketGrid(requests=requests, tokens_per_request=tokens_per_request, max_tokens=max_tokens)
    return GpuSettings(kernels=kernels or PlainKernels(), grid=grid, recorder=recorder)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
