"""Tensors of another process, read where it wrote them."""

import time

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from dspark_core.vllm_engine.sharing import SharedReader, SharedRows, SharedWriter


def _publish(
    values: list[list[float]], queue: "torch.multiprocessing.Queue[SharedRows]", done: object
) -> None:
    writer = SharedWriter()
    for row in values:
        queue.put(writer.publish("rows", torch.tensor(row)))
    done.wait(60)  # type: ignore[attr-defined]


def test_rows_come_from_another_process() -> None:
    """Larger ones in a new buffer, smaller ones in the one that is there."""
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Event()
    values = [[1.0, 2.0], [float(n) for n in range(1000)]]
    process = context.Process(target=_publish, args=(values, queue, done))
    process.start()
    reader = SharedReader()
    try:
        read: list[Tensor] = [reader.read(queue.get(timeout=60)) for _ in values]
        assert [rows.tolist() for rows in read] == values
    finally:
        done.set()
    # `join` would wait for PyTorch's manager of shared memory as well, which outlives the process.
    while process.exitcode is None:
        time.sleep(0.01)
    assert process.exitcode == 0


def test_a_handle_travels_once() -> None:
    writer, reader = SharedWriter(), SharedReader()
    first = writer.publish("rows", torch.ones(4, 3))
    second = writer.publish("rows", 2 * torch.ones(2, 3))
    assert first.handle is not None
    assert second.handle is None
    assert reader.read(first).shape == (4, 3)
    assert reader.read(second).tolist() == [[2.0] * 3] * 2


def test_rows_of_an_unknown_buffer_are_refused() -> None:
    with pytest.raises(ValueError, match="buffer 'rows' in version 3 was never announced"):
        SharedReader().read(SharedRows("rows", 3, (1,), None))
