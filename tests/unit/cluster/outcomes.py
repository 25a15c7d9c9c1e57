"""Outcomes of drafts whose confidences promise too much."""

from dataclasses import replace

import numpy as np

from dspark_core.records import RequestSurvival


def drawn_outcomes(
    count: int, *, overconfidence: float, block: int = 4, seed: int = 3, temperature: float = 0.0
) -> list[RequestSurvival]:
    """Told confidences whose logits are too high by `overconfidence`; outcomes follow the true ones."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        logits = generator.normal(0.8, 1.2, block)
        true = 1 / (1 + np.exp(-logits))
        told = 1 / (1 + np.exp(-(logits + overconfidence)))
        stands = generator.random(block) < true
        accepted = block if stands.all() else int(np.argmin(stands))
        found.append(
            RequestSurvival(
                sequence_id=str(index),
                survival=tuple(np.cumprod(told).tolist()),
                verify_length=block,
                accepted=accepted,
                temperature=temperature,
            )
        )
    return found


OVERCONFIDENT = drawn_outcomes(3000, overconfidence=1.5)
REFUSED = [replace(one, sequence_id="broken", accepted=0) for one in OVERCONFIDENT]
