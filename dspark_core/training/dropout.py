"""Dropout drawn per sequence, so that a resumed run, on any number of workers, drops the same values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def drop_spans(
    x: Tensor, spans: Sequence[slice], rate: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """x [rows, ...]; `generators[i]` draws the dropout mask of `spans[i]`."""
    if rate == 0:
        return x
    masks = [
        _kept(x[span].numel(), rate, generator).view(x[span].shape)
        for span, generator in zip(spans, generators, strict=True)
    ]
    return x * torch.cat(masks).to(x.device, x.dtype).mul_(1 / (1 - rate))


def _kept(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """[count] bool. Each 64-bit draw decides four values, because drawing dominates dropout on a CPU."""
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    threshold = round(rate * 2**16) - 2**15
    return draws.view(torch.int16)[:count] >= threshold
