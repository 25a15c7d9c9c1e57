"""Optimises the module of an objective: data order, masters, rates, clipping and checkpoints.

Weights and activations are bfloat16; the optimiser keeps float32 masters. Data order and anchors
are a function of the seed and the step, so that a resumed run repeats what the first would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dspark_core.errors import ConfigError
from dspark_core.training.features import SequenceRef, read_sequence
from dspark_core.training.objectives.protocol import Objective, ObjectiveReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    steps: int
    sequences_per_step: int = 8
    learning_rate: float = 6e-4
    matrix_learning_rate: float | None = None
    """Of the layers' and the projection's matrices, which Muon then optimises; None: AdamW for all."""
    warmup_fraction: float = 0.04
    decay_fraction: float = 0.96
    """Last part of the steps, over which the rate falls to zero along a cosine; 1 - warm-up: all."""
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequences_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
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

    @classmethod
    def of(cls, sums: ObjectiveReport, step: int, rate: float, norm: float) -> StepReport:
        means = [float(term.mean()) for term in (sums.cross_entropy, sums.distance, sums.confidence)]
        acceptance = tuple((sums.accepted / sums.counted.clamp_min(1)).tolist())
        return cls(step, means[0], means[1], means[2], acceptance, rate, norm)

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
    def __init__(self, objective: Objective, config: TrainerConfig, refs: Sequence[SequenceRef]) -> None:
        """The objective's module, in float32, is turned into bfloat16 and trained in place."""
        self.objective = objective
        self.config = config
        self._refs = [ref for ref in refs if ref.end - ref.start - 1 > ref.answer_start]
        self._order: tuple[int, list[int]] | None = None
        if not self._refs:
            raise ConfigError("no training sequences with at least two answer tokens")
        module = objective.module.requires_grad_(True).train()
        self._masters = [nn.Parameter(p.detach().clone().float()) for p in module.parameters()]
        module.to(torch.bfloat16)
        self._optimizers = _optimizers(objective, self._masters, config)
        self.step = 0

    def run(self) -> Iterator[StepReport]:
        """Trains to the last step, reporting after each."""
        while self.step < self.config.steps:
            yield self.train_step()

    def train_step(self) -> StepReport:
        count = self.config.sequences_per_step
        sequences = [read_sequence(self._ref(i)) for i in range(count)]
        first = self.step * count
        generators = [
            torch.Generator().manual_seed(_mix(self.config.seed, first + index)) for index in range(count)
        ]
        sums = self.objective.backward(sequences, generators, _alone)
        share = rate_share(self.config, self.step)
        norm = self._update(share)
        self.step += 1
        return StepReport.of(sums, self.step, share * self.config.learning_rate, norm)

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

    def _ref(self, index: int) -> SequenceRef:
        """Sequence `index` of this step: every epoch visits all sequences in an order of its own."""
        epoch, row = divmod(self.step * self.config.sequences_per_step + index, len(self._refs))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.config.seed, -1 - epoch))
            self._order = (epoch, torch.randperm(len(self._refs), generator=generator).tolist())
        return self._refs[self._order[1][row]]

    @torch.no_grad()
    def _update(self, share: float) -> float:
        for master, parameter in zip(self._masters, self.objective.module.parameters(), strict=True):
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
        for master, parameter in zip(self._masters, self.objective.module.parameters(), strict=True):
            parameter.copy_(master)


def _optimizers(
    objective: Objective, masters: Sequence[nn.Parameter], config: TrainerConfig
) -> list[torch.optim.Optimizer]:
    names = [name for name, _ in objective.module.named_parameters()]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, master in zip(names, masters, strict=True):
        inner = master.dim() == 2 and name.startswith(objective.matrix_prefixes)
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


def _alone(denominators: Tensor) -> Tensor:
    return denominators


def _mix(seed: int, number: int) -> int:
    """A generator seed that differs between seeds and between numbers."""
    return (seed * 1_000_003 + number) % 2**62
