"""Targets and drafters of well-known shapes with random weights, created on the device without a download."""

from __future__ import annotations

import torch
from torch import nn

from dspark_core.engine.building import PAGE_TOKENS
from dspark_core.engine.gpu.settings import GpuSettings
from dspark_core.engine.target.context_features import ContextProjection
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.models.config import DecoderConfig, DrafterConfig, Family, draft_backbone
from dspark_core.models.decoder import Decoder
from dspark_core.models.dspark import DSparkDrafter, build_dspark_rotary
from dspark_core.models.gemma import build_decoder

SHAPES = {
    "llama-8b": DecoderConfig(
        family=Family.LLAMA,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_context_tokens=8192,
    ),
    "qwen3-4b": DecoderConfig(
        family=Family.QWEN3,
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        max_context_tokens=8192,
        tie_word_embeddings=True,
        qk_norm=True,
    ),
}
DRAFT_LAYERS = 5
BLOCK = 7
MARKOV_RANK = 256


def decoder_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        decoder = build_decoder(config)
    decoder.tie_weights()
    return dtype.itemsize * sum(parameter.numel() for parameter in decoder.parameters())


def random_decoder(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    with torch.device("meta"):
        decoder = build_decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    _fill(decoder)
    decoder.build_rotary(device)
    decoder.tie_weights()
    return decoder.requires_grad_(False).eval()


def random_drafter(decoder: Decoder) -> DSparkDrafter:
    """Five layers, a vanilla Markov head and a confidence head, as in the paper."""
    config = drafter_config(decoder.config)
    embedding, head = decoder.embed_tokens.weight, decoder.lm_head.weight
    with torch.device("meta"):
        drafter = DSparkDrafter(config, torch.empty_like(embedding), torch.empty_like(head))
    drafter = drafter.to(embedding.dtype).to_empty(device=embedding.device)
    _fill(drafter)
    drafter.embed_tokens, drafter.lm_head = embedding.detach(), head.detach()
    drafter.rotary = build_dspark_rotary(config).to(embedding.device)
    return drafter.requires_grad_(False).eval()


def drafter_config(target: DecoderConfig) -> DrafterConfig:
    layers = min(DRAFT_LAYERS, target.num_layers)
    return DrafterConfig(
        backbone=draft_backbone(target, layers),
        num_target_layers=target.num_layers,
        target_layer_ids=tuple(sorted({round(i * (target.num_layers - 1) / 4) for i in range(5)})),
        block_size=BLOCK,
        mask_token_id=target.vocab_size - 1,
        markov_rank=min(MARKOV_RANK, target.hidden_size),
        confidence_head=True,
        confidence_head_with_markov=True,
    )


def engine_of(
    decoder: Decoder, drafter: DSparkDrafter | None, gpu: GpuSettings | None, *, kv_tokens: int
) -> TargetEngine:
    """A target engine with the drafter's projection, if any, and pages for `kv_tokens` positions."""
    projection = None
    if drafter is not None:
        projection = ContextProjection(
            project=drafter.projection,
            target_layer_ids=drafter.config.target_layer_ids,
            feature_size=decoder.config.hidden_size,
        )
    pages = 1 + -(-kv_tokens // PAGE_TOKENS)
    return TargetEngine.of_decoder(
        decoder, decoder.config, num_pages=pages, page_tokens=PAGE_TOKENS, projection=projection, gpu=gpu
    )


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Matrices small enough to keep results finite, vectors all ones; speed does not depend on values."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(1.0)
