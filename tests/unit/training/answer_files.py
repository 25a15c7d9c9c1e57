"""Small files of answers in the golden target's vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path

from dspark_core.training.origin import FeatureOrigin
from tests.unit.models.dspark_golden import golden_target
from tests.unit.training.training_sequences import GOLDEN_LAYERS


def write_answers(path: Path, count: int = 9, seed: int = 0) -> Path:
    drawn = random.Random(seed)
    rows = [
        {
            "id": f"row-{number}",
            "prompt_ids": [drawn.randrange(400) for _ in range(drawn.randint(1, 8))],
            "answer_ids": [drawn.randrange(400) for _ in range(drawn.randint(2, 12))],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def golden_origin() -> FeatureOrigin:
    target = golden_target()
    return FeatureOrigin(
        target=target.path.name,
        fingerprint=target.fingerprint,
        vocab_size=target.config.vocab_size,
        hidden_size=target.config.hidden_size,
        tap_layers=GOLDEN_LAYERS,
        dtype="float32",
        chat_template="",
    )
