"""Confidence logits to probabilities, corrected as calibration found."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.algorithms.calibration import ConfidenceScaling


class Confidences:
    def __init__(self, scaling: ConfidenceScaling | None, device: torch.device) -> None:
        """`scaling`: corrects the logit of each position; None: they are taken as they are."""
        self._factors: Tensor | None = None  # [block]
        self._biases: Tensor | None = None  # [block]
        if scaling is not None:
            temperatures = torch.tensor(scaling.temperatures, dtype=torch.float32)
            self._factors = (1.0 / temperatures).to(device)
            self._biases = torch.tensor(scaling.biases, dtype=torch.float32).to(device)

    def __call__(self, logits: Tensor) -> Tensor:
        """[requests, block] -> probabilities of the same shape; a block may be cut short."""
        logits = logits.float()
        if self._factors is not None and self._biases is not None:
            block = logits.shape[1]
            logits = logits * self._factors[:block] + self._biases[:block]
        return torch.sigmoid(logits)
