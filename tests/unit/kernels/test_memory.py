"""Memory on huge pages: private, aligned, and really on such pages where the system gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_core.kernels.memory import Arena, gives_huge_pages, huge_zeros

HUGE_PAGE = 2 * 2**20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, HUGE_PAGE + 1])
def test_zeros_of_the_length_asked_for(num_bytes: int) -> None:
    zeros = huge_zeros(num_bytes)
    assert zeros.dtype == torch.uint8
    assert zeros.shape == (num_bytes,)
    assert not zeros.any()
    assert zeros.data_ptr() % HUGE_PAGE == 0 or num_bytes == 0


def large_blocks() -> int:
    """Free blocks of 4 MB in the zones that processes mostly live in."""
    zones = [line for line in Path("/proc/buddyinfo").read_text().splitlines() if " Normal " in line]
    return sum(int(line.split()[-1]) for line in zones)


def test_written_memory_lies_on_huge_pages() -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this system has no transparent huge pages")
    if "THP_enabled:\t0" in Path("/proc/self/status").read_text():
        pytest.skip("this process may have none")
    if large_blocks() < 64:
        pytest.skip("memory is too scattered to give any")
    assert gives_huge_pages()


def test_pieces_of_an_arena_are_aligned_and_apart() -> None:
    arena = Arena()
    pieces = [arena.take(100), arena.take(1), arena.take(64 * 2**20)]
    for number, piece in enumerate(pieces, 1):
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in pieces] == [[1], [2], [3]]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
