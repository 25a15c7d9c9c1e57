"""The MTP-1 drafter: DeepSeek-V3's multi-token-prediction module, which drafts one token per round.

DeepSeek-V3 (arXiv 2412.19437, section 2.2); the baseline of the paper's production results. The module's
input pairs the target's final hidden state of position i with the embedding of token i + 1.
`eh_proj [enorm(embedding) ; hnorm(hidden)]` passes through one decoder layer, causal over the pairs,
whose output predicts token i + 2. Embedding and LM head are the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_core.models.autoregressive import AutoregressiveDrafter
from dspark_core.models.config import MtpConfig
from dspark_core.models.dspark import DraftTokens, Sampler, build_draft_layer
from dspark_core.models.layers import Attend, Rotary, build_norm, build_rotary, embed
from dspark_core.models.own_confidence import own_confidence_logits


class MtpProjection(nn.Module):
    """`hnorm(h)`: from the target's final hidden state to the context feature."""

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        self.target_layer_ids = config.target_layer_ids
        self.hnorm = build_norm(config.backbone)

    def forward(self, taps: Tensor) -> Tensor:
        """taps [tokens, d], after the target's final norm -> features [tokens, d]."""
        features: Tensor = self.hnorm(taps)
        return features


class MtpDrafter(AutoregressiveDrafter):
    config: MtpConfig

    def __init__(
        self,
        config: MtpConfig,
        embed_tokens: Tensor,
        lm_head: Tensor,
        draft_vocab_ids: Tensor | None = None,
    ) -> None:
        super().__init__(config, embed_tokens, lm_head, draft_vocab_ids)
        backbone = config.backbone
        size = backbone.hidden_size
        self.projection = MtpProjection(config)
        self.enorm = build_norm(backbone)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer = build_draft_layer(backbone)
        self.norm = build_norm(backbone)
        self.rotary = build_mtp_rotary(config)

    def combine(self, features: Tensor, next_ids: Tensor) -> Tensor:
        """features [tokens, d] and the tokens after them [tokens] -> the layer's input [tokens, d]."""
        scale = self.config.backbone.embedding_scale
        embedded = self.enorm(embed(next_ids, self.embed_tokens, scale))
        combined: Tensor = self.eh_proj(torch.cat((embedded, features), dim=-1))
        return combined

    def context_keys_values(
        self, features: Tensor, next_ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """features [tokens, d] at `positions` [tokens], each with the token that follows it
        -> k, v [tokens, kv_heads, head_dim].

        With a single layer, the keys and values of a position never change.
        """
        cos, sin = self.rotary(positions, features.dtype)
        combined = self.layer.input_layernorm(self.combine(features, next_ids))
        k, v = self.layer.self_attn.keys_values(combined, cos, sin)
        return k, v

    def draw(
        self, anchor_ids: Tensor, features: Tensor, positions: Tensor, attend: Attend, sampler: Sampler
    ) -> DraftTokens:
        """Drafts one token from the features [requests, d] at `positions`, just before the anchors.

        `attend` is called once with one query, key and value per request, which sees the context
        before `positions` and itself.
        """
        cos, sin = self.rotary(positions, features.dtype)
        logits = self.logits(self.layer(0, self.combine(features, anchor_ids), cos, sin, attend))
        drawn = self.target_ids(sampler(0, logits))
        return DraftTokens(drawn[:, None], own_confidence_logits(logits)[:, None])


def build_mtp_rotary(config: MtpConfig) -> Rotary:
    """RoPE for the context plus one block; a pair sits at the position of its hidden state."""
    return build_rotary(config.backbone, config.block_size)
