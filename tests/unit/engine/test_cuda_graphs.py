"""How graphs are captured, observed through a fake `torch.cuda`; nothing here runs on a GPU."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from dspark_core.engine.gpu.recorded import CudaGraphs


class Stream:
    def wait_stream(self, other) -> None: ...


class Graph:
    def replay(self) -> None: ...


class FakeCuda:
    """The parts of `torch.cuda` that captures use; a failed capture leaves its stream current."""

    def __init__(self) -> None:
        self.default = self.current = Stream()
        self.pools = 0
        self.captured: list[tuple[int, Stream]] = []
        self.captures = self.failing = 0
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()

    def new_graph(self) -> Graph:
        graph = Graph()
        self.graphs.add(graph)
        return graph

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream=None, capture_error_mode):
        self.captures += 1
        before, self.current = self.current, stream or Stream()
        yield
        if self.captures <= self.failing:
            raise torch.AcceleratorError("CUDA error: out of memory")
        self.captured.append((pool, self.current))
        self.current = before


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.graph_pool_handle)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.new_graph)
    return fake


def test_after_a_failed_capture_the_next_has_memory_and_a_stream_of_its_own(cuda: FakeCuda) -> None:
    graphs = CudaGraphs(torch.device("cuda"))
    graphs.record(lambda: ())
    cuda.failing = cuda.captures + 1
    with pytest.raises(torch.AcceleratorError):
        graphs.record(lambda: ())
    assert cuda.current is cuda.default
    graphs.record(lambda: ())
    assert [pool for pool, _ in cuda.captured] == [1, 2]


def test_all_is_warmed_up_and_captured_on_one_stream(cuda: FakeCuda) -> None:
    """Libraries keep memory for every stream on which they were used."""
    graphs = CudaGraphs(torch.device("cuda"))
    used: list[Stream] = []

    def compute():
        used.append(cuda.current)
        return ()

    for _ in range(3):
        graphs.record(compute)
    assert len(used) == 3 * (CudaGraphs.WARM_UPS + 1)
    assert len(set(used)) == 1
    assert used[0] is not cuda.default


def test_a_graph_that_failed_lives_as_long_as_the_others(cuda: FakeCuda) -> None:
    """Freeing it would also free the workspaces of their stream."""
    graphs = CudaGraphs(torch.device("cuda"))
    kept = graphs.record(lambda: ())
    cuda.failing = cuda.captures + 1
    with pytest.raises(torch.AcceleratorError):
        graphs.record(lambda: ())
    gc.collect()
    assert len(cuda.graphs) == 2
    del kept, graphs
    gc.collect()
    assert not cuda.graphs
