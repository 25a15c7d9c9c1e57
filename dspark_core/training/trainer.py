"""Trains the module of an objective: data order, gradients, learning rates and resumable state.

Data order and every random draw are functions of the seed, the step and the sequence, so a resumed
run repeats an uninterrupted one, and several workers do what one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.training.features import FeatureSequence
from dspark_core.training.objectives.protocol import Objective, ObjectiveReport
from dspark_core.training.optimizers import build_optimizers, rate_share
from dspark_core.training.sources import SequenceSource, mix_seed, sequence_plan
from dspark_core.training.trainer_config import TrainerConfig
from dspark_core.training.weights import LocalWeights, ShardedWeights, Weights
from dspark_core.training.workers import ALONE, Workers


@dataclass(frozen=True, slots=True)
class StepReport:
    """Means over one step's positions, across all workers."""

    step: int
    cross_entropy: float
    distance: float
    confidence: float
    acceptance: tuple[float, ...]
    """Acceptance rate per block position, under teacher forcing."""
    learning_rate: float
    gradient_norm: float
    positions: int = 0
    """Number of positions whose losses were computed."""

    @classmethod
    def of(cls, sums: ObjectiveReport, step: int, rate: float, norm: float) -> StepReport:
        means = [float(term.mean()) for term in (sums.cross_entropy, sums.distance, sums.confidence)]
        acceptance = tuple((sums.accepted / sums.counted.clamp_min(1)).tolist())
        positions = int(sums.counted.sum())
        return cls(step, means[0], means[1], means[2], acceptance, rate, norm, positions)

    @property
    def expected_length(self) -> float:
        """Rough accepted length per round, assuming that positions accept independently."""
        survival, length = 1.0, 1.0
        for rate in self.acceptance:
            survival *= rate
            length += survival
        return length


class Trainer:
    def __init__(
        self,
        objective: Objective,
        config: TrainerConfig,
        source: SequenceSource,
        *,
        workers: Workers = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        """Moves the objective's float32 module to `device` and trains it in place."""
        if config.sequences_per_step % workers.size:
            raise ConfigError(
                f"sequences_per_step must be a multiple of the {workers.size} workers, "
                f"got {config.sequences_per_step}"
            )
        self.objective, self.config, self.workers = objective, config, workers
        self._source = source
        self._share = config.sequences_per_step // workers.size
        module = objective.module.requires_grad_(True).train().to(device)
        names = [name for name, _ in module.named_parameters()]
        self._weights = _weights(module, torch.bfloat16 if config.bf16 else torch.float32, workers)
        masters = self._weights.masters
        self._names = names
        self._optimizers = build_optimizers(names, masters, objective.matrix_prefixes, config)
        self._averages = [m.detach().clone() for m in masters] if config.ema_decay is not None else None
        self._weights.publish()
        self.step = 0

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return sum(master.numel() for master in self._weights.masters)

    @property
    def state_bytes(self) -> int:
        """Size of one saved state: float32 masters, average, and one moment (Muon) or two (AdamW)."""
        copies = 1 if self._averages is None else 2
        moments: list[int] = [
            (2 if isinstance(optimizer, torch.optim.AdamW) else 1) * parameter.numel()
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        return 4 * (copies * self.parameters + sum(moments))

    def run(self) -> Iterator[StepReport]:
        """Train to the last step, yielding a report after each."""
        plan = sequence_plan(
            len(self._source),
            self.config.sequences_per_step,
            seed=self.config.seed,
            start_step=self.step,
            rank=self.workers.rank,
            world_size=self.workers.size,
        )
        with closing(_batches(self._source, plan)) as batches:
            while self.step < self.config.steps:
                yield self._train_step(next(batches))

    def _train_step(self, sequences: list[FeatureSequence]) -> StepReport:
        first = self.step * self.config.sequences_per_step + self.workers.rank * self._share
        generators = [
            torch.Generator().manual_seed(mix_seed(self.config.seed, first + index))
            for index in range(len(sequences))
        ]
        sums = self.objective.backward(sequences, generators, self.workers.total)
        sums = ObjectiveReport.unflatten(self.workers.total(sums.flatten()))
        share = rate_share(self.config, self.step)
        norm = self._update(share)
        self.step += 1
        return StepReport.of(sums, self.step, share * self.config.learning_rate, norm)

    def state(self) -> dict[str, Any]:
        """Everything `restore` needs to continue exactly here, on any number of workers.

        Collective: every worker must call it.
        """
        whole = self._weights.whole
        averages = self._averages
        return {
            "step": self.step,
            "masters": _named(self._names, [whole(m.detach()) for m in self._weights.masters]),
            "averages": None if averages is None else _named(self._names, [whole(a) for a in averages]),
            "optimizers": [_mapped(o.state_dict(), whole) for o in self._optimizers],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError when the state belongs to another drafter."""
        self._check_fits(state["masters"], len(state["optimizers"]))
        masters = self._weights.masters
        with torch.no_grad():
            for master, whole in zip(masters, state["masters"].values(), strict=True):
                master.copy_(self._weights.part(whole, master))
            if self._averages is not None:
                saved = state["averages"] or state["masters"]
                for average, master, whole in zip(self._averages, masters, saved.values(), strict=True):
                    average.copy_(self._weights.part(whole, master))
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            peaks = [group["peak_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(self._sharded_state(optimizer, saved))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak  # this run's configuration, not the saved one's
        self.step = state["step"]
        self._weights.publish()

    def export(self, directory: Path) -> None:
        """Write the drafter's checkpoint, from the averaged weights if they are kept. Collective."""
        with self._averaged():
            if self.workers.is_first:
                self.objective.save(directory)
        self.workers.barrier()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self._averages is None:
            yield
            return
        masters = self._weights.masters
        kept = [master.detach().clone() for master in masters]
        self._assign(self._averages)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for master, value in zip(self._weights.masters, values, strict=True):
            master.copy_(value)
        self._weights.publish()

    @torch.no_grad()
    def _update(self, share: float) -> float:
        masters = self._weights.masters
        self._weights.collect_gradients()
        norm = self._weights.whole(nn.utils.clip_grad_norm_(masters, self.config.clip_norm))
        if not math.isfinite(float(norm)):
            raise ConfigError(
                f"step {self.step + 1}: the gradient norm is {float(norm)}; a lower learning_rate may help"
            )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
        if self._averages is not None and self.config.ema_decay is not None:
            # A smaller decay early on keeps the initial weights from dominating the average.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._averages, [m.detach() for m in masters], 1 - decay)
        self._weights.publish()
        return float(norm)

    def _check_fits(self, saved: Mapping[str, Tensor], optimizers: int) -> None:
        shapes = dict(zip(self._names, (tuple(m.shape) for m in self._weights.masters), strict=True))
        found = {name: tuple(value.shape) for name, value in saved.items()}
        for name in shapes | found:
            if shapes.get(name) != found.get(name):
                raise CheckpointError(
                    f"the saved state is of another drafter: {name} has shape {found.get(name)}, "
                    f"this drafter's is {shapes.get(name)}"
                )
        if optimizers != len(self._optimizers):
            raise CheckpointError(
                f"the saved state has {optimizers} optimisers, this run {len(self._optimizers)}: "
                "matrix_learning_rate was given for one of them alone"
            )

    def _sharded_state(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            index: {
                name: self._weights.part(value, parameters[index]) if value.dim() else value
                for name, value in values.items()
            }
            for index, values in saved["state"].items()
        }
        return saved | {"state": state}


def _weights(module: nn.Module, dtype: torch.dtype, workers: Workers) -> Weights:
    return LocalWeights(module, dtype) if workers.size == 1 else ShardedWeights(module, dtype)


def _batches(source: SequenceSource, plan: Iterator[list[int]]) -> Generator[list[FeatureSequence]]:
    """Always a generator, whatever the source returns, so that closing it closes the source's iterator."""
    yield from source.batches(plan)


def _named(names: list[str], values: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, values, strict=True))


def _mapped(state: dict[str, Any], whole: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    values = {
        index: {name: whole(value) for name, value in one.items()} for index, one in state["state"].items()
    }
    return state | {"state": values}
