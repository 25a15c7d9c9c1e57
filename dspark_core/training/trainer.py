"""Optimises a drafter on packed batches of cached target features.

Weights and activations are bfloat16; the optimiser keeps float32 masters. Data order and anchors
are a function of the seed and the step, so that a resumed run repeats what the first would do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dspark_core.errors import ConfigError
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.features import SequenceRef, read_sequence
from dspark_core.training.losses import (
    OUTSIDE_DRAFT_VOCAB,
    BlockLosses,
    block_losses,
    position_weights,
    target_probabilities,
)
from dspark_core.training.packing import PackedBatch, draw_anchors, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    steps: int
    sequences_per_step: int = 8
    anchors_per_sequence: int = 48
    learning_rate: float = 6e-4
    matrix_learning_rate: float | None = None
    """Of the layers' and the projection's matrices, which Muon then optimises; None: AdamW for all."""
    warmup_fraction: float = 0.04
    decay_fraction: float = 0.96
    """Last part of the steps, over which the rate falls to zero along a cosine; 1 - warm-up: all."""
    clip_norm: float = 1.0
    loss_decay: float = 4.0
    cross_entropy_weight: float = 0.1
    distance_weight: float = 0.9
    confidence_weight: float = 1.0
    dropout: float = 0.0
    """Of the tapped states and of the blocks' final hidden states; for data that must be repeated."""
    slice_anchors: int = 48
    """Anchors whose vocabulary-sized tensors exist at a time."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequences_per_step", "anchors_per_sequence", "slice_anchors"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")


@dataclass(frozen=True, slots=True)
class StepReport:
    """Means over one step's counted positions."""

    step: int
    cross_entropy: float
    distance: float
    confidence: float
    acceptance: tuple[float, ...]
    """By block position, under teacher forcing."""
    learning_rate: float
    gradient_norm: float

    @property
    def expected_length(self) -> float:
        """Accepted length of a round whose positions accept independently; a quick guide."""
        survival, length = 1.0, 1.0
        for rate in self.acceptance:
            survival *= rate
            length += survival
        return length


def rate_share(config: TrainerConfig, step: int) -> float:
    """Share of the peak rate: linear warm-up, a plateau if the fractions leave one, cosine to zero."""
    warmup, decay = config.warmup_fraction * config.steps, config.decay_fraction * config.steps
    share = min(1.0, (step + 1) / max(warmup, 1.0))
    remaining = config.steps - step
    if remaining < decay:
        share *= 0.5 - 0.5 * math.cos(math.pi * remaining / decay)
    return share


class Trainer:
    def __init__(self, drafter: DSparkDrafter, config: TrainerConfig, refs: Sequence[SequenceRef]) -> None:
        """`drafter` in float32; it is turned into bfloat16 and trained in place."""
        self.drafter = drafter.requires_grad_(True).train()
        self.config = config
        self._refs = [ref for ref in refs if ref.end - ref.start - 1 > ref.answer_start]
        self._order: tuple[int, list[int]] | None = None
        if not self._refs:
            raise ConfigError("no training sequences with at least two answer tokens")
        self._masters = [nn.Parameter(p.detach().clone().float()) for p in drafter.parameters()]
        self.drafter.to(torch.bfloat16)
        self._optimizers = _optimizers(drafter, self._masters, config)
        self.step = 0
        self._weights = position_weights(drafter.config.block_size, config.loss_decay)
        self._draft_index = _draft_index(drafter)

    def run(self) -> Iterator[StepReport]:
        """Trains to the last step, reporting after each."""
        while self.step < self.config.steps:
            yield self.train_step(self._next_batch())

    def train_step(self, batch: PackedBatch) -> StepReport:
        totals = self._backward(batch)
        share = rate_share(self.config, self.step)
        norm = self._update(share)
        self.step += 1
        return totals.report(self.step, share * self.config.learning_rate, norm)

    def state(self) -> dict[str, object]:
        """Everything `restore` needs to go on exactly here."""
        return {
            "step": self.step,
            "masters": [master.detach() for master in self._masters],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=True):
                master.copy_(saved)
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._publish()

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(self.state(), partial)
        partial.rename(path)

    def _next_batch(self) -> PackedBatch:
        config, drafter = self.config, self.drafter.config
        generator = torch.Generator().manual_seed(_mix(config.seed, self.step))
        sequences = [read_sequence(self._ref(i)) for i in range(config.sequences_per_step)]
        anchors = [draw_anchors(s, config.anchors_per_sequence, generator) for s in sequences]
        return pack(sequences, anchors, drafter.block_size, drafter.context_window)

    def _ref(self, index: int) -> SequenceRef:
        """Sequence `index` of this step: every epoch visits all sequences in an order of its own."""
        epoch, row = divmod(self.step * self.config.sequences_per_step + index, len(self._refs))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.config.seed, -1 - epoch))
            self._order = (epoch, torch.randperm(len(self._refs), generator=generator).tolist())
        return self._refs[self._order[1][row]]

    def _backward(self, batch: PackedBatch) -> _Totals:
        """Gradients of the batch's mean loss, vocabulary-sized work done slice by slice."""
        drafter, config = self.drafter, self.config
        generator = torch.Generator().manual_seed(_mix(config.seed + 1, self.step))
        dropped = dataclasses.replace(batch, taps=_dropout(batch.taps, config.dropout, generator))
        hidden = _dropout(packed_hidden(drafter, dropped), config.dropout, generator)
        labels = self._labels(batch)
        weights = batch.counted * self._weights
        scale_inside = 1 / (weights * (labels != OUTSIDE_DRAFT_VOCAB)).sum().clamp_min(1e-9)
        scale = 1 / weights.sum()
        leaf = hidden.detach().requires_grad_()
        totals = _Totals(weights.shape[1])
        for start in range(0, len(leaf), config.slice_anchors):
            rows = slice(start, start + config.slice_anchors)
            losses = self._slice_losses(batch, leaf, labels, weights, rows)
            loss = (
                config.cross_entropy_weight * scale_inside * losses.cross_entropy.numerator
                + config.distance_weight * scale * losses.distance.numerator
                + config.confidence_weight * scale * losses.confidence.numerator
            )
            loss.backward()  # type: ignore[no-untyped-call]
            totals.add(losses, batch.counted[rows])
        assert leaf.grad is not None
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return totals

    def _slice_losses(
        self, batch: PackedBatch, hidden: Tensor, labels: Tensor, weights: Tensor, rows: slice
    ) -> BlockLosses:
        drafter = self.drafter
        logits, confidence = drafter.teacher_forced(hidden[rows], batch.previous_ids[rows])
        with torch.no_grad():
            target = target_probabilities(
                batch.target_hidden[rows].to(drafter.lm_head.dtype),
                drafter.lm_head,
                batch.log_normalizers[rows],
            )
        return block_losses(logits, confidence, labels[rows], target, weights[rows])

    def _labels(self, batch: PackedBatch) -> Tensor:
        return batch.labels if self._draft_index is None else self._draft_index[batch.labels]

    @torch.no_grad()
    def _update(self, share: float) -> float:
        for master, parameter in zip(self._masters, self.drafter.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self._masters, self.config.clip_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
        self._publish()
        return float(norm)

    @torch.no_grad()
    def _publish(self) -> None:
        for master, parameter in zip(self._masters, self.drafter.parameters(), strict=True):
            parameter.copy_(master)


class _Totals:
    """Sums over the slices of a step."""

    def __init__(self, block_size: int) -> None:
        self._sums = torch.zeros(6)  # numerator and denominator of each loss
        self._accepted = torch.zeros(block_size)
        self._counted = torch.zeros(block_size)

    def add(self, losses: BlockLosses, counted: Tensor) -> None:
        terms = (losses.cross_entropy, losses.distance, losses.confidence)
        self._sums += torch.stack([x.detach() for t in terms for x in (t.numerator, t.denominator)])
        self._accepted += (losses.acceptance * counted).sum(dim=0)
        self._counted += counted.sum(dim=0)

    def report(self, step: int, rate: float, norm: float) -> StepReport:
        means = self._sums[0::2] / self._sums[1::2].clamp_min(1e-9)
        acceptance = self._accepted / self._counted.clamp_min(1)
        ce, distance, confidence = means.tolist()
        return StepReport(step, ce, distance, confidence, tuple(acceptance.tolist()), rate, norm)


def _optimizers(
    drafter: DSparkDrafter, masters: Sequence[nn.Parameter], config: TrainerConfig
) -> list[torch.optim.Optimizer]:
    names = [name for name, _ in drafter.named_parameters()]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, master in zip(names, masters, strict=True):
        inner = master.dim() == 2 and name.startswith(("layers.", "projection."))
        (matrices if inner and config.matrix_learning_rate else others).append(master)
    adam = torch.optim.AdamW(
        [{"params": others, "peak_lr": config.learning_rate}], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    if not matrices:
        return [adam]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"matrix_learning_rate needs torch 2.9 or later, this is {torch.__version__}")
    group = {"params": matrices, "peak_lr": config.matrix_learning_rate}
    return [adam, torch.optim.Muon([group], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]


def _dropout(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Dropout from a generator of its own, so that a resumed run drops the same."""
    if rate == 0:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * keep / (1 - rate)


def _draft_index(drafter: DSparkDrafter) -> Tensor | None:
    """Target token id -> draft vocabulary index, [vocab]; None when the two are the same."""
    ids = drafter.draft_vocab_ids
    if ids is None:
        return None
    index = torch.full((drafter.config.backbone.vocab_size,), OUTSIDE_DRAFT_VOCAB)
    index[ids] = torch.arange(len(ids))
    return index


def _mix(seed: int, number: int) -> int:
    """A generator seed that differs between seeds and between numbers."""
    return (seed * 1_000_003 + number) % 2**62
