"""Tests whether token counts follow a distribution, with enough draws to detect a bias of one per cent."""

from __future__ import annotations

import torch
from scipy.stats import chi2, ncx2
from torch import Tensor

ALPHA = 1e-4
"""Probability that the true distribution is rejected; seeds are fixed, so a test passes always or never."""
BIAS = 0.01
"""Total variation distance that must be detected."""
POWER = 0.999


def follows(counts: Tensor, law: Tensor) -> bool:
    """Pearson's chi-square test of counts [cells] against probabilities [cells].

    Asserts its own power: a distribution at total variation d from `law` has a non-centrality of at least
    4 * draws * d^2 (Cauchy-Schwarz), so the number of draws decides what can be detected.
    """
    counts, law = counts.double(), law.double()
    possible = law > 0
    draws, freedom = float(counts.sum()), int(possible.sum()) - 1
    limit = float(chi2.isf(ALPHA, freedom))
    assert ncx2.sf(limit, freedom, 4 * draws * BIAS**2) > POWER, f"{draws:.0f} draws are too few"
    if counts[~possible].any():
        return False
    expected = draws * law[possible] / law.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum()) < limit


def counts_of(tokens: Tensor, cells: int) -> Tensor:
    return torch.bincount(tokens, minlength=cells)


def pair_counts(first: Tensor, second: Tensor, vocab: int) -> Tensor:
    """Counts of (first, second) [vocab * vocab]."""
    return counts_of(first * vocab + second, vocab * vocab)
