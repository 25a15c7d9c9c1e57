"""The peer that `transformers` is computes what the checkpoint says, scaled RoPE included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers_transformers import as_transformers
from tests.unit.models.target_checkpoints import LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE, llama, save_hf


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, LINEAR_ROPE, YARN_ROPE])
def test_logits_are_those_of_the_checkpoint(rope: Any, tmp_path: Path) -> None:
    model = llama(rope_parameters=rope, tie_word_embeddings=True)
    peer = as_transformers(str(save_hf(model, tmp_path)), torch.float32)
    prompt = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(peer(prompt).logits, model(prompt).logits, atol=1e-5, rtol=1e-5)
