"""Recording ahead: what is recorded, what is left for later, and that it touches no request's state."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from dspark_core.engine.gpu.buckets import BucketGrid, default_grid
from dspark_core.engine.gpu.recorded import RecordedPasses, Recording


@pytest.fixture(autouse=True)
def _as_engines_compute():
    with torch.inference_mode():
        yield


class Recorder:
    """Counts requests; the first `full` ones fail for lack of memory, and each takes `seconds`."""

    def __init__(
        self, full: int = 0, seconds: float = 1.0, error: type[Exception] = torch.OutOfMemoryError
    ) -> None:
        self.full, self.seconds, self.error = full, seconds, error
        self.now = 0.0
        self.asked = 0

    def record(self, compute):
        self.asked += 1
        self.now += self.seconds
        outputs = compute()
        if self.asked <= self.full:
            raise self.error("no more")
        return Recording(lambda: outputs[0].copy_(compute()[0]), outputs)


def passes(recorder, seen=None):
    def compute(values, shape):
        if seen is not None:
            seen.append((shape, values.tolist()))
        return (values[:shape] * 2,)

    return Owner(RecordedPasses(recorder, name="tries", input_values=4, device=torch.device("cpu")), compute)


class Owner:
    """Owns the passes and the method that computes them."""

    def __init__(self, passes, compute):
        self.passes = passes
        self.prepare = partial(passes.prepare, compute=compute)
        self.run = partial(passes.run, compute=compute)

    @property
    def shapes(self):
        return self.passes.shapes


def test_what_was_recorded_ahead_is_not_recorded_again(caplog):
    recorder = Recorder()
    ours = passes(recorder)
    with caplog.at_level(logging.INFO):
        ours.prepare([3, 2, 1], clock=lambda: recorder.now)
    assert ours.shapes == (3, 2, 1)
    assert "recorded 3 of 3 sizes of tries in 3.0 s" in caplog.text
    caplog.clear()
    ours.prepare([2, 3], clock=lambda: recorder.now)
    assert ours.run(2, torch.tensor([5, 6]))[0].tolist() == [10, 12]
    assert recorder.asked == 3
    assert not caplog.records


def test_recording_ahead_ends_with_its_time(caplog):
    recorder = Recorder(seconds=2.0)
    ours = passes(recorder)
    with caplog.at_level(logging.INFO):
        ours.prepare([4, 3, 2, 1], seconds=3.0, clock=lambda: recorder.now)
    assert ours.shapes == (4, 3)
    assert "recorded 2 of 4 sizes of tries in 4.0 s; 2 follow when they first come" in caplog.text
    assert ours.run(1, torch.tensor([7]))[0].tolist() == [14]
    assert ours.shapes == (4, 3, 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError])
def test_sizes_without_memory_are_left_out_and_the_others_recorded(caplog, error):
    """With the errors of PyTorch's allocator, of the driver, and of cuBLAS and Triton."""
    recorder = Recorder(full=2, error=error)
    ours = passes(recorder)
    with caplog.at_level(logging.INFO):
        ours.prepare([4, 3, 2, 1])
    assert ours.shapes == (2, 1)
    assert caplog.text.count("launch by launch") == 1
    assert "no more" in caplog.text
    assert "recorded 2 of 4 sizes" in caplog.text
    assert ours.run(4, torch.tensor([1, 2, 3, 4]))[0].tolist() == [2, 4, 6, 8]
    assert recorder.asked == 4


def test_recording_ahead_computes_nothing_of_anybodys():
    """An earlier pass's values mean something else for another shape, for example other slots."""
    seen: list[tuple[int, list[int]]] = []
    ours = passes(Recorder(), seen)
    ours.run(4, torch.tensor([9, 9, 9, 9]))
    seen.clear()
    ours.prepare([3, 2])
    assert seen == [(3, [0, 0, 0, 0]), (2, [0, 0, 0, 0])]


GRIDS = {
    "plain": default_grid(16, None),
    "blocks of 4": default_grid(16, 4),
    "blocks of 7": default_grid(16, 7),
    "looked up alone": default_grid(16, None, 15),
    "looked up and blocks of 7": default_grid(32, 7, 15),
    "uneven": BucketGrid(requests=(1, 2, 5, 9), tokens_per_request=(1, 3, 5), max_tokens=30),
}


@pytest.mark.parametrize("block_size", [None, 7, 15])
def test_one_looked_up_block_leaves_everybody_in_a_graph(block_size):
    grid = default_grid(64, block_size, 15)
    for requests in (1, 2, 5, 16, 33, 64):
        assert grid.choose(requests, requests + 15, longest=16)
    assert grid.choose(16, 16 * 16, longest=16)
    assert grid.max_tokens <= max(16 * 16, 64 * (1 + (block_size or 0)))  # each is a row of logits
    assert default_grid(64, 7).choose(2, 17, longest=16) is None


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("most", [1, 3, 8, 20])
def test_ahead_is_recorded_what_batches_of_so_many_are_filled_up_to(grid, most):
    each = grid.tokens_per_request[-1]
    asked = [(count, size) for count in range(1, most + 1) for size in range(count, count * each + 1)]
    ahead = grid.holding(most)
    assert set(ahead) == {grid.choose(count, size) for count, size in asked} - {None}
    assert list(ahead) == sorted(ahead, key=lambda bucket: (-bucket.tokens, -bucket.requests))
