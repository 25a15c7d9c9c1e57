"""Features are projected lazily and together, but read as if projected immediately."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_core.engine.caches.kv_cache import PagedFeatures
from dspark_core.engine.target.context_features import MAX_WAITING_ROWS, ContextFeatures, ContextProjection

SIZE, SLOTS = 3, 256


class Doubling(nn.Module):
    """Doubles the first SIZE taps and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, taps: Tensor) -> Tensor:
        self.calls.append(len(taps))
        return 2 * taps[:, :SIZE]


def features() -> tuple[ContextFeatures, Doubling]:
    project = Doubling()
    projection = ContextProjection(project=project, target_layer_ids=(0, 1), feature_size=SIZE)
    paged = PagedFeatures(num_pages=SLOTS // 16, page_tokens=16, size=SIZE, dtype=torch.float32)
    return ContextFeatures(projection, paged), project


def taps(rows: int, seed: int) -> Tensor:
    return torch.randn((rows, 2 * SIZE), generator=torch.Generator().manual_seed(seed))


def test_passes_are_projected_together_when_somebody_reads() -> None:
    held, project = features()
    written = [taps(2, seed) for seed in range(3)]
    for index, rows in enumerate(written):
        held.write(torch.arange(2 * index, 2 * index + 2), rows)
    assert project.calls == []
    torch.testing.assert_close(held.read(torch.arange(6)), 2 * torch.cat(written)[:, :SIZE])
    assert project.calls == [6]
    held.read(torch.arange(6))
    assert project.calls == [6]


def test_a_slot_holds_what_was_written_last() -> None:
    """The position of a rejected draft token is reused by the next round's token."""
    held, _ = features()
    first, second = taps(4, 0), taps(2, 1)
    held.write(torch.tensor([5, 6, 7, 8]), first)
    held.write(torch.tensor([6, 7]), second)
    expected = torch.stack((first[0], second[0], second[1], first[3]))[:, :SIZE]
    torch.testing.assert_close(held.read(torch.tensor([5, 6, 7, 8])), 2 * expected)
    held.write(torch.tensor([7]), first[:1])
    torch.testing.assert_close(held.read(torch.tensor([7])), 2 * first[:1, :SIZE])


def test_what_waits_is_bounded_while_nobody_reads() -> None:
    held, project = features()
    for seed in range(5 * MAX_WAITING_ROWS):
        held.write(torch.tensor([seed % SLOTS]), taps(1, seed))
    assert len(project.calls) == 5 * MAX_WAITING_ROWS // (MAX_WAITING_ROWS + 1)
    assert set(project.calls) == {MAX_WAITING_ROWS + 1}
