"""A training that takes a moment: a tiny drafter on random sequences of the golden target's shapes."""

from __future__ import annotations

from pathlib import Path

import yaml

from dspark_core.training.features import write_shard
from services.cli.main import main
from tests.unit.models.dspark_golden import GOLDEN
from tests.unit.training.training_sequences import random_sequence

STEPS = 8


def write_config(folder: Path) -> Path:
    """Eight sequences and a configuration, in the folder; the run goes to `run` in it."""
    shards = folder / "shards"
    shards.mkdir()
    rows = [random_sequence(24, 4, taps=192, size=64, seed=i) for i in range(8)]
    write_shard(shards / "a.safetensors", rows)
    document = {
        "target": {"model": str(GOLDEN / "qwen3_tiny_target")},
        "data": {"shards": [str(shards)]},
        "drafter": {"layers": 1, "tap_layers": [1, 3, 5], "block_size": 4, "markov_rank": 8,
                    "draft_vocab": 64},
        "optimisation": {"steps": STEPS, "sequences": 4, "bf16": False, "threads": 1, "ema": 0.9,
                         "matrix_learning_rate": 1e-3, "losses": {"anchors": 4, "tap_dropout": 0.1}},
        "output": {"directory": str(folder / "run"), "checkpoint_every": 2, "log_every": 1, "keep": 9},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def train(config: Path, *arguments: str) -> int:
    return main(["train", "--config", str(config), *arguments])
