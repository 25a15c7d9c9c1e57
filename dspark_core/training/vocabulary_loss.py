"""Cross-entropy and L1 distance over the vocabulary, with their gradients, in one pass.

Autograd would keep a dozen float32 tensors of [rows, vocabulary] and go through memory for each. Here
only the draft and target logits of one slice of rows exist, in the model's dtype, in buffers reused across
steps. All float32 work is done on a few rows at a time, which stay in the CPU's cache, and overwrites the
logits with their gradient. The tests compare it with the definition in plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_VALUES = 2**18
"""Float32 values per buffer on a CPU: 1 MiB, so that a few buffers fit in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyRows:
    """Positions that predict a token; all tensors have one row each."""

    target_hidden: Tensor  # [rows, d], after the target's final norm
    log_normalizers: Tensor  # [rows] float32, over the target's full vocabulary
    labels: Tensor  # [rows] draft vocabulary indices; ignored where cross_entropy_scale is zero
    cross_entropy_scale: Tensor  # [rows] factor of a row's cross-entropy in the total
    distance_scale: Tensor  # [rows]
    soft_labels: bool = False
    """Cross-entropy against the part of the target's distribution inside the draft vocabulary, instead
    of the labels."""


@dataclass(frozen=True, slots=True)
class VocabularyLosses:
    total: Tensor
    """Scalar, differentiable: the scaled sum of both losses."""
    cross_entropy: Tensor  # [rows] float32, detached, unscaled
    distance: Tensor  # [rows] float32, detached, unscaled

    @property
    def acceptance(self) -> Tensor:
        """1 - L1/2: the probability that the drawn token is accepted, [rows]."""
        return (1 - 0.5 * self.distance).clamp(0, 1)


class VocabularyLoss:
    def __init__(self, slice_rows: int, softcap: float | None = None) -> None:
        """slice_rows: rows whose logits exist at a time; softcap: c in `c tanh(logits / c)`, applied to
        the target's logits, and to the drafter's before the Markov bias; None: no cap."""
        self.slice_rows = slice_rows
        self.softcap = softcap
        self._buffers: dict[str, Tensor] = {}

    def __call__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        rows: VocabularyRows,
        latent: Tensor | None = None,
        bias_weight: Tensor | None = None,
    ) -> VocabularyLosses:
        """Logits are `hidden lm_head^T + latent bias_weight^T`; lm_head is frozen.

        hidden [rows, d]; lm_head [draft vocab, d]; latent [rows, r]; bias_weight [draft vocab, r]
        """
        total, cross_entropy, distance = _Function.apply(  # type: ignore[no-untyped-call]
            self, hidden, latent, bias_weight, lm_head, rows
        )
        return VocabularyLosses(total, cross_entropy, distance)

    def buffer(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """[rows, columns], reused between calls: faulting in fresh pages costs more than the arithmetic."""
        rows, columns = shape
        kept = self._buffers.get(name)
        fits = kept is not None and kept.shape[0] >= rows and kept.shape[1] == columns
        if kept is None or not fits or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._buffers[name] = like.new_empty(shape)
        return kept[:rows]


class _Function(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own context object
        workspace: VocabularyLoss,
        hidden: Tensor,
        latent: Tensor | None,
        bias_weight: Tensor | None,
        lm_head: Tensor,
        rows: VocabularyRows,
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Gradients.zeros(hidden, latent, bias_weight)
        cross_entropy = torch.empty(len(hidden), device=hidden.device)
        distance = torch.empty_like(cross_entropy)
        for at in _slices(len(hidden), workspace.slice_rows):
            shape = (at.stop - at.start, len(lm_head))
            logits = workspace.buffer("draft", shape, hidden)
            target = workspace.buffer("target", shape, hidden)
            torch.mm(hidden[at], lm_head.t(), out=logits)
            slope = None
            if workspace.softcap is not None:
                slope = _cap(logits, workspace.softcap, workspace.buffer("slope", shape, hidden))
            if latent is not None and bias_weight is not None:
                logits.addmm_(latent[at], bias_weight.t())
            torch.mm(rows.target_hidden[at].to(lm_head.dtype), lm_head.t(), out=target)
            if workspace.softcap is not None:
                _cap(target, workspace.softcap)
            for part in _slices(len(logits), _chunk_rows(logits)):
                whole = slice(at.start + part.start, at.start + part.stop)
                cross_entropy[whole], distance[whole] = _chunk(
                    workspace, logits[part], target[part], rows, whole
                )
            work.add_bias(at, logits, latent, bias_weight)
            if slope is not None:
                logits.mul_(slope)
            torch.mm(logits, lm_head, out=work.hidden[at])
        ctx.work = work
        total = (cross_entropy * rows.cross_entropy_scale).sum() + (distance * rows.distance_scale).sum()
        ctx.mark_non_differentiable(cross_entropy, distance)
        return total, cross_entropy, distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        work: _Gradients = ctx.work
        scaled = [
            None if x is None else x * gradients[0].to(x.dtype)
            for x in (work.hidden, work.latent, work.bias_weight)
        ]
        return (None, *scaled, None, None)


@dataclass(frozen=True, slots=True)
class _Gradients:
    hidden: Tensor
    latent: Tensor | None
    bias_weight: Tensor | None
    """Float32, because it accumulates over slices."""

    @classmethod
    def zeros(cls, hidden: Tensor, latent: Tensor | None, bias_weight: Tensor | None) -> _Gradients:
        return cls(
            torch.empty_like(hidden),
            None if latent is None else torch.empty_like(latent),
            None if bias_weight is None else torch.zeros_like(bias_weight, dtype=torch.float32),
        )

    def add_bias(self, at: slice, logits: Tensor, latent: Tensor | None, bias_weight: Tensor | None) -> None:
        """logits: their gradients, [rows of `at`, draft vocab]"""
        if latent is None or self.latent is None or bias_weight is None or self.bias_weight is None:
            return
        torch.mm(logits, bias_weight, out=self.latent[at])
        self.bias_weight.add_(logits.t() @ latent[at])


def _chunk(
    workspace: VocabularyLoss, logits: Tensor, target: Tensor, rows: VocabularyRows, at: slice
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and distance of a few rows; overwrites `logits` with the gradient of the total.

    With p the draft's distribution, q the target's, s = sign(p - q) and scales a and b:
    d(a nll + b |p - q|) / d logits = p (a + b (s - sum p s)) - a onehot(label);
    with soft labels, the first a becomes a sum(q), and onehot(label) becomes q.
    """
    shape = (logits.shape[0], logits.shape[1])
    draft, other, signed = (workspace.buffer(name, shape, rows.log_normalizers) for name in ("p", "q", "ps"))
    labels = rows.labels[at].clamp_min(0)[:, None]
    highest = logits.amax(dim=-1, keepdim=True).float()
    chosen = logits.gather(-1, labels).float()
    torch.softmax(logits, dim=-1, dtype=torch.float32, out=draft)
    # The softmax at the highest logit is exp(highest - logsumexp).
    log_sum = highest - draft.amax(dim=-1, keepdim=True).log()

    other.copy_(target).sub_(rows.log_normalizers[at, None]).exp_()
    inside = other.sum(dim=-1, keepdim=True)
    a, b = rows.cross_entropy_scale[at, None], rows.distance_scale[at, None]
    if rows.soft_labels:
        cross_entropy = inside * log_sum - torch.mul(other, logits, out=signed).sum(dim=-1, keepdim=True)
        taught = torch.mul(other, a, out=workspace.buffer("aq", shape, rows.log_normalizers))
    else:
        cross_entropy = log_sum - chosen
    torch.sub(draft, other, out=other)
    torch.abs(other, out=signed)
    distance = signed.sum(dim=-1) + (1 - inside[:, 0]).clamp_min_(0)
    other.sign_()
    towards = torch.mul(draft, other, out=signed).sum(dim=-1, keepdim=True)

    other.mul_(b).add_((a * inside if rows.soft_labels else a) - b * towards)
    draft.mul_(other)
    if rows.soft_labels:
        draft.sub_(taught)
    else:
        draft.scatter_add_(-1, labels, -a)
    logits.copy_(draft)
    return cross_entropy[:, 0], distance


def _cap(logits: Tensor, cap: float, slope: Tensor | None = None) -> Tensor | None:
    """Soft-cap the logits in place; writes the derivative to `slope`."""
    logits.div_(cap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1.0)
    logits.mul_(cap)
    return slope


def _chunk_rows(logits: Tensor) -> int:
    on_cpu = logits.device.type == "cpu"
    return max(1, _CHUNK_VALUES // logits.shape[1]) if on_cpu else len(logits)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
