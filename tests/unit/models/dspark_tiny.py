"""A tiny random drafter of any shape, for tests of the model itself."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_core.models.config import DecoderConfig, DrafterConfig, Family, MarkovHeadType
from dspark_core.models.dspark import DSparkDrafter

BACKBONE = DecoderConfig(
    family=Family.LLAMA,
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_context_tokens=64,
)
TARGET = dataclasses.replace(BACKBONE, num_layers=4)


def tiny_config(**fields) -> DrafterConfig:
    defaults = {
        "backbone": BACKBONE,
        "num_target_layers": 4,
        "target_layer_ids": (-1, 2),
        "block_size": 5,
        "mask_token_id": 49,
        "markov_rank": 3,
        "markov_head_type": MarkovHeadType.VANILLA,
        "confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return DrafterConfig(**(defaults | fields))


def tiny_drafter(
    config: DrafterConfig, draft_vocab_ids: Tensor | None = None, seed: int = 0
) -> DSparkDrafter:
    """Weights depend on the seed and the shapes alone."""
    generator = torch.Generator().manual_seed(seed)
    vocab, size = config.backbone.vocab_size, config.backbone.hidden_size
    embed = torch.randn(vocab, size, generator=generator)
    head = torch.randn(vocab, size, generator=generator)
    if draft_vocab_ids is not None:
        head = head[draft_vocab_ids]
    drafter = DSparkDrafter(config, embed, head, draft_vocab_ids)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return drafter.eval().requires_grad_(False)
