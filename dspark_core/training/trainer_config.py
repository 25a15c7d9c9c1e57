"""Settings of the trainer: steps, learning rates, clipping, averaging and precision."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    steps: int
    sequences_per_step: int = 8
    """Total over all workers."""
    learning_rate: float = 6e-4
    matrix_learning_rate: float | None = None
    """Learning rate of the layers' and the projection's matrices under Muon; None: AdamW for all."""
    warmup_fraction: float = 0.04
    decay_fraction: float = 0.96
    """Final fraction of the steps, with cosine decay to zero; 1 - warmup_fraction: no plateau."""
    clip_norm: float = 1.0
    ema_decay: float | None = None
    """Decay of the moving average of the weights, which is exported instead of them; None: no average."""
    bf16: bool = True
    """Weights and activations in bfloat16; masters are float32 either way."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequences_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm", "matrix_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be > 0, got {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in (0, 1), got {self.ema_decay}")
