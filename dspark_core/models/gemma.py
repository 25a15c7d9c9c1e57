"""Gemma 3 and 4 text decoders: where they differ structurally from `decoder`.

Each sublayer sits between two norms, layers come in two kinds with separate RoPE, and the last
ones may attend to keys and values of earlier layers. `Attend` is then called with the index of the
layer that owns the keys and values, so a cache needs no entries for the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.models.config import DecoderConfig
from dspark_core.models.decoder import Decoder, FusedMLP
from dspark_core.models.gemma_config import GemmaConfig, LayerType
from dspark_core.models.layers import (
    Attend,
    ComputedRotary,
    activate,
    apply_rope,
    build_norm,
    embed,
    query_scale,
)
from dspark_core.models.weight_layout import mlp_size

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [tokens, 1, head_dim]"""
KeysValues = tuple[Tensor, Tensor]
"""k and v, each [tokens, kv_heads, head_dim]"""


def build_decoder(config: DecoderConfig) -> Decoder:
    """The decoder described by a configuration, with random weights."""
    return Decoder(config) if config.gemma is None else GemmaDecoder(config)


class GemmaDecoder(Decoder):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        with_inputs = _gemma_of(config).per_layer_input_size > 0
        self.per_layer_inputs = PerLayerInputs(config) if with_inputs else None

    def build_rotary(self, device: torch.device | str | None = None) -> None:
        gemma = _gemma_of(self.config)
        self.rotaries = nn.ModuleList(ComputedRotary(kind) for kind in (gemma.sliding, gemma.full)).to(device)

    def _layer(self, index: int) -> nn.Module:
        return GemmaLayer(self.config, index)

    def _layer_outputs(
        self, token_ids: Tensor, positions: Tensor, x: Tensor, attend: Attend
    ) -> Iterator[Tensor]:
        sliding, full = (rotary(positions, x.dtype) for rotary in self.rotaries)
        inputs = None if self.per_layer_inputs is None else self.per_layer_inputs(token_ids, x)
        stored: dict[int, KeysValues] = {}
        types = _gemma_of(self.config).layer_types
        for index, layer in enumerate(self.layers):
            rotation = full if types[index] is LayerType.FULL else sliding
            x = layer(x, rotation, attend, stored, None if inputs is None else inputs[:, index])
            yield x


class GemmaLayer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        gemma = _gemma_of(config)
        self.input_layernorm = build_norm(config)
        self.self_attn = GemmaAttention(config, index)
        self.post_attention_layernorm = build_norm(config)
        self.pre_feedforward_layernorm = build_norm(config)
        self.mlp = FusedMLP(config, mlp_size(config, index))
        self.post_feedforward_layernorm = build_norm(config)
        self.layer_scalar = nn.Parameter(torch.ones(1)) if gemma.layer_scalar else None
        self._config = config
        if gemma.per_layer_input_size:
            size = gemma.per_layer_input_size
            self.per_layer_input_gate = nn.Linear(config.hidden_size, size, bias=False)
            self.per_layer_projection = nn.Linear(size, config.hidden_size, bias=False)
            self.post_per_layer_input_norm = build_norm(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attend,
        stored: dict[int, KeysValues],
        layer_input: Tensor | None,
    ) -> Tensor:
        """x [tokens, hidden]; `stored`: keys and values of this pass that later layers share, by
        owning layer; layer_input [tokens, per-layer size]."""
        attended = self.self_attn(self.input_layernorm(x), rotation, attend, stored)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if layer_input is not None:
            gated = activate(self._config, self.per_layer_input_gate(x)) * layer_input
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x if self.layer_scalar is None else x * self.layer_scalar


class GemmaAttention(nn.Module):
    """Queries and, where the layer has its own, keys and values from a single matrix."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self._gemma = _gemma_of(config)
        self._kind = self._gemma.kind(index)
        self._source = self._gemma.kv_source(index)
        self._shares = self._source != index
        later = range(self._gemma.num_own_layers, config.num_layers)
        self._is_shared = index in {self._gemma.kv_source(layer) for layer in later}
        self._eps = config.rms_norm_eps
        self._query_scale = query_scale(config, self._kind.head_dim)
        heads, kv_heads, size = config.num_heads, self._kind.num_kv_heads, self._kind.head_dim
        self._heads = heads
        self._rotated_heads = heads if self._shares else heads + kv_heads
        rows = self._rotated_heads
        if not (self._shares or self._kind.values_are_keys):
            rows += kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, rows * size, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=config.attention_bias)
        # One row per head, so that the norms of q and k run as one operation.
        self.qk_norm = nn.Parameter(torch.ones(self._rotated_heads, size))

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, stored: dict[int, KeysValues]) -> Tensor:
        """x [tokens, hidden] -> the same shape."""
        tokens, heads = x.shape[0], self._heads
        qkv = self.qkv_proj(x).view(tokens, -1, self._kind.head_dim)
        qk = apply_rope(self._normed(qkv[:, : self._rotated_heads]), *rotation)
        if self._shares:
            k, v = stored[self._source]
        else:
            k, v = qk[:, heads:], self._values(qkv)
        if self._is_shared:
            stored[self._source] = k, v
        attended = attend(self._source, qk[:, :heads] * self._query_scale, k, v)
        out: Tensor = self.o_proj(attended.reshape(tokens, -1))
        return out

    def _values(self, qkv: Tensor) -> Tensor:
        """Without a projection of their own, values equal the keys before norm and RoPE."""
        v = qkv[:, self._heads if self._kind.values_are_keys else self._rotated_heads :]
        if self._gemma.value_norm:
            v = F.rms_norm(v, (self._kind.head_dim,), None, self._eps)
        return v

    def _normed(self, qk: Tensor) -> Tensor:
        """qk [tokens, heads, head_dim] -> the same shape."""
        weight = self.qk_norm.float()
        if self._gemma.shifted_norms:
            weight = weight + 1.0
        normed = F.rms_norm(qk.float(), (self._kind.head_dim,), None, self._eps) * weight
        return normed.to(qk.dtype)


class PerLayerInputs(nn.Module):
    """Per-token inputs of every layer: rows of a separate table plus the projected embedding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        gemma = _gemma_of(config)
        self._layers, self._size = config.num_layers, gemma.per_layer_input_size
        self._projection_scale = config.hidden_size**-0.5
        all_layers = self._layers * self._size
        self.embed_tokens_per_layer = nn.Embedding(gemma.per_layer_vocab_size, all_layers)
        self.per_layer_model_projection = nn.Linear(config.hidden_size, all_layers, bias=False)
        self.per_layer_projection_norm = build_norm(config, self._size)

    def forward(self, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """token_ids [tokens], embedded [tokens, hidden] -> [tokens, layers, per-layer size]."""
        shape = (len(token_ids), self._layers, self._size)
        rows = embed(token_ids, self.embed_tokens_per_layer.weight, self._size**0.5).view(shape)
        projected = (self.per_layer_model_projection(embedded) * self._projection_scale).view(shape)
        out: Tensor = (self.per_layer_projection_norm(projected) + rows) * 2.0**-0.5
        return out


def _gemma_of(config: DecoderConfig) -> GemmaConfig:
    assert config.gemma is not None, f"{config.family} is no Gemma"
    return config.gemma
