"""The Eagle3 drafter: one decoder layer that drafts autoregressively from the target's features.

The baseline of the paper's evaluation, in the form DeepSpec trains. The layer's input pairs the
feature of position i with the embedding of token i + 1, at RoPE position i. Past the anchor the
target has no features yet, so the layer's own output takes their place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_core.models.autoregressive import AutoregressiveDrafter
from dspark_core.models.config import DecoderConfig, Eagle3Config
from dspark_core.models.dspark import DraftTokens, Sampler
from dspark_core.models.layers import (
    MLP,
    Attend,
    AttentionProjections,
    Rotary,
    build_norm,
    build_rotary,
    embed,
)
from dspark_core.models.own_confidence import own_confidence_logits


class Eagle3Projection(nn.Module):
    """`fc [H(l1); ...; H(lm)]`: from target hidden states to context features. The layer norms them."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.target_layer_ids = config.target_layer_ids
        self.fc = nn.Linear(config.tap_size, config.backbone.hidden_size, bias=False)

    def forward(self, taps: Tensor) -> Tensor:
        """taps [tokens, m * d], in the order of `target_layer_ids` -> features [tokens, d]."""
        features: Tensor = self.fc(taps)
        return features


class Eagle3Layer(nn.Module):
    """A decoder layer whose queries, keys and values are computed from a token and a hidden state."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = AttentionProjections(config, input_size=2 * config.hidden_size)
        self.mlp = MLP(config)
        self.input_layernorm = build_norm(config)
        self.hidden_norm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def pairs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """embedded, hidden [tokens, d] -> input of q, k and v [tokens, 2 * d]."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), dim=-1)

    def forward(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """embedded, hidden [tokens, d] -> the next hidden states [tokens, d]."""
        hidden = hidden + self._attended(self.pairs(embedded, hidden), cos, sin, attend)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out

    def _attended(self, pairs: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.self_attn.queries(pairs, cos, sin)
        k, v = self.self_attn.keys_values(pairs, cos, sin)
        out: Tensor = self.self_attn.o_proj(attend(0, q, k, v).flatten(-2))
        return out


class GemmaEagle3Layer(Eagle3Layer):
    """Has norms before and after both sublayers, as in `GemmaDraftLayer`."""

    layer_scalar: Tensor | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.pre_feedforward_layernorm = build_norm(config)
        self.post_feedforward_layernorm = build_norm(config)
        scaled = config.gemma is not None and config.gemma.layer_scalar
        self.register_buffer("layer_scalar", torch.ones(1) if scaled else None)

    def forward(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """embedded, hidden [tokens, d] -> the next hidden states [tokens, d]."""
        attended = self._attended(self.pairs(embedded, hidden), cos, sin, attend)
        hidden = hidden + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(hidden))
        hidden = hidden + self.post_feedforward_layernorm(fed)
        return hidden if self.layer_scalar is None else hidden * self.layer_scalar


class Eagle3Drafter(AutoregressiveDrafter):
    config: Eagle3Config

    def __init__(
        self,
        config: Eagle3Config,
        embed_tokens: Tensor,
        lm_head: Tensor,
        draft_vocab_ids: Tensor | None = None,
    ) -> None:
        super().__init__(config, embed_tokens, lm_head, draft_vocab_ids)
        backbone = config.backbone
        self.projection = Eagle3Projection(config)
        self.layer = Eagle3Layer(backbone) if backbone.gemma is None else GemmaEagle3Layer(backbone)
        self.norm = build_norm(backbone)
        self.rotary = build_eagle3_rotary(config)

    def embedded(self, token_ids: Tensor) -> Tensor:
        """token_ids [...] -> [..., d], embedded as in the target."""
        return embed(token_ids, self.embed_tokens, self.config.backbone.embedding_scale)

    def context_keys_values(
        self, features: Tensor, next_ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """features [tokens, d] at `positions` [tokens], each with the token that follows it
        -> k, v [tokens, kv_heads, head_dim].

        With a single layer, the keys and values of a position never change.
        """
        cos, sin = self.rotary(positions, features.dtype)
        pairs = self.layer.pairs(self.embedded(next_ids), features)
        k, v = self.layer.self_attn.keys_values(pairs, cos, sin)
        return k, v

    def draw(
        self, anchor_ids: Tensor, features: Tensor, positions: Tensor, attend: Attend, sampler: Sampler
    ) -> DraftTokens:
        """Drafts a block from the features [requests, d] at `positions`, just before the anchors.

        `attend` is called once per step with one query, key and value per request; each step
        sees the context before `positions`, itself, and the steps before it.
        """
        hidden, previous = features, anchor_ids
        tokens, confidences = [], []
        for step in range(self.config.block_size):
            cos, sin = self.rotary(positions + step, hidden.dtype)
            hidden = self.layer(self.embedded(previous), hidden, cos, sin, attend)
            logits = self.logits(hidden)
            confidences.append(own_confidence_logits(logits))
            previous = self.target_ids(sampler(step, logits))
            tokens.append(previous)
        return DraftTokens(torch.stack(tokens, dim=1), torch.stack(confidences, dim=1))


def build_eagle3_rotary(config: Eagle3Config) -> Rotary:
    """RoPE for the context plus one block, since the last block may extend past the context."""
    return build_rotary(config.backbone, config.block_size)
