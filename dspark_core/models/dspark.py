"""The DSpark drafter: a block-parallel backbone over context features, then sequential heads.

Paper, section 3. DFlash is the same model without the heads. Attention is injected, as in
`layers.py`: inference reads paged context keys and values, training gathers a window. The
projection of the target's hidden states is a separate module, because the verifier applies it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.kernels.matrix import NativeMatrix
from dspark_core.models.config import DecoderConfig, DrafterConfig
from dspark_core.models.heads import ConfidenceHead, build_markov_head
from dspark_core.models.layers import (
    MLP,
    Attend,
    AttentionProjections,
    Rotary,
    build_norm,
    build_rotary,
    embed,
    soft_cap,
)
from dspark_core.models.moe import MoeMLP
from dspark_core.models.moe_config import MoeConfig
from dspark_core.models.native_draft import native_draft_layers
from dspark_core.models.native_stack import NativeStack
from dspark_core.models.packing import NormedProduct, PackedLinear, PackingPlan, pack_linears, pack_weight

Sampler = Callable[[int, Tensor], Tensor]
"""(block position, logits [requests, draft vocab]) -> draft vocabulary indices [requests]."""


def greedy_sampler(position: int, logits: Tensor) -> Tensor:
    """The most likely token of each request."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Tokens drawn in one pass over the block positions. A sampler keeps further outputs itself."""

    token_ids: Tensor  # [requests, block] target token ids
    confidence_logits: Tensor | None  # [requests, block]; None: no confidence head


class FeatureProjection(nn.Module):
    """`H_ctx = RMSNorm(W_c [H(l1); ...; H(lm)])`: from target hidden states to context features."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.target_layer_ids = config.target_layer_ids
        self.fc = nn.Linear(config.tap_size, config.backbone.hidden_size, bias=False)
        self.hidden_norm = build_norm(config.backbone)
        self._normed: NormedProduct | None = None

    def forward(self, taps: Tensor) -> Tensor:
        """taps [tokens, m * d], in the order of `target_layer_ids` -> features [tokens, d]."""
        if self._normed is None:
            self._normed = NormedProduct.of(self.fc, self.hidden_norm)  # None until `fc` is packed
        if self._normed is not None:
            return self._normed(taps)
        features: Tensor = self.hidden_norm(self.fc(taps))
        return features


class DraftLayer(nn.Module):
    """A decoder layer that also attends to keys and values computed from context features."""

    def __init__(self, config: DecoderConfig, moe: MoeConfig | None = None) -> None:
        super().__init__()
        self.self_attn = AttentionProjections(config)
        self.mlp = MLP(config) if moe is None else MoeMLP(config, moe)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def forward(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [tokens, d], flattened blocks -> the same shape."""
        x = x + self._attended(layer, x, cos, sin, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def _attended(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        normed = self.input_layernorm(x)
        q = self.self_attn.queries(normed, cos, sin)
        k, v = self.self_attn.keys_values(normed, cos, sin)
        out: Tensor = self.self_attn.o_proj(attend(layer, q, k, v).flatten(-2))
        return out


class GemmaDraftLayer(DraftLayer):
    """Has norms before and after both sublayers, and the target's output scale."""

    layer_scalar: Tensor | None

    def __init__(self, config: DecoderConfig, moe: MoeConfig | None = None) -> None:
        super().__init__(config, moe)
        self.pre_feedforward_layernorm = build_norm(config)
        self.post_feedforward_layernorm = build_norm(config)
        scaled = config.gemma is not None and config.gemma.layer_scalar
        # Not trained, as in DeepSpec: one of the norms could cancel it.
        self.register_buffer("layer_scalar", torch.ones(1) if scaled else None)

    def forward(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [tokens, d], flattened blocks -> the same shape."""
        x = x + self.post_attention_layernorm(self._attended(layer, x, cos, sin, attend))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x if self.layer_scalar is None else x * self.layer_scalar


def build_draft_layer(config: DecoderConfig, moe: MoeConfig | None = None) -> DraftLayer:
    """A layer of the backbone's family."""
    kind = DraftLayer if config.gemma is None else GemmaDraftLayer
    return kind(config, moe)


class DSparkDrafter(nn.Module):
    """Embedding and LM head belong to the target: frozen buffers, shared with it where possible."""

    embed_tokens: Tensor
    lm_head: Tensor
    draft_vocab_ids: Tensor | None

    def __init__(
        self,
        config: DrafterConfig,
        embed_tokens: Tensor,
        lm_head: Tensor,
        draft_vocab_ids: Tensor | None = None,
    ) -> None:
        """embed_tokens [vocab, d]; lm_head [draft vocab, d]; draft_vocab_ids [draft vocab] int64."""
        super().__init__()
        self.config = config
        backbone = config.backbone
        self.register_buffer("embed_tokens", embed_tokens, persistent=False)
        self.register_buffer("lm_head", lm_head, persistent=False)
        self.register_buffer("draft_vocab_ids", draft_vocab_ids)
        self.projection = FeatureProjection(config)
        self.layers = nn.ModuleList(
            build_draft_layer(backbone, config.moe) for _ in range(backbone.num_layers)
        )
        self.norm = build_norm(backbone)
        self.markov_head = build_markov_head(config)
        self.confidence_head = ConfidenceHead(config) if config.confidence_head else None
        self.rotary = build_dspark_rotary(config)
        self.native_layers: NativeStack | None = None
        """Set by `pack` if the native kernels compute the layers."""
        self._packed_head: PackedLinear | None = None
        self.confidence_weights: Tensor | None = None
        """Set by `pack`: the confidence head's weights in full precision, for the kernels."""

    def pack(self, *, byte_products: bool = False) -> None:
        """Speeds up inference on a CPU; the linear layers' weights are no longer parameters afterwards.

        `byte_products` as in `PackingPlan`.

        With `native_layers` the layers exist only in the kernels' form: `block_hidden` and
        `context_keys_values` then raise RuntimeError.
        """
        backbone = self.config.backbone
        native = native_draft_layers(
            backbone, self.layers, self.embed_tokens, self.norm, self.rotary, byte_products=byte_products
        )
        if native is not None:
            self.layers, self.native_layers = nn.ModuleList(), native
        if self.confidence_head is not None:
            self.confidence_weights = self.confidence_head.flat_weights()
        plan = PackingPlan(byte_products=byte_products)
        pack_linears(self, plan)
        self._packed_head = pack_weight(self.lm_head, plan)

    def project(self, taps: Tensor) -> Tensor:
        """taps [tokens, m * d] -> context features [tokens, d]."""
        features: Tensor = self.projection(taps)
        return features

    def context_keys_values(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """features [tokens, d], positions [tokens] -> per layer k, v [tokens, kv_heads, head_dim].

        Every layer reads the same features, so the keys and values of a position never change.
        """
        cos, sin = self.rotary(positions, features.dtype)
        return [layer.self_attn.keys_values(features, cos, sin) for layer in self._draft_layers()]

    def block_hidden(
        self, anchor_ids: Tensor, anchor_positions: Tensor, attend: Attend, block: int | None = None
    ) -> Tensor:
        """anchor_ids, anchor_positions [requests] -> normed hidden states [requests, block, d].

        `block`: number of block positions to compute; None: all.

        `attend` receives all blocks flattened, [requests * block, heads, head_dim]; each block
        attends to its context before the anchor and, bidirectionally, to itself.
        """
        block = block or self.config.block_size
        ids = anchor_ids.new_full((len(anchor_ids), block), self.config.mask_token_id)
        ids[:, 0] = anchor_ids
        positions = anchor_positions[:, None] + torch.arange(block, device=anchor_positions.device)
        cos, sin = self.rotary(positions.flatten(), self.embed_tokens.dtype)
        x = embed(ids.flatten(), self.embed_tokens, self.config.backbone.embedding_scale)
        for index, layer in enumerate(self._draft_layers()):
            x = layer(index, x, cos, sin, attend)
        hidden: Tensor = self.norm(x)
        return hidden.view(len(anchor_ids), block, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> U, logits over the draft vocabulary before the sequential bias."""
        cap = self.config.backbone.final_logit_softcap
        if self._packed_head is not None:
            return soft_cap(self._packed_head(hidden), cap)
        return soft_cap(F.linear(hidden, self.lm_head), cap)

    def float_logits(self, hidden: Tensor) -> Tensor:
        """`base_logits` in float32, for drawing: an argmax over bfloat16 takes five times as long."""
        if self._packed_head is not None and self._packed_head.native is not None:
            logits = self._packed_head.native.multiply(hidden, torch.float32)
            return soft_cap(logits, self.config.backbone.final_logit_softcap)
        return self.base_logits(hidden).float()

    @property
    def native_head(self) -> NativeMatrix | None:
        """Set by `pack`: the matrix of `float_logits`, if they are a plain product with it."""
        if self._packed_head is None or self.config.backbone.final_logit_softcap is not None:
            return None
        return self._packed_head.native

    def draw(self, anchor_ids: Tensor, hidden: Tensor, sampler: Sampler) -> DraftTokens:
        """Draws the blocks left to right; each token biases the logits of the next."""
        base = self.float_logits(hidden)  # [requests, block, draft vocab]
        head = self.markov_head
        state = head.initial_state(len(anchor_ids)) if head is not None else None
        tokens = [anchor_ids]
        for position in range(hidden.shape[1]):
            logits = base[:, position]
            if head is not None and state is not None:
                bias, state = head.step(head.embed(tokens[-1]), hidden[:, position], state)
                logits = logits + bias
            tokens.append(self.target_ids(sampler(position, logits)))
        drawn = torch.stack(tokens, dim=1)  # [requests, 1 + block]
        return DraftTokens(drawn[:, 1:], self.confidence_logits(hidden, drawn[:, :-1]))

    def confidence_logits(self, hidden: Tensor, previous_ids: Tensor) -> Tensor | None:
        """[requests, block], where the token before position k is `previous_ids[:, k]`; None: no head."""
        if self.confidence_head is None:
            return None
        embedded = self.markov_head.embed(previous_ids) if self.markov_head is not None else None
        logits: Tensor = self.confidence_head(hidden, embedded)
        return logits

    def target_ids(self, draft_indices: Tensor) -> Tensor:
        """Draft vocabulary indices -> target token ids."""
        return draft_indices if self.draft_vocab_ids is None else self.draft_vocab_ids[draft_indices]

    def _draft_layers(self) -> list[DraftLayer]:
        if self.native_layers is not None:
            raise RuntimeError("the drafter's layers are packed: use native_layers")
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]


def build_dspark_rotary(config: DrafterConfig) -> Rotary:
    """RoPE for the context plus one block, since the last block may extend past the context."""
    return build_rotary(config.backbone, config.block_size)
