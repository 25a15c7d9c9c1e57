"""Shapes target distributions (temperature, top-k, top-p, min-p) and draws tokens from them.

A row's distribution is represented by weights: exp of the scaled logits, with the most likely token's
equal to 1. Every truncation is a threshold on them: a token stays if its weight reaches the row's
threshold. Equal logits are therefore kept or dropped together, and a row's result depends neither on
how a sort orders ties nor on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.records import SamplingParams

_LEAST_LOGIT = -87.0
"""Scaled, relative to the most likely token's; tokens below it are never drawn."""
_LEAST_WEIGHT = 1.7e-38
"""Just above exp(_LEAST_LOGIT)."""
_TINY = torch.finfo(torch.float32).tiny
_BINS = (127 << 3) + 1
"""Eight bins per octave of the weights in (0, 1], by the leading bits of a float32."""
_BLOCK_ELEMENTS = 1 << 18
"""Weights evaluated at a time on a CPU, so that intermediate results stay in its cache."""
_DEVICE_BLOCK_ELEMENTS = 1 << 24
"""The same on a GPU, where sorting takes several times their memory."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of each row of a batch of logits.

    The flags duplicate on the host what the tensors hold, so that testing them needs no device transfer.
    """

    temperature: Tensor  # [rows] float32
    top_k: Tensor  # [rows] int64, 0: off
    top_p: Tensor  # [rows] float64, 1: off
    min_p: Tensor  # [rows] float32, 0: off
    any_temperature: bool
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
        present = params
        if repeats is not None:
            present = [p for p, count in zip(params, repeats, strict=True) if count]

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            whole = torch.tensor(values, dtype=dtype)
            if repeats is not None:
                whole = whole.repeat_interleave(torch.tensor(repeats, dtype=torch.int64))
            return to_device(whole, torch.device(device))

        return cls(
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params], torch.float64),
            min_p=column([p.min_p for p in params], torch.float32),
            any_temperature=any(p.temperature != 1.0 for p in present),
            any_top_k=any(p.top_k > 0 for p in present),
            any_top_p=any(p.top_p < 1.0 for p in present),
            any_min_p=any(p.min_p > 0.0 for p in present),
        )

    @property
    def plain(self) -> bool:
        """Whether every row's distribution is the softmax of its logits, which PyTorch has fused."""
        return not (self.any_temperature or self.any_top_k or self.any_top_p or self.any_min_p)

    def __getitem__(self, rows: slice | Tensor) -> SamplingRows:
        """A subset of the rows; the flags remain those of all rows."""
        return replace(
            self,
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
        )


def greedy_tokens(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> most likely token ids [rows] int64, the lowest id on ties."""
    return logits.argmax(dim=-1)


def target_probabilities(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits [rows, vocab] -> the distribution to draw from [rows, vocab] float32.

    Applies temperature, top-k, top-p, min-p in this order, each to the result of the one before. Tokens equal
    to the last one kept are kept too, and the most likely token always is. Rows of temperature 0
    yield a uniform choice among the most likely tokens; use `greedy_tokens` for them.
    """
    weights = target_weights(logits, rows)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def target_weights(logits: Tensor, rows: SamplingRows) -> Tensor:
    """`target_probabilities` before normalisation: the most likely token of each row weighs 1."""
    logits = logits.float()
    weights = logits - logits.amax(dim=-1, keepdim=True)  # the maximum becomes 0 at any temperature
    if rows.any_temperature:
        weights.div_(rows.temperature.clamp(min=_TINY).unsqueeze(-1))
    # Subnormal results and infinite arguments are up to ten times slower on a CPU.
    torch.threshold_(weights.clamp_(min=_LEAST_LOGIT).exp_(), _LEAST_WEIGHT, 0.0)
    if weights.is_cuda and (rows.any_top_k or rows.any_top_p):
        _truncate(weights, sorted_thresholds(weights, rows.top_k, rows.top_p))
    else:
        if rows.any_top_k:
            _truncate(weights, _top_k_thresholds(weights, rows.top_k))
        if rows.any_top_p:
            _truncate(weights, _top_p_thresholds(weights, rows.top_p))
    if rows.any_min_p:
        _truncate(weights, rows.min_p)
    return weights


def target_weight_blocks(logits: Tensor, rows: SamplingRows) -> Iterator[tuple[slice, Tensor]]:
    """`target_weights` of consecutive row blocks: (row slice, weights)."""
    for span in _row_blocks(logits):
        yield span, target_weights(logits[span], rows[span])


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of consecutive rows of [rows, vocab] to evaluate together."""
    count, vocab = logits.shape
    block = max(1, (_DEVICE_BLOCK_ELEMENTS if logits.is_cuda else _BLOCK_ELEMENTS) // vocab)
    return (slice(start, start + block) for start in range(0, count, block))


class TargetLaws:
    """The distributions of rows of logits, evaluated only as far as requested."""

    def __init__(self, logits: Tensor, rows: SamplingRows) -> None:
        """logits [rows, vocab]"""
        self._logits = logits
        self._rows = rows
        self.num_rows = logits.shape[0]

    def of_tokens(self, index: Tensor, token_ids: Tensor) -> Tensor:
        """Probability of a token in a row: index [n] of rows, token_ids [n] -> [n] float64.

        Evaluates only these rows; a bonus token's row is requested separately, as a whole.
        """
        found = torch.empty(len(index), dtype=torch.float64, device=self._logits.device)
        if not len(index):
            return found
        logits = self._logits[index]
        if self._rows.plain:
            for span in _row_blocks(logits):
                probabilities = torch.softmax(logits[span].float(), dim=-1)
                found[span] = probabilities.gather(-1, token_ids[span].unsqueeze(-1)).squeeze(-1).double()
            return found
        for span, weights in target_weight_blocks(logits, self._rows[index]):
            mass = weights.sum(dim=-1, dtype=torch.float64)
            found[span] = weights.gather(-1, token_ids[span].unsqueeze(-1)).squeeze(-1) / mass
        return found

    def of_rows(self, index: Tensor) -> Tensor:
        """Full distributions: index [n] of rows -> [n, vocab] float32."""
        if self._rows.plain:
            return torch.softmax(self._logits[index].float(), dim=-1)
        return target_probabilities(self._logits[index], self._rows[index])


class KnownLaws:
    """`TargetLaws` of precomputed probabilities."""

    def __init__(self, probabilities: Tensor) -> None:
        """probabilities [rows, vocab]"""
        self._probabilities = probabilities
        self.num_rows = probabilities.shape[0]

    def of_tokens(self, index: Tensor, token_ids: Tensor) -> Tensor:
        return self._probabilities[index, token_ids].double()

    def of_rows(self, index: Tensor) -> Tensor:
        return self._probabilities[index]


def draw_tokens(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one index per row in proportion to the weights, by inverting the cumulative sum.

    weights [rows, n] non-negative, need not sum to 1; uniforms [rows] in [0, 1) -> [rows] int64.
    An index of weight 0 is never drawn.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    wanted = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=weights.shape[-1] - 1)
    # A parallel sum (CUDA) may round differently from one index to the next and so leave a sliver of
    # probability to a zero weight; so does a uniform rounded up to 1.
    impossible = weights.gather(-1, drawn) <= 0
    if weights.device.type == "cpu" and not impossible.any():
        return drawn.squeeze(-1)  # on a GPU the check would force a sync
    return torch.where(impossible, weights.argmax(dim=-1, keepdim=True), drawn).squeeze(-1)


def sorted_thresholds(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Smallest weight per row that top-k and then top-p keep [rows]; 0 where both are off.

    For a GPU: its control flow depends on no value, so nothing is read back. On a CPU
    `_top_k_thresholds` and `_top_p_thresholds` do less work instead.
    """
    ordered = weights.sort(dim=-1, descending=True).values
    vocab = weights.shape[-1]
    limited = (top_k > 0) & (top_k < vocab)
    kth = ordered.gather(-1, (top_k.clamp(1, vocab) - 1).unsqueeze(-1)).squeeze(-1)
    least = torch.where(limited, kth, 0.0)
    kept = ordered * (ordered >= least.unsqueeze(-1))
    cumulative = kept.cumsum(dim=-1, dtype=torch.float64)
    mass = cumulative[:, -1]
    wanted = torch.minimum(top_p * mass, mass).unsqueeze(-1)
    completing = (cumulative < wanted).sum(dim=-1, keepdim=True).clamp_(max=vocab - 1)
    nucleus = ordered.gather(-1, completing).squeeze(-1)
    return torch.maximum(least, torch.where(top_p < 1.0, nucleus, 0.0))


def _truncate(weights: Tensor, least: Tensor) -> None:
    """Zeroes in place the weights of each row below `least` [rows]."""
    weights.mul_(weights >= least.unsqueeze(-1))


def _top_k_thresholds(weights: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest weight of each row, 0 where top-k is off or keeps everything."""
    least = torch.zeros_like(weights[:, 0])
    active = ((top_k > 0) & (top_k < weights.shape[-1])).nonzero().squeeze(-1)
    if len(active):
        kth = top_k[active].unsqueeze(-1) - 1
        values = weights[active].topk(int(kth.max()) + 1, dim=-1).values
        least[active] = values.gather(-1, kth).squeeze(-1)
    return least


def _top_p_thresholds(weights: Tensor, top_p: Tensor) -> Tensor:
    """Smallest weight of each row's nucleus, the smallest set of most likely tokens that holds top-p
    of the mass; 0 where top-p is off.

    Tokens lighter than (1 - top-p) * mass / vocab weigh less than (1 - top-p) of the mass together, so the
    nucleus does without them. The others are put into bins of similar weight, and only the bin in which
    the nucleus ends is sorted.
    """
    count, vocab = weights.shape
    mass = weights.sum(dim=-1, dtype=torch.float64)
    # Half of that, to allow for rounded sums. Where top-p is off, nothing is a candidate.
    floor = torch.where(top_p < 1.0, 0.5 * (1.0 - top_p) * mass / vocab, torch.inf).float()
    row, token = (weights >= floor.clamp(min=_TINY).unsqueeze(-1)).nonzero(as_tuple=True)
    heavy = weights[row, token]
    bins = _BINS - 1 - (heavy.view(torch.int32).long() >> 20)  # sign, exponent, three bits: ascending
    masses = (row * _BINS + bins).bincount(heavy.double(), count * _BINS).view(count, _BINS).cumsum(dim=-1)
    wanted = torch.minimum(top_p * mass, masses[:, -1]).unsqueeze(-1)
    last = (masses < wanted).sum(dim=-1)
    ending = (bins == last[row]).nonzero().squeeze(-1)
    members, counts = _rectangle(heavy[ending], row[ending], count)
    members = members.sort(dim=-1, descending=True).values
    heavier = masses.gather(-1, (last - 1).clamp(min=0).unsqueeze(-1)) * (last > 0).unsqueeze(-1)
    before = ((members.cumsum(dim=-1, dtype=torch.float64) + heavier) < wanted).sum(dim=-1)
    before = torch.minimum(before, (counts - 1).clamp_(min=0))  # the token that completes it
    return members.gather(-1, before.unsqueeze(-1)).squeeze(-1)


def _rectangle(values: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """values [n] grouped by their rows [n] -> [rows, longest], zero-padded, and the row lengths."""
    counts = row.bincount(minlength=rows)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    out = values.new_zeros((rows, max(1, int(counts.max()))))
    out[row, place] = values
    return out, counts
