"""Dropout from generators of its own, so that a resumed run, or one on more workers, drops the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def drop_spans(
    x: Tensor, spans: Sequence[slice], rate: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """x [rows, ...]; the rows of each span are dropped by the generator of its sequence."""
    if rate == 0:
        return x
    keep = torch.empty(x.shape, dtype=x.dtype)
    for span, generator in zip(spans, generators, strict=True):
        keep[span].bernoulli_(1 - rate, generator=generator)
    return x * keep.to(x.device) / (1 - rate)
