"""Shapes target distributions (temperature, top-k, top-p, min-p) and draws tokens from them.

Every truncation is a threshold on the scaled logits: a token stays when its logit reaches the row's
threshold. Equal logits therefore stay or go together, and a row's result depends neither on the
order in which a sort happens to leave ties nor on the other rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.records import SamplingParams

_NUCLEUS_WIDTHS = (64, 512, 8192)
"""Candidates searched for a nucleus before a row is sorted in full: a partial sort of 49k logits
costs a small fraction of a whole one, and peaked rows need few candidates."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of each row of a batch of logits.

    The flags repeat on the host what the tensors hold, so that asking costs no device transfer.
    """

    temperature: Tensor  # [rows] float32
    top_k: Tensor  # [rows] int64, 0: off
    top_p: Tensor  # [rows] float64, 1: off
    min_p: Tensor  # [rows] float32, 0: off
    largest_top_k: int
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        repeats: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplingRows:
        """One row for each of `params`, or `repeats[i]` consecutive rows for `params[i]`."""
        if repeats is not None:
            params = [p for p, count in zip(params, repeats, strict=True) for _ in range(count)]
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            largest_top_k=max((p.top_k for p in params), default=0),
            any_top_p=any(p.top_p < 1.0 for p in params),
            any_min_p=any(p.min_p > 0.0 for p in params),
        )


def greedy_tokens(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> most likely token ids [rows] int64, the lowest id among equals."""
    return logits.argmax(dim=-1)


def target_probabilities(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits [rows, vocab] -> the distribution to draw from [rows, vocab] float32.

    Temperature, then top-k, then top-p, then min-p, each over what the previous left; tokens equal
    to the last one kept are kept too, and the most likely token always is. Rows of temperature 0
    come out as a uniform choice among the most likely tokens; use `greedy_tokens` for them.
    """
    scaled = logits.float()
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)  # the maximum is 0 whatever the temperature
    scaled = scaled / rows.temperature.clamp(min=_TINY).unsqueeze(-1)
    threshold = _thresholds(scaled, rows)
    if threshold is not None:
        scaled = scaled.masked_fill(scaled < threshold.unsqueeze(-1), -math.inf)
    return scaled.softmax(dim=-1)


def draw_tokens(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one index of each row in proportion to its weights, by inverting the cumulative sum.

    weights [rows, n] non-negative, need not sum to 1; uniforms [rows] in [0, 1) -> [rows] int64.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    wanted = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=weights.shape[-1] - 1)
    # Rounding (at the upper end, or in a parallel sum) may point at a weight of zero: never draw it.
    impossible = weights.gather(-1, drawn) <= 0
    return torch.where(impossible, weights.argmax(dim=-1, keepdim=True), drawn).squeeze(-1)


def _thresholds(scaled: Tensor, rows: SamplingRows) -> Tensor | None:
    """Least scaled logit each row keeps [rows], or None when no row truncates."""
    threshold: Tensor | None = None
    if rows.largest_top_k:
        threshold = _top_k_thresholds(scaled, rows.top_k, rows.largest_top_k)
    if rows.any_top_p:
        if threshold is None:
            threshold = torch.full_like(rows.temperature, -math.inf)
        threshold = _top_p_thresholds(scaled, rows.top_p, threshold)
    if rows.any_min_p:
        floor = rows.min_p.log()  # the most likely token's scaled logit is 0
        threshold = floor if threshold is None else torch.maximum(threshold, floor)
    return threshold


def _top_k_thresholds(scaled: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """The k-th largest scaled logit of each row, -inf where top-k is off."""
    width = min(largest, scaled.shape[-1])
    values = scaled.topk(width, dim=-1).values
    kth = values.gather(-1, top_k.clamp(min=1, max=width).unsqueeze(-1) - 1).squeeze(-1)
    return kth.masked_fill(top_k == 0, -math.inf)


def _top_p_thresholds(scaled: Tensor, top_p: Tensor, kept: Tensor) -> Tensor:
    """Raises `kept` [rows] to the least logit of each row's nucleus, where top-p is on."""
    threshold = kept.clone()
    pending = (top_p < 1.0).nonzero().squeeze(-1)
    vocab = scaled.shape[-1]
    for width in (*(w for w in _NUCLEUS_WIDTHS if w < vocab), vocab):
        if not len(pending):
            break
        found, fits = _nucleus(scaled[pending], top_p[pending], kept[pending], width)
        threshold[pending] = torch.where(fits, found, threshold[pending])
        pending = pending[~fits]
    return threshold


def _nucleus(scaled: Tensor, top_p: Tensor, kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Least logit of the smallest set of most likely kept tokens that holds top-p of the kept mass.

    Looks at the `width` most likely tokens -> (threshold [rows], whether the set lies in them [rows]).
    """
    weights = scaled.exp().masked_fill_(scaled < kept.unsqueeze(-1), 0.0)
    wanted = top_p * weights.sum(dim=-1, dtype=torch.float64)
    values = scaled.topk(width, dim=-1).values
    masses = values.exp().masked_fill_(values < kept.unsqueeze(-1), 0.0).cumsum(dim=-1, dtype=torch.float64)
    size = (masses < wanted.unsqueeze(-1)).sum(dim=-1)  # tokens before the one that completes it
    fits = size < width
    found = values.gather(-1, size.clamp(max=width - 1).unsqueeze(-1)).squeeze(-1)
    if width == scaled.shape[-1]:
        return torch.where(fits, found, kept), torch.ones_like(fits)
    return found, fits
