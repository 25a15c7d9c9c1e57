import torch

from dspark_core.kernels.reused_rows import ReusedRows


def test_memory_is_handed_out_again_when_results_are_gone():
    rows = ReusedRows()
    first = rows.take(3, 100)
    address = first.data_ptr()
    del first
    assert rows.take(2, 100).data_ptr() == address


def test_results_in_use_are_left_alone():
    rows = ReusedRows(buffers=2)
    held = [rows.take(2, 50).fill_(float(index)) for index in range(5)]
    for index, tensor in enumerate(held):
        assert torch.equal(tensor, torch.full((2, 50), float(index)))


def test_a_slice_keeps_its_memory():
    rows = ReusedRows()
    part = rows.take(4, 10).fill_(1.0)[2:]
    rows.take(4, 10).fill_(2.0)
    assert torch.equal(part, torch.ones(2, 10))


def test_results_beyond_the_limit_are_whole():
    large = ReusedRows(max_bytes=1024, buffers=2).take(20, 100).fill_(3.0)
    assert torch.equal(large, torch.full((20, 100), 3.0))


def test_no_rows_are_an_empty_result():
    assert ReusedRows().take(0, 49152).shape == (0, 49152)
