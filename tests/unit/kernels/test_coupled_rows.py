"""The native exponential race against the reference, which evaluates all noise that may win."""

from __future__ import annotations

import pytest
import torch

from dspark_core.algorithms import coupling
from dspark_core.algorithms.sampling import SamplingRows, target_weights
from dspark_core.kernels.coupling import sample_coupled
from dspark_core.kernels.library import Kernels
from dspark_core.records import MAX_SEED, SamplingParams


# Vocabularies below, at and beyond a vector; laws from flat to all but certain.
@pytest.mark.parametrize("vocab", [1, 7, 8, 50, 4001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 30.0])
def test_the_same_tokens_win(kernels: Kernels, vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = 300
    logits = torch.randn(rows, vocab, generator=generator) * spread
    logits[::3, ::2] = -torch.inf
    logits[::3, -1] = logits.amax(dim=-1)[::3].clamp_min(0.0) - 70.0  # all but impossible
    params = [SamplingParams()] * rows
    weights = target_weights(logits, SamplingRows.from_params(params))
    seeds = torch.randint(0, MAX_SEED, (rows,), generator=generator)
    positions = torch.arange(rows)
    seeds[:2] = torch.tensor([0, MAX_SEED])
    found = sample_coupled(kernels, logits, params, seeds, positions)
    noise = coupling.exponential_noise(seeds, positions, torch.arange(vocab))
    assert torch.equal(found, (noise / weights).argmin(dim=-1))
    assert torch.equal(found, coupling.sample_coupled(weights, seeds, positions))


def test_unlikely_tokens_win_as_often_as_they_should(kernels: Kernels) -> None:
    logits = torch.tensor([1.0, *([2e-4] * 999)]).log().repeat(20_000, 1)
    params = [SamplingParams()] * 20_000
    found = sample_coupled(kernels, logits, params, torch.full((20_000,), 5), torch.arange(20_000))
    expected = 999 * 2e-4 / (1 + 999 * 2e-4)
    assert (found > 0).float().mean().item() == pytest.approx(expected, abs=0.012)  # four deviations


def test_no_rows_give_no_tokens_and_missing_seeds_are_refused(kernels: Kernels) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert sample_coupled(kernels, torch.zeros(0, 5), [], nothing, nothing).tolist() == []
    with pytest.raises(ValueError, match="0 seeds"):
        sample_coupled(kernels, torch.ones(1, 5), [SamplingParams()], nothing, nothing)
    with pytest.raises(ValueError, match="bfloat16"):
        sample_coupled(kernels, torch.ones(0, 5).bfloat16(), [], nothing, nothing)
