"""Converts confidence logits to probabilities, with the calibration applied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.algorithms.calibration import ConfidenceScaling


class Confidences:
    def __init__(self, scaling: ConfidenceScaling | None, device: torch.device) -> None:
        """`scaling` corrects the logit of each position; None: logits are used unchanged."""
        self._factors: list[float] | None = None
        self._biases: list[float] = []
        self._tensors: tuple[Tensor, Tensor] | None = None  # [block] each
        if scaling is not None:
            self._factors = [1.0 / temperature for temperature in scaling.temperatures]
            self._biases = list(scaling.biases)
            self._tensors = (
                torch.tensor(self._factors, dtype=torch.float32).to(device),
                torch.tensor(self._biases, dtype=torch.float32).to(device),
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [requests, block] -> probabilities likewise; blocks may be shorter than the scaling."""
        logits = logits.float()
        if self._tensors is not None:
            block = logits.shape[1]
            factors, biases = self._tensors
            logits = logits * factors[:block] + biases[:block]
        return torch.sigmoid(logits)

    def of_rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """The same on Python numbers: for a block or two, operators would take longer."""
        factors = self._factors
        if factors is None:
            return [[_sigmoid(logit) for logit in row] for row in rows]
        return [
            [_sigmoid(logit * factor + bias) for logit, factor, bias in zip(row, factors, self._biases)]  # noqa: B905
            for row in rows
        ]


def _sigmoid(x: float) -> float:
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    power = math.exp(x)
    return power / (1.0 + power)
