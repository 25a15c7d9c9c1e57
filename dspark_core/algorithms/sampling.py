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
    any_top_k: bool
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
            any_top_k=any(p.top_k > 0 for p in params),
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
    logits = logits.float()
    scaled = logits - logits.amax(dim=-1, keepdim=True)  # the maximum is 0 whatever the temperature
    scaled.div_(rows.temperature.clamp(min=_TINY).unsqueeze(-1))
    threshold = _thresholds(scaled, rows)
    if threshold is not None:
        scaled.masked_fill_(scaled < threshold.unsqueeze(-1), -math.inf)
    return scaled.softmax(dim=-1)


def draw_tokens(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one index of each row in proportion to its weights, by inverting the cumulative sum.

    weights [rows, n] non-negative, need not sum to 1; uniforms [rows] in [0, 1) -> [rows] int64.
    An index of weight 0 is never drawn.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    wanted = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=weights.shape[-1] - 1)
    # A parallel sum (CUDA) may round differently from one index to the next and so leave a sliver
    # to a weight of zero, as does a uniform that was rounded up to 1.
    impossible = weights.gather(-1, drawn) <= 0
    return torch.where(impossible, weights.argmax(dim=-1, keepdim=True), drawn).squeeze(-1)


def _thresholds(scaled: Tensor, rows: SamplingRows) -> Tensor | None:
    """Least scaled logit each row keeps [rows], or None when no row truncates."""
    threshold: Tensor | None = None
    if rows.any_top_k:
        threshold = _top_k_thresholds(scaled, rows.top_k)
    if rows.any_top_p:
        if threshold is None:
            threshold = torch.full_like(rows.temperature, -math.inf)
        threshold = _top_p_thresholds(scaled, rows.top_p, threshold)
    if rows.any_min_p:
        floor = rows.min_p.log()  # the most likely token's scaled logit is 0
        threshold = floor if threshold is None else torch.maximum(threshold, floor)
    return threshold


def _top_k_thresholds(scaled: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest scaled logit of each row, -inf where top-k is off or keeps everything."""
    threshold = torch.full_like(scaled[:, 0], -math.inf)
    active = ((top_k > 0) & (top_k < scaled.shape[-1])).nonzero().squeeze(-1)
    if len(active):
        kth = top_k[active].unsqueeze(-1) - 1
        values = scaled[active].topk(int(kth.max()) + 1, dim=-1).values
        threshold[active] = values.gather(-1, kth).squeeze(-1)
    return threshold


def _top_p_thresholds(scaled: Tensor, top_p: Tensor, kept: Tensor) -> Tensor:
    """Raises `kept` [rows] to the least logit of each row's nucleus, where top-p is on.

    The nucleus is the smallest set of most likely kept tokens that holds top-p of the kept mass.
    """
    threshold, vocab = kept.clone(), scaled.shape[-1]
    weights = scaled.exp().masked_fill_(scaled < kept.unsqueeze(-1), 0.0)
    wanted = top_p * weights.sum(dim=-1, dtype=torch.float64)
    pending = (top_p < 1.0).nonzero().squeeze(-1)
    for width in (*(w for w in _NUCLEUS_WIDTHS if w < vocab), vocab):
        if not len(pending):
            break
        values = scaled[pending].topk(width, dim=-1).values
        masses = values.exp().cumsum(dim=-1, dtype=torch.float64)
        before = (masses < wanted[pending].unsqueeze(-1)).sum(dim=-1)  # the token that completes it
        last = values.gather(-1, before.clamp(max=width - 1).unsqueeze(-1)).squeeze(-1)
        threshold[pending] = torch.maximum(last, kept[pending])
        pending = pending[before >= width]  # not complete: again, among more candidates
    return threshold
